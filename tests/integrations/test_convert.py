"""Models of other programs: what they compute, ours compute after `convert`, and back out again."""

import json
import sys

import pytest
import torch

from moemamba import ModelConfig, MoEMamba, TrainConfig, cli, generate, load, train
from moemamba.config import MambaConfig
from moemamba.integrations.convert import FORMATS, convert, gather, scatter
from moemamba.tensors import write_tensors
from moemamba.text import ByteTokenizer

transformers = pytest.importorskip("transformers")
VOCABULARY = 270  # more than the tokenizer's, as published models have
TOKENS = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))


def published(folder, kind="Mamba", **keys):
    """A random model of transformers, saved as it saves, with a tokenizer beside."""
    torch.manual_seed(0)
    own = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3}
    config = getattr(transformers, f"{kind}Config")(**{**own, **keys})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits if isinstance(model, MoEMamba) else model(TOKENS, use_cache=False).logits


MODELS = {
    "Mamba": ("Mamba", {}),
    "Mamba untied, other sizes": (
        "Mamba",
        {"tie_word_embeddings": False, "state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7},
    ),
    "Mamba, other biases": ("Mamba", {"use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-3}),
    "Falcon-Mamba": ("FalconMamba", {"mixer_rms_eps": 1e-4, "state_size": 8}),
    "Jamba": (
        "Jamba",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
        },
    ),
    "Jamba without experts": (
        "Jamba",
        {
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "tie_word_embeddings": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_computes_the_same(name, tmp_path):
    kind, keys = MODELS[name]
    theirs = published(tmp_path / "theirs", kind, **keys)
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours, tokenizer = load(tmp_path / "ours")
    expected = logits(theirs)
    assert expected.std() > 0.05 and (logits(ours) - expected).abs().max() <= 2e-6
    assert tokenizer.vocab_size == 257


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again_is_equal(name, tmp_path):
    kind, keys = MODELS[name]
    published(tmp_path / "theirs", kind, **keys)
    found = convert(str(tmp_path / "theirs"), tmp_path / "ours")
    model, _ = load(tmp_path / "ours")
    tensors = scatter(found.format, model.config, model.state_dict())
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(found.format.describe(model.config)))
    write_tensors(out / "model.safetensors", tensors)
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    same = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(logits(again), logits(same))
    back = gather(found.format, model.config, tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.named_parameters())


def of_mamba_ssm(folder, config, wrap=lambda tensors: tensors, **keys):
    """A model of ours as mamba_ssm publishes it: its names, PyTorch's file, no tokenizer."""
    torch.manual_seed(0)
    model = MoEMamba(config).eval()
    folder.mkdir()
    tensors = scatter(FORMATS["mamba_ssm"], config, model.state_dict())
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    own = {"d_model": 32, "n_layer": 2, "vocab_size": 257, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    (folder / "config.json").write_text(
        json.dumps({**own, "fused_add_norm": True, "pad_vocab_size_multiple": 8} | keys)
    )
    torch.save(wrap(tensors), folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (ModelConfig("M", 2, 32, vocab_size=264, tie_embeddings=True), {}),
        (
            ModelConfig("M", 2, 32, vocab_size=264, norm="layernorm", mamba=MambaConfig(8, 3, 1.0, 5)),
            {
                "ssm_cfg": {"d_state": 8, "d_conv": 3, "expand": 1, "dt_rank": 5, "layer": "Mamba1"},
                "rms_norm": False,
                "tie_embeddings": False,
            },
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_form_of_mamba_ssm(config, keys, legacy, tmp_path):
    model = of_mamba_ssm(tmp_path / "theirs", config, **keys)
    file = tmp_path / "theirs" / "pytorch_model.bin"
    if legacy:
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    found = convert(str(file), tmp_path / "ours", tokenizer="bytes")
    assert found.config == config
    assert torch.equal(logits(load(tmp_path / "ours")[0]), logits(model))


class Black(torch.nn.Module):
    """A layer of BlackMamba by itself, as its paper and its code have it: one loop over tokens, no kernel."""

    def __init__(self, d, experts, f, gated, bias):
        super().__init__()
        self.router = torch.nn.Linear(d, experts)
        rows = 2 * f if gated else f
        self.local_experts = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"linear_fc1": torch.nn.Linear(d, rows, bias=bias), "linear_fc2": torch.nn.Linear(f, d, bias=bias)}
            )
            for _ in range(experts)
        )
        self.gated = gated

    def forward(self, x):
        y = torch.empty_like(x)
        for place in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
            token = x[tuple(place)]
            scores = torch.sigmoid(self.router(token))
            expert = self.local_experts[int(scores.argmax())]
            hidden = expert["linear_fc1"](token)
            a, b = hidden.chunk(2) if self.gated else (hidden, 1)
            y[tuple(place)] = expert["linear_fc2"](torch.nn.functional.gelu(a) * b) * scores.max()
        return y


@pytest.mark.parametrize(("gated", "bias", "last"), [(True, False, 8), (False, True, 3)])
def test_blackmamba(gated, bias, last, tmp_path):
    """Its Mamba layers are those of transformers' Mamba; its experts are the ones above; LayerNorm before the head."""
    torch.manual_seed(0)
    d, layers = 32, ["r", "8", "r", f"{last}"]
    keys = {"vocab_size": 257, "hidden_size": d, "num_hidden_layers": 2, "use_bias": bias}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**keys)).eval()
    experts = [Black(d, count, 24, gated, bias).eval() for count in (8, last)]
    norms = [torch.nn.RMSNorm(d, 1e-5) for _ in layers]
    final, head_bias = torch.nn.LayerNorm(d, 1e-5), torch.randn(257) * bias
    with torch.no_grad():
        for norm in (*norms, final):
            norm.weight.uniform_(0.5, 1.5)
        final.bias.normal_()
        x = mamba.backbone.embeddings(TOKENS)
        for number, norm in enumerate(norms):
            layer = mamba.backbone.layers[number // 2].mixer if number % 2 == 0 else experts[number // 2]
            x = x + layer(norm(x))
        expected = final(x) @ mamba.backbone.embeddings.weight.T + head_bias
    tensors = {"embedding.word_embeddings.weight": mamba.backbone.embeddings.weight}
    for number, norm in enumerate(norms):
        layer = mamba.backbone.layers[number // 2].mixer if number % 2 == 0 else experts[number // 2]
        tensors[f"decoder.layers.{number}.norm.weight"] = norm.weight
        tensors |= {f"decoder.layers.{number}.mixer.{name}": value for name, value in layer.state_dict().items()}
    tensors |= {f"decoder.final_layernorm.{name}": value for name, value in final.state_dict().items()}
    if bias:
        tensors["output_layer.bias"] = head_bias
    (tmp_path / "theirs").mkdir()
    torch.save({"model": {k: v.detach() for k, v in tensors.items()}, "step": 3}, tmp_path / "theirs/pytorch_model.bin")
    own = {"num_layers": 4, "hidden_size": d, "state_size": 16, "conv_dimension": 4, "vocab_size": 257}
    own |= {"expansion_factor": 2, "mamba_moe_layers": layers, "ffn_hidden_size": 24, "add_bias_linear": bias}
    own |= {"swiglu": gated, "max_sequence_length": 2048}
    (tmp_path / "theirs/config.json").write_text(json.dumps(own))
    convert(str(tmp_path / "theirs"), tmp_path / "ours", tokenizer="bytes")
    ours, _ = load(tmp_path / "ours")
    assert (ours.config.pattern, ours.config.n_blocks) == ("ME", 2)
    assert ours.config.experts.n_experts == (8 if last == 8 else (8, 3))
    assert expected.std() > 0.05 and (logits(ours) - expected).abs().max() <= 2e-6 * max(1, expected.abs().max())
    own["mamba_moe_layers"] = ["r8", "8", "r", "8"]
    (tmp_path / "theirs/config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="both in one layer cannot be converted"):
        convert(str(tmp_path / "theirs"), tmp_path / "again", tokenizer="bytes")


def test_parts_and_half_precision(tmp_path):
    """An index with several files; the numbers stay in the dtype that they have."""
    theirs = published(tmp_path / "theirs").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    found = convert(str(tmp_path / "parts"), tmp_path / "ours", tokenizer=str(tmp_path / "theirs"))
    assert found.dtype == "bfloat16"
    ours, _ = load(tmp_path / "ours")
    assert torch.equal(ours.embedding.weight, theirs.backbone.embeddings.weight.float())
    next((tmp_path / "parts").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"is missing, one of the \d+ parts"):
        convert(str(tmp_path / "parts"), tmp_path / "again", tokenizer="bytes")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../theirs/model.safetensors"}}')
    with pytest.raises(ValueError, match="no file beside it"):
        convert(str(tmp_path / "parts"), tmp_path / "again", tokenizer="bytes")


def test_what_comes_out_is_a_model_as_any(tmp_path, capsys, monkeypatch):
    """It generates as theirs does, and training goes on with it, rows of the embedding without a token included."""
    theirs = published(tmp_path / "theirs")
    monkeypatch.setattr(sys, "argv", ["moemamba", "convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    cli.main()
    assert "transformers' Mamba, 32 tensors, float32" in capsys.readouterr().out
    ours, _ = load(tmp_path / "ours")
    prompt = TOKENS[:1, :9]
    found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert generate(ours, prompt.tolist(), 12, temperature=0)[0] == found[0, 9:].tolist()
    (tmp_path / "text.txt").write_text("once upon a time there was\n\n" * 400)
    config = TrainConfig(
        ours.config,
        str(tmp_path / "text.txt"),
        run=str(tmp_path / "run"),
        start=str(tmp_path / "ours"),
        steps=2,
        batch_size=2,
        context=16,
        learning_rate=1e-12,
        tokenizer=str(tmp_path / "ours"),
    )
    assert train(config, stop=1).model.config.vocab_size == VOCABULARY
    again = train(config, resume=True)
    torch.testing.assert_close(logits(again.model), logits(ours), rtol=0, atol=1e-5)


def test_more_than_one_cached_token_goes_on_where_transformers_restarts(tmp_path):
    """Its Mamba begins the scan anew in such a call; ours computes what the whole sequence has."""
    theirs = published(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    ours, expected = load(tmp_path / "ours")[0], logits(theirs)
    with torch.no_grad():
        first = ours(TOKENS[:, :20])
        torch.testing.assert_close(ours(TOKENS[:, 20:], first.state).logits, expected[:, 20:], rtol=1e-5, atol=1e-5)
        out = theirs(TOKENS[:, :20], use_cache=True)
        name = next(name for name in ("cache", "cache_params") if name in out)  # the first from 5.24 on
        restarted = theirs(TOKENS[:, 20:], **{name: out[name]}, use_cache=True).logits
    if (restarted - expected[:, 20:]).abs().max() < 1e-3:
        pytest.skip("this version of transformers goes on as it should")


def change(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_bias": True}, "backbone.layers.0.mixer.in_proj.bias is missing"),
        ({"use_conv_bias": False}, "'backbone.layers.0.mixer.conv1d.bias' is not of it"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": "32"}, "hidden_size is '32'; expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True; expected a whole number"),
        ({"hidden_size": 0}, "d_model is 0; it must be greater than 0"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers, and the weights only 32 tensors"),
        ({"state_size": 1 << 62}, "has tensors larger than there can be"),
        ({"conv_kernel": 1 << 62}, "has tensors larger than there can be"),
        ({"num_hidden_layers": 2}, "'backbone.layers.2.mixer.A_log' is not of it"),
        ({"num_hidden_layers": 3, "state_size": 15}, "expected numbers for layers.0.branches.0.x_proj.weight"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"vocab_size": 256}, "the tokenizer has 257 tokens, more than the 256"),
        ({"model_type": "llama"}, "is of the model_type 'llama', which cannot be converted; known are mamba"),
        ({"model_type": None}, "names no model_type, and cannot be converted"),
        ({"pattern": "M"}, "is one of ours already"),
    ],
)
def test_what_does_not_fit_is_named(keys, said, tmp_path, monkeypatch, capsys):
    published(tmp_path / "theirs")
    change(tmp_path / "theirs", **keys)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["moemamba", "convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    errors = capsys.readouterr().err
    assert left.value.code == 2 and said in errors and errors.count("\n") == 1
    assert not (tmp_path / "ours").exists()


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    config = ModelConfig("M", 2, 32, vocab_size=264, tie_embeddings=True)
    of_mamba_ssm(tmp_path / "theirs", config, lambda tensors: tensors | {"more": Harm()})
    with pytest.raises(ValueError, match="no file of tensors alone"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours", tokenizer="bytes")
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a file of tensors", b"\x80\x02."])
def test_damaged_weights(content, tmp_path):
    of_mamba_ssm(tmp_path / "theirs", ModelConfig("M", 2, 32, vocab_size=264, tie_embeddings=True))
    (tmp_path / "theirs" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours", tokenizer="bytes")


ODD = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "without numbers": lambda x: x.to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "larger than the file": lambda x: torch.ones(1).expand(1 << 40),
    "tensors alone": lambda x: torch.nn.Linear(2, 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("said", ODD)
def test_odd_tensors(said, tmp_path, recwarn):
    config = ModelConfig("M", 2, 32, vocab_size=264, tie_embeddings=True)
    change = {"backbone.norm_f.weight": ODD[said](torch.ones(32))}
    of_mamba_ssm(tmp_path / "theirs", config, lambda tensors: tensors | change)
    recwarn.clear()
    with pytest.raises(ValueError, match=said):
        convert(str(tmp_path / "theirs"), tmp_path / "ours", tokenizer="bytes")
    assert not recwarn and not (tmp_path / "ours").exists()


def test_more_experts_than_tensors(tmp_path):
    published(tmp_path / "theirs", *MODELS["Jamba"][:1], **MODELS["Jamba"][1])
    change(tmp_path / "theirs", num_experts=10**9)
    with pytest.raises(ValueError, match=r"the model has 2,000,000,000 experts, and the weights only 83 tensors"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")


def test_weights_that_contradict_each_other(tmp_path):
    config = ModelConfig("M", 2, 32, vocab_size=264, tie_embeddings=True)
    of_mamba_ssm(tmp_path / "a", config, lambda tensors: tensors | {"lm_head.weight": torch.zeros(264, 32)})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from backbone\.embedding\.weight"):
        convert(str(tmp_path / "a"), tmp_path / "ours", tokenizer="bytes")
    of_mamba_ssm(
        tmp_path / "b", config, lambda tensors: tensors | {"backbone.norm_f.weight": torch.full((32,), torch.inf)}
    )
    with pytest.raises(ValueError, match=r"not finite \(norm\.weight\)"):
        convert(str(tmp_path / "b"), tmp_path / "ours", tokenizer="bytes")
    of_mamba_ssm(tmp_path / "c", config)
    with pytest.raises(ValueError, match=r"no tokenizer lies in .*gpt-neox-20b"):
        convert(str(tmp_path / "c"), tmp_path / "ours")
    with pytest.raises(ValueError, match="there is nothing at"):
        convert(str(tmp_path / "nowhere"), tmp_path / "ours")


def test_a_chat_template_comes_along(tmp_path):
    published(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert (tmp_path / "ours" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    ("error", "offline", "said"),
    [
        ("LocalEntryNotFoundError", False, "there is no way to it through the network, and no copy is on this machine"),
        ("LocalEntryNotFoundError", True, "HF_HUB_OFFLINE forbids it, and no copy is on this machine"),
        ("GatedRepoError", False, "only for those whom its owner admits; ask for it at huggingface.co/a/b"),
        ("RepositoryNotFoundError", False, "shows no model a/b; check the name"),
        ("HfHubHTTPError", False, "cannot be fetched from the Hugging Face hub: HfHubHTTPError"),
    ],
)
def test_the_hub_fails_in_a_sentence(error, offline, said, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(hub.errors, error)

    def fail(*args, **kwargs):
        raise kind.__new__(kind, "words of theirs\nand more")  # made without a response, it says nothing

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises((OSError, ValueError), match=said) as raised:
        convert("hf:a/b", tmp_path / "ours")
    assert "\n" not in str(raised.value)


def test_a_name_that_no_model_of_the_hub_has(tmp_path):
    pytest.importorskip("huggingface_hub")
    for name in ("a/b/c", "x y/z", ""):
        with pytest.raises(ValueError, match="names no model of the Hugging Face hub; write hf:OWNER/NAME"):
            convert(f"hf:{name}", tmp_path / "ours")
