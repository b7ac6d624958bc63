"""Models with weights of 8 bits: which weights, saving and loading, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from models import MODELS

from moemamba import MoEMamba, generate, load, save
from moemamba.checkpoint import CheckpointError, Damaged
from moemamba.cli import main
from moemamba.finetuning import lora, surgery
from moemamba.finetuning.upcycling import upcycle
from moemamba.integrations.export import export
from moemamba.layers.plain import reasons
from moemamba.layers.quantised import quantise, quantised
from moemamba.tensors import TensorFile
from moemamba.text import ByteTokenizer
from moemamba.training.update.optim import make_optimizer

VOCABULARY = 257


def build(name="(ME)", **changes):
    torch.manual_seed(3)
    return MoEMamba(replace(MODELS[name], vocab_size=VOCABULARY, **changes)).eval()


def of_8_bits(name, **changes):
    model = build(name, **changes)
    quantise(model)
    return model


@pytest.fixture
def folders(tmp_path):
    """The same model in float32 and in 8 bits."""
    save(tmp_path / "float", build(), ByteTokenizer())
    save(tmp_path / "int8", load(tmp_path / "float", weights="int8")[0], ByteTokenizer())
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_matrices_that_products_read_and_no_others(name):
    model, before = of_8_bits(name), dict(build(name).named_parameters())
    found = {name for name, tensor in model.named_buffers() if tensor.dtype == torch.int8}
    assert found and quantised(model)
    assert not any(part in place for place in found for part in ("embedding", "norm", "conv1d", "dt_proj", "router"))
    assert "head.weight" in found and all(before[place].ndim >= 2 for place in found)
    assert before.keys() == found | dict(model.named_parameters()).keys()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert reasons(model) == reasons(build(name))  # it is what its classes built
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    assert model(tokens).logits.isfinite().all() and model(tokens, targets=tokens).loss.isfinite()


def test_a_head_that_is_the_embedding_stays_as_it_is():
    model = of_8_bits("(ME)", tie_embeddings=True)
    assert model.head.weight is model.embedding.weight and model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_of_the_rounded_weights(name):
    """Up to rounding; the router may choose another expert where two are close, so few tokens and wide margins."""
    model, dense = of_8_bits(name), build(name)
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for place, parameter in dense.named_parameters():
            if f"{place}_scale" in buffers:
                parameter.copy_(buffers[place].float() * buffers[f"{place}_scale"][..., None])
    tokens = torch.randint(0, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, expected = model(tokens).logits, dense(tokens).logits
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_saved_and_loaded(folders):
    whole, small = ((folders / kind / "model.safetensors").stat().st_size for kind in ("float", "int8"))
    assert small < 0.5 * whole
    stored = TensorFile(folders / "int8" / "model.safetensors")
    assert stored.metadata["weights"] == "int8" and stored["head.weight"].dtype == torch.int8
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    ways = [load(folders / "int8")[0], load(folders / "int8", weights="int8")[0]]
    with torch.inference_mode():
        expected = load(folders / "float", weights="int8")[0](tokens).logits
        for model in ways:
            assert torch.equal(model(tokens).logits, expected)
    assert generate(ways[0], [1, 2, 3], 8, temperature=0) == generate(ways[1], [1, 2, 3], 8, temperature=0)
    into = load(folders / "int8", into=build())[0]
    assert quantised(into) and torch.equal(into(tokens).logits, ways[0](tokens).logits)


def test_in_another_dtype(folders):
    for run, how in (("int8", None), ("float", "int8")):
        model = load(folders / run, dtype=torch.bfloat16, weights=how)[0]
        assert model.embedding.weight.dtype == torch.bfloat16
        scales = [tensor for name, tensor in model.named_buffers() if name.endswith("_scale")]
        assert scales and all(scale.dtype == torch.float32 for scale in scales)
        with torch.inference_mode():
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_damaged_files_are_told(folders):
    file = folders / "int8" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(Damaged):
        load(folders / "int8")
    file.write_bytes(whole.replace(b'"weights": "int8"', b'"weights": "int9"'))
    with pytest.raises(CheckpointError):
        load(folders / "int8")


def test_what_needs_full_weights_is_refused(folders, tmp_path):
    model, text = of_8_bits("(ME)"), folders / "text"
    text.write_text("some words of a text\n" * 50)
    with pytest.raises(ValueError, match="8 bits"):
        make_optimizer(model)
    with pytest.raises(ValueError, match="8 bits"):
        lora.attach(model, 2)
    with pytest.raises(ValueError, match="8 bits"):
        surgery.average([build(), model])
    with pytest.raises(ValueError, match="8 bits"):
        upcycle(folders / "int8", tmp_path / "up", 4)
    with pytest.raises(ValueError, match="8 bits"):
        export(folders / "int8", "torch", tmp_path / "out")
    with pytest.raises(ValueError, match="weights"):
        load(folders / "float", weights="int4")
    assert not (tmp_path / "up").exists() and not (tmp_path / "out").exists()


def test_transformers_refuses_it(folders):
    pytest.importorskip("transformers")
    from moemamba.integrations.transformers import MoEMambaForCausalLM

    with pytest.raises(CheckpointError, match="8 bits"):
        MoEMambaForCausalLM.from_pretrained(folders / "int8")


def test_commands(folders, capsys, monkeypatch):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["moemamba", *words])
        main()
        return capsys.readouterr().out

    text = folders / "text.txt"
    text.write_text("some words of a text\n" * 50)
    more = {"float": ["--weights", "int8"], "int8": []}
    written = ("--prompt", "a", "--max-new-tokens", "5", "--temperature", "0", "--device", "cpu")
    found = [call("generate", str(folders / run), *written, *own) for run, own in more.items()]
    measured = ("--data", str(text), "--context", "32", "--json", "--device", "cpu")
    found += [call("eval", str(folders / run), *measured, *own) for run, own in more.items()]
    assert found[0] == found[1] != "" and found[2] == found[3]
    stored = json.loads(call("info", str(folders / "int8"), "--json"))["bytes"]["stored"]
    assert stored["int8"] > stored["float32"] > 0
    assert "int8" in call("info", str(folders / "int8")) and "int8" not in call("info", str(folders / "float"))


def test_a_model_that_is_not_loaded_stays_as_it_is(folders):
    """One that `load(into=...)` or `quantise` refuses has its weights, in float32, and can be trained."""

    def untouched(model):
        found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        expected = dict(build().named_parameters())
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    spread, damaged, other = build(), build(), MoEMamba(replace(build().config, d_model=8))
    spread.layers[0].branches[1].experts.group = object()
    with pytest.raises(ValueError, match="spread over several processes"):
        quantise(spread)
    with pytest.raises(CheckpointError, match="of another model"):
        load(folders / "int8", into=other)
    file = folders / "int8" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(Damaged):
        load(folders / "int8", into=damaged)
    assert untouched(spread) and untouched(damaged)
    assert not quantised(other) and all(parameter.requires_grad for parameter in other.parameters())
