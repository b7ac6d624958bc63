"""Looking inside a model: what is seen is what was computed, and nobody notices."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import MODELS, build, tokens_of

import moemamba as mm
from moemamba import cli, layers, look, save
from moemamba.layers.mamba import SelectiveSSM
from moemamba.text import ByteTokenizer


@pytest.mark.parametrize("name", ["(ME)", "R shared", "R independent", "mixed", "A"])
def test_what_is_seen_is_what_was_computed(name):
    model, tokens = build(name), tokens_of(2)
    seq_idx = torch.tensor([[0] * 7 + [1] * 5, [0] * 9 + [-1] * 3])
    for given in (None, seq_idx):
        plain = model(tokens, seq_idx=given)
        seen = look(model, tokens, seq_idx=given, selection=True)
        assert torch.equal(seen.output.logits, plain.logits)
        assert len(seen.hidden) == len(model.layers) + 1
        logits = model.head(model.norm(seen.hidden[-1]))
        torch.testing.assert_close(logits, plain.logits)
        assert tuple(seen.experts) == model.router_names == tuple(seen.gates)
        for router, stats in zip(seen.experts.values(), plain.router, strict=True):
            experts = len(stats.load)
            load = torch.bincount(router[router < experts], minlength=experts)
            assert router.shape[:2] == (2, 12) and torch.equal(load, stats.load.long())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["M", "R shared"])
@pytest.mark.parametrize("continued", [False, True])
def test_selection_makes_the_output(name, continued):
    model, tokens = build(name, torch.float64), tokens_of(2)
    state = model(tokens_of(2, 5)).state if continued else None
    seq_idx = torch.tensor([[0] * 7 + [1] * 5, [0] * 9 + [-1] * 3])
    seen = look(model, tokens, state, seq_idx, states=True)
    assert list(seen.selection) == [n for n, module in model.named_modules() if isinstance(module, SelectiveSSM)]
    for number, found in enumerate(seen.selection.values()):
        valid = seq_idx >= 0
        assert found.states.shape == (2, 12, 32, 16)
        last = torch.stack([found.states[0, 11], found.states[1, 8]])
        torch.testing.assert_close(last.double(), seen.output.state.mixers[number].ssm.double(), rtol=1e-4, atol=1e-5)
        assert (found.dt[valid] > 0).all() and found.B.shape == found.C.shape == (2, 12, 16)


def test_gradients_reach_what_is_seen():
    model = build("(ME)")
    seen = look(model, tokens_of(1), selection=True)
    seen.hidden[1].sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    torch.manual_seed(0)
    for name in ("(ME)", "M"):
        config = dataclasses.replace(MODELS[name].replace(d_model=8), n_blocks=1)
        save(folder / name, mm.MoEMamba(config), ByteTokenizer())
    return folder


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moemamba", "look", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return left.code, capsys.readouterr()
    return 0, capsys.readouterr()


def test_the_command(saved, tmp_path, monkeypatch, capsys):
    page = tmp_path / "look.html"
    text = "def <b>f</b>():\n    return 1"
    status, said = call(monkeypatch, capsys, saved / "(ME)", "--text", text, "--out", page, "--device", "cpu")
    assert status == 0 and "layers.0.branches.1" in said.out and "Mamba layer" in said.out
    assert page.read_text().count("<span") == len(text.encode()) and "<b>" not in page.read_text()
    _, said = call(monkeypatch, capsys, saved / "(ME)", "--text", text, "--json", "--device", "cpu")
    found = json.loads(said.out)
    assert found["tokens"] == list(text.encode()) and len(found["experts"]["layers.0.branches.1"]) == len(text)
    assert set(found) == {"tokens", "text", "experts", "gates", "dt", "norm"}
    (tmp_path / "file.txt").write_text("some text")
    status, said = call(monkeypatch, capsys, saved / "M", "--file", tmp_path / "file.txt", "--device", "cpu")
    assert status == 0 and "no routers" in said.out
    for wrong in ((), ("--text", ""), ("--text", "a", "--file", "b")):
        status, said = call(monkeypatch, capsys, saved / "M", *wrong)
        assert status == 2 and said.err.count("\n") == 1 and "text" in said.err
    assert layers.Choice


def test_threads_that_look_do_not_see_each_other():
    model = build("mixed", torch.float32)
    given = [torch.randint(0, 31, (1, 5 + 7 * number)) for number in range(3)]
    alone = [look(model, tokens, selection=True) for tokens in given]

    def again(number):
        for _ in range(8):
            model(given[number - 1])
            seen = look(model, given[number], selection=True)
            assert all(torch.equal(*pair) for pair in zip(seen.hidden, alone[number].hidden, strict=True))
            for name, own in alone[number].selection.items():
                assert all(torch.equal(*pair) for pair in zip(seen.selection[name][:3], own[:3], strict=True))
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(again, range(3)))
    assert not any(module._forward_hooks for module in model.modules())
