"""Models of ours in other programs: what they compute there, and what is refused before."""

import json
import subprocess
import sys

import pytest
import torch

from moemamba import ModelConfig, MoEMamba, cli, generate, load, preset, presets, save
from moemamba.checkpoint import model_tensors
from moemamba.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig, RoutedMambaConfig
from moemamba.integrations.convert import convert
from moemamba.integrations.export import export
from moemamba.integrations.export.padding import with_idle_norms
from moemamba.integrations.export.step import Step, program
from moemamba.integrations.portability import FORMATS, obstacles
from moemamba.integrations.portability.jamba import Period, pattern, period
from moemamba.tensors import TensorFile
from moemamba.text import ByteTokenizer

EXPERTS = ExpertsConfig(4, top_k=2, d_expert=40)
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def build(pattern, n_blocks=2, inner="none", **more):
    torch.manual_seed(0)
    own = {"vocab_size": 260, "experts": EXPERTS, "mamba": MambaConfig(inner_norm=inner)}
    model = MoEMamba(ModelConfig(pattern, n_blocks, 32, **own | more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


# transformers' architectures

ROTATION_FREE = {"attention": AttentionConfig(4, n_kv_heads=2, rotary=False), "feedforward": FeedForwardConfig(40)}
FOLDERS = {
    "mamba": ("mamba", "M", "none", {}),
    "mamba, tied": ("mamba", "M", "none", {"tie_embeddings": True, "norm_eps": 1e-3}),
    "falcon": ("falcon_mamba", "M", "weightless", {}),
    "vllm, tied": ("vllm", "ME", "rmsnorm", {"tie_embeddings": True}),
    "vllm, plain": ("vllm", "ME", "none", {"tie_embeddings": True}),
    "vllm, pattern M": ("vllm", "M", "none", {"tie_embeddings": True}),
    "jamba, inner norms": ("jamba", "ME", "rmsnorm", {}),
    "jamba, weightless": ("jamba", "ME", "weightless", {}),
    "jamba, plain": ("jamba", "ME", "none", {"tie_embeddings": True}),
    "jamba, plain and dense": ("jamba", "MF", "none", {"feedforward": FeedForwardConfig(40)}),
    "jamba, attention": ("jamba", "MEAE", "rmsnorm", ROTATION_FREE),
    "jamba, dense and experts": ("jamba", "MFMEAFME", "rmsnorm", {"n_blocks": 1, **ROTATION_FREE}),
    "jamba, mixers alone": ("jamba", "MMEM", "none", {"n_blocks": 1}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_computes_the_same(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    to, pattern, inner, more = FOLDERS[name]
    model = build(pattern, inner=inner, **more)
    save(tmp_path / "ours", model, ByteTokenizer())
    assert bool(export(tmp_path / "ours", to, tmp_path / "out").remark) == ("plain" in name or "alone" in name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = theirs(TOKENS, use_cache=False).logits
    assert (found - logits(model)).abs().max() <= 2e-6
    prompt = TOKENS[:1, :9]
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert answer[0, 9:].tolist() == generate(model, prompt.tolist(), 8, temperature=0)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("né", add_special_tokens=False)["input_ids"] == [*"né".encode()]
    assert tokenizer.eos_token_id == 256
    if to == "vllm":  # whose Mamba ties its head, whose Jamba never does
        kind, has_head = type(theirs).__name__, "lm_head.weight" in TensorFile(tmp_path / "out" / "model.safetensors")
        assert (kind, has_head) == (("MambaForCausalLM", False) if pattern == "M" else ("JambaForCausalLM", True))
        assert theirs.config.tie_word_embeddings is not has_head
    convert(str(tmp_path / "out"), tmp_path / "back")  # and in again
    torch.testing.assert_close(logits(load(tmp_path / "back")[0]), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("pattern", ["ME", "MF", "M"])
def test_idle_norms_change_nothing(pattern):
    model = build(pattern)
    config, tensors = with_idle_norms(model.config, model_tensors(model))
    wide = MoEMamba(config).eval()
    wide.load_state_dict(wide.state_dict() | tensors)
    assert config.mamba.inner_norm == "rmsnorm" and config.d_model == 64
    assert (logits(wide) - logits(model)).abs().max() <= 2e-6
    with torch.no_grad():  # and they are norms: without the constant channel they would not be idle
        for name, parameter in wide.named_parameters():
            if name.endswith("x_proj.weight"):
                parameter[:, model.config.d_inner :] = 0
    assert not (logits(wide) - logits(model)).abs().max() <= 1e-2


# What cannot go


@pytest.mark.parametrize(
    ("to", "changes", "said"),
    [
        ("mamba", {"pattern": "ME"}, "it has Mamba layers alone, and the pattern is ME"),
        ("mamba", {"norm": "layernorm"}, "its norms are norm = "),
        ("jamba", {"pattern": "(ME)"}, "its layers are a mixer"),
        ("jamba", {"pattern": "EM"}, "its layers are a mixer"),
        ("jamba", {"pattern": "ME", "activation": "relu"}, "its experts are swiglu, and here they are relu"),
        ("jamba", {"pattern": "ME", "bias_rate": 0.001}, "which experts.bias_rate moves"),
        ("jamba", {"pattern": "ME", "n_shared_experts": 1}, "it has no shared experts"),
        ("jamba", {"pattern": "MEAE"}, "attention.rotary = False"),
        ("jamba", {"pattern": "MEMMMEMEM", "n_blocks": 1}, "its layers with experts come at even distances"),
        ("gguf", {"pattern": "ME", "expand": 3.0}, "llama.cpp computes expand = 2 alone, and here it is 3"),
        ("gguf", {"pattern": "R"}, "its layers are a mixer"),
        ("onnx", {"pattern": "MEAE"}, "attention's state grows with every token"),
    ],
)
def test_reasons_are_told_before_training_and_at_the_export(to, changes, said, tmp_path, capsys, monkeypatch):
    config = ModelConfig("M", 2, 32).replace(pattern=changes.pop("pattern", "M")).replace(**changes)
    assert any(said in reason for reason in obstacles(config)[to])
    save(tmp_path / "run", MoEMamba(config), ByteTokenizer())
    with pytest.raises(ValueError, match="It can go to "):
        export(tmp_path / "run", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["moemamba", "info", str(tmp_path / "run")])
    cli.main()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"export to {to} "))
    assert said in line


def test_what_balancing_has_left_is_no_loss_unsaid(tmp_path):
    model = build("ME")
    model.layers[1].branches[0].router.balance_bias[0] = 0.1
    save(tmp_path / "run", model, ByteTokenizer())
    with pytest.raises(ValueError, match="this model was balanced by one"):
        export(tmp_path / "run", "jamba", tmp_path / "out")


def test_presets_that_are_exportable():
    portable = [name for name in presets() if name.endswith("-portable")]
    assert {"moe-mamba-tiny-portable", "moe-mamba-small-portable", "moe-mamba-25m-portable"} <= set(portable)
    for name in portable:
        found = obstacles(preset(name))
        assert not found["jamba"] and not found["gguf"] and not found["onnx"], name
        assert preset(name).mamba.inner_norm == "rmsnorm"


def test_periods_and_patterns():
    assert period([False, True, False, True]) == Period(2, 1)
    assert period([True] * 3) == Period(1, 0)
    assert period([True, True, False]) is None
    assert pattern("MEMEME") == ("ME", 3) and pattern("MEA") == ("MEA", 1)


# A step as a graph

STEPS = {
    "ME": build("ME"),
    "R": build("R", routed=RoutedMambaConfig(experts=ExpertsConfig(4, top_k=2))),
    "(ME)F": build("(ME)F", inner="rmsnorm", experts=ExpertsConfig(4, scores="sigmoid", router_bias=True, bias=True)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_model(name):
    model, step = STEPS[name], Step(STEPS[name])
    state, expected = step.empty(2), logits(model)
    with torch.no_grad():
        for place in range(12):
            found, *state = step(TOKENS[:, place], *state)
            torch.testing.assert_close(found, expected[:, place], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_torch_runs_it_without_this_package(name, tmp_path):
    """For any number of rows and any routing, in a process that knows nothing of ours."""
    model = STEPS[name]
    save(tmp_path / "run", model, ByteTokenizer())
    export(tmp_path / "run", "torch", tmp_path / "out")
    torch.save((TOKENS, logits(model)), tmp_path / "expected.pt")
    code = f"""if True:
        import sys, json, torch
        sys.modules["moemamba"] = None
        more = {{"state": ""}}
        step = torch.export.load({str(tmp_path / "out/model.pt2")!r}, extra_files=more).module()
        tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
        for rows in (1, 2):
            state = [torch.zeros(rows, *shape) for shape in json.loads(more["state"]).values()]
            for place in range(20):
                logits, *state = step(tokens[:rows, place], *state)
                assert (logits - expected[:rows, place]).abs().max() <= 2e-6
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_onnx_runtime_writes_the_same_tokens(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = STEPS[name]
    save(tmp_path / "run", model, ByteTokenizer())
    export(tmp_path / "run", "onnx", tmp_path / "out")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = json.loads(session.get_modelmeta().custom_metadata_map["state"])
    names = [given.name for given in session.get_inputs()]
    assert names == ["tokens", *(f"state.{name}" for name in shapes)]
    state = [torch.zeros(2, *shape).numpy() for shape in shapes.values()]
    token, written = TOKENS[:, 0].numpy(), []
    for place in range(9 + 50):
        logits, *state = session.run(None, dict(zip(names, [token, *state], strict=True)))
        written.append(logits.argmax(-1))
        token = TOKENS[:, place + 1].numpy() if place + 1 < 9 else written[-1]
    expected = generate(model, TOKENS[:, :9].tolist(), 50, temperature=0)
    assert [list(row) for row in zip(*written[8:58], strict=True)] == expected


def test_a_graph_needs_no_decision_of_the_host():
    """No size in it depends on values: the routing is gathered."""
    graph = str(program(Step(STEPS["ME"])).graph)
    assert "aten.index.Tensor" in graph and "aten.item" not in graph and "_local_scalar_dense" not in graph


def test_formats_are_those_of_the_command():
    from moemamba.cli.export import Export
    from moemamba.cli.options import options

    choices = next(option for option in options(Export) if option.name == "--to").takes
    assert choices.split() == ["|".join(FORMATS)] or set(choices.strip().split("|")) == set(FORMATS)


def test_an_export_shows_no_bars(tmp_path, capfd):
    pytest.importorskip("transformers")
    save(tmp_path / "run", build("M", 1), ByteTokenizer())
    export(tmp_path / "run", "hf", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
