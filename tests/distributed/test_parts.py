"""A sequence on several processes is the sequence on one: outputs, states, losses and every gradient."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from groups import enter, start

from moemamba import ModelConfig, MoEMamba, State
from moemamba.config import AttentionConfig, ExpertsConfig, MambaConfig, RoutedMambaConfig
from moemamba.data.batches import Tokens
from moemamba.distributed import Processes, split_sequences
from moemamba.layers import parts as passing
from moemamba.layers.parts import Parts
from moemamba.training.evaluate import evaluate

FEW = ExpertsConfig(4, top_k=2, capacity_factor=0.6)
CONFIG = ModelConfig(
    "ME", 2, 16, vocab_size=50, mamba=MambaConfig(d_state=4), experts=FEW, attention=AttentionConfig(n_heads=2)
)
ROWS, LENGTH = 2, 12
PACKED = torch.tensor([[0] * 5 + [1] * 7, [3] * 3 + [4] * 3 + [5] * 6])
PADDED = torch.tensor([[0] * 4 + [-1] * 8, [-1] * 7 + [2] * 5])
MIXED = torch.tensor([[0] * 4 + [-1] * 4 + [0] * 4, [1] * 2 + [-1] + [2] * 9])
CASES = {
    "mamba": (CONFIG.replace(pattern="MF"), None, {}),
    "experts": (CONFIG, None, {}),
    "groups": (CONFIG, None, {"groups": 2}),
    "dropless": (CONFIG.replace(experts=dataclasses.replace(FEW, capacity_factor=None)), None, {}),
    "attention": (CONFIG.replace(pattern="AEM"), None, {}),
    "routed": (CONFIG.replace(pattern="RE", routed=RoutedMambaConfig(experts=FEW)), None, {}),
    "parallel": (CONFIG.replace(pattern="(MAE)F"), None, {}),
    "packed": (CONFIG.replace(pattern="MEA"), PACKED, {}),
    "padded": (CONFIG.replace(pattern="MEA"), PADDED, {}),
    "mixed": (CONFIG.replace(pattern="MEA"), MIXED, {}),
    "recomputed": (CONFIG.replace(pattern="MEA"), PACKED, {"recompute": True}),
    "continued": (CONFIG.replace(pattern="MEA"), None, {"continued": True}),
    "continued-packed": (CONFIG.replace(pattern="MEA"), PACKED, {"continued": True}),
}


def model_of(name):
    config, seq_idx, change = CASES[name]
    torch.manual_seed(1)
    model = MoEMamba(config).double()
    model.recompute = change.get("recompute", False)
    for module in model.modules():
        if hasattr(module, "across"):
            module.groups = change.get("groups", 1)
    generator = torch.Generator().manual_seed(2)
    tokens, targets, earlier = torch.randint(50, (3, ROWS, LENGTH), generator=generator)
    targets = torch.where(targets % 5 == 0, -100, targets)
    if seq_idx is not None:
        targets = torch.where(seq_idx < 0, -100, targets)
    state = None
    if change.get("continued"):
        with torch.no_grad():
            state = model(earlier[:, :3]).state
    return model.train(), tokens, targets, seq_idx, state


def found(model, out, share, parts):
    """What a process has to show for its part."""
    (out.loss * share + out.auxiliary / parts).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return out.loss.detach() * share, out.auxiliary.detach(), gradients, [stats.load for stats in out.router]


def part_of(rank, size, folder):
    """Two steps, the first of which agrees on what is sent; then the logits."""
    enter(rank, size, folder / f"store-{size}")
    results = {}
    for name in CASES:
        parts = Parts()
        own = slice(rank * LENGTH // size, (rank + 1) * LENGTH // size)
        for _ in range(2):
            model, tokens, targets, seq_idx, state = model_of(name)
            marks = None if seq_idx is None else seq_idx[:, own]
            with split_sequences(model, parts):
                out = model(tokens[:, own], state, marks, targets[:, own])
                share = (targets[:, own] != -100).sum().double() / (targets != -100).sum()
                language, *rest = found(model, out, share, size)
                model.eval()
                with torch.no_grad():
                    logits = model(tokens[:, own], state, marks).logits
        results[name] = (language.nan_to_num(0), *rest, logits, out.state.detach())
    seen = watch_lengths(model)
    processes = Processes(torch.device("cpu"), rank, size, distributed=True)
    results["evaluated"] = [*evaluated(model, processes, Parts()), max(seen)]
    torch.save(results, folder / f"{size}-{rank}.pt")
    dist.destroy_process_group()


def watch_lengths(model):
    """Of the rows that a model is given."""
    seen = []
    model.embedding.register_forward_hook(lambda module, given, made: seen.append(made.shape[1]))
    return seen


def evaluated(model, processes=None, sequence=None):
    """A text of six windows and a tail that neither two nor three processes divide, in batches that are no multiple,
    with the state reset and without."""
    ids = torch.randint(50, (6 * LENGTH + 8,), generator=torch.Generator().manual_seed(3)).numpy()
    text = Tokens(ids, np.array([17, 30, len(ids)]), bytes=200)
    how = {"context": LENGTH, "batch_size": 4, "drop_gap": True, "blocks": 3, "processes": processes}
    return [evaluate(model, text, **how, reset_state=reset, sequence=sequence) for reset in (False, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for size in (2, 3):
        start(size, part_of, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole(name, size, folder):
    model, tokens, targets, seq_idx, state = model_of(name)
    out = model(tokens, state, seq_idx, targets)
    language, auxiliary, gradients, loads = found(model, out, torch.ones((), dtype=torch.float64), 1)
    logits = model.eval()(tokens, state, seq_idx).logits.detach()
    each = [torch.load(folder / f"{size}-{rank}.pt", weights_only=False)[name] for rank in range(size)]
    close = {"atol": 1e-12, "rtol": 1e-9}
    torch.testing.assert_close(sum(part[0] for part in each), language, **close)
    torch.testing.assert_close(sum(part[1] for part in each) / size, auxiliary, **close)
    for parameter, expected in gradients.items():
        theirs = [part[2][parameter] for part in each if part[2][parameter] is not None]
        torch.testing.assert_close(sum(theirs), expected, **close, msg=lambda text, name=parameter: f"{name}: {text}")
    for number, expected in enumerate(loads):
        torch.testing.assert_close(sum(part[3][number] for part in each), expected, **close)
    torch.testing.assert_close(torch.cat([part[4] for part in each], 1), logits, **close)
    left: State = each[-1][5]
    for mine, theirs in zip(out.state.mixers, left.mixers, strict=True):
        for field, tensor in zip(mine._fields, mine, strict=True):
            if field in ("conv", "ssm", "positions"):
                torch.testing.assert_close(getattr(theirs, field), tensor.detach(), **close)


def refused(rank, size, folder):
    enter(rank, size, folder / "store-refused")
    model = MoEMamba(CONFIG)
    said = "2 rows of 3 tokens, without seq_idx and 2 rows of 4 tokens"
    with pytest.raises(ValueError, match=said), split_sequences(model):
        model(torch.zeros(2, 3 + rank, dtype=torch.int64))
    assert model.parts is None and all(getattr(module, "parts", None) is None for module in model.modules())
    model.layers[3].branches[0].router = model.layers[1].branches[0].router
    with pytest.raises(ValueError, match="serves other layers too, and has a capacity"), split_sequences(model):
        pass
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_is_refused(tmp_path):
    start(2, refused, tmp_path)


def changing(rank, size, folder):
    """Calls that send other tensors than the one before: of a state that the first part alone is given, and of
    parameters that are frozen for a while."""
    enter(rank, size, folder / "store-changing")
    torch.manual_seed(0)
    model = MoEMamba(CONFIG.replace(pattern="MEA", n_blocks=1)).double().eval()
    tokens = torch.randint(50, (ROWS, 6 + 4 * size))
    own = slice(6 + 4 * rank, 10 + 4 * rank)
    passing.KEPT = 3  # so that some are forgotten, too
    with split_sequences(model, Parts()) as parts:
        for first in (6, 0, 3, 6, *range(6), 6):
            model.parts = None
            with torch.no_grad():
                state = model(tokens[:, first:6]).state if first < 6 else None
                whole = model(tokens[:, first:]).logits[:, own.start - first : own.stop - first]
                model.parts = parts
                torch.testing.assert_close(model(tokens[:, own], state if rank == 0 else None).logits, whole)
        for trained in (model, model.head, model):
            model.requires_grad_(False)
            trained.requires_grad_(True)
            model.zero_grad()
            model(tokens[:, own]).logits.sum().backward()
            assert all((p.grad is not None) == p.requires_grad for p in model.head.parameters())
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_is_sent_changes(tmp_path):
    start(3, changing, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_each_evaluates_its_part(size, folder):
    """Of every window, as of training: none reads a whole one, and all have the figures of one process."""
    expected = evaluated(model_of(list(CASES)[-1])[0])
    assert expected[0].drop_gap and expected[0] != expected[1]
    for rank in range(size):
        *found, longest = torch.load(folder / f"{size}-{rank}.pt", weights_only=False)["evaluated"]
        assert longest == LENGTH // size
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.tokens == theirs.tokens == 6 * LENGTH + 7
            for name in ("loss", "accuracy", "drop_gap", "bits_per_byte", "standard_error"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6, abs=1e-6), name
            assert np.array(ours.blocks) == pytest.approx(np.array(theirs.blocks), rel=1e-6)
