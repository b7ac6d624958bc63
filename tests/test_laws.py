"""The laws of the design that hold for every letter of the pattern and every backend, outputs and gradients."""

import pytest
import torch
from models import BACKENDS, LENGTH, MIXING, MODELS, ROUTING, build, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from moemamba import State, ops


def whole(model, tokens):
    return model(tokens).logits


def split_everywhere(model, tokens):
    """The mean over all places to cut at, so that one backward pass covers them all."""
    outputs = []
    for cut in range(1, LENGTH):
        first = model(tokens[:, :cut])
        second = model(tokens[:, cut:], first.state)
        outputs.append(torch.cat([first.logits, second.logits], dim=1))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])
    return sum(outputs) / len(outputs)


def one_token_at_a_time(model, tokens):
    state, outputs = None, []
    for t in range(tokens.shape[1]):
        out = model(tokens[:, t : t + 1], state)
        state = out.state
        outputs.append(out.logits)
    return torch.cat(outputs, dim=1)


def packed(model, tokens):
    """All sequences in one row, behind a stranger; what follows continues the last of them."""
    rows, length = len(tokens), LENGTH
    stranger = tokens_of(1, 5)
    row = torch.cat([stranger, tokens[:, :length].reshape(1, -1)], dim=1)
    seq_idx = torch.cat([torch.full((5,), 9), torch.arange(rows).repeat_interleave(length)])[None].int()
    out = model(row, seq_idx=seq_idx)
    logits = out.logits[:, 5:].reshape(rows, length, -1)
    probes = [model(tokens[:-1], seq_idx=None).logits[:, length:]]
    probes.append(model(tokens[-1:, length:], out.state).logits)
    return torch.cat([logits, torch.cat(probes)], dim=1)


def padded(model, tokens, before, after):
    """Rows of different lengths in one batch, with other tokens as padding; then each row goes on from its state."""
    outputs, width = [], LENGTH + max(before) + max(after)
    batch, seq_idx = tokens_of(len(tokens), width), torch.full((len(tokens), width), -1)
    for i, (left, row) in enumerate(zip(before, tokens, strict=True)):
        batch[i, left : left + LENGTH] = row[:LENGTH]
        seq_idx[i, left : left + LENGTH] = i
    out = model(batch, seq_idx=seq_idx)
    outputs = torch.stack([out.logits[i, left : left + LENGTH] for i, left in enumerate(before)])
    return torch.cat([outputs, model(tokens[:, LENGTH:], out.state).logits], dim=1)


def left_padded(model, tokens):
    return padded(model, tokens, before=(3, 0, 1), after=(0, 3, 2))


def right_padded(model, tokens):
    return padded(model, tokens, before=(0, 0, 0), after=(4, 0, 1))


def padded_inside(model, tokens):
    """Padding between the tokens of a sequence."""
    gaps = torch.tensor([0, 1, 2, 4, 5, 8, 9, 10, 12])
    batch, seq_idx = tokens_of(len(tokens), 14), torch.full((len(tokens), 14), -1)
    batch[:, gaps], seq_idx[:, gaps] = tokens[:, :LENGTH], 2
    out = model(batch, seq_idx=seq_idx)
    return torch.cat([out.logits[:, gaps], model(tokens[:, LENGTH:], out.state).logits], dim=1)


def forked_and_selected(model, tokens):
    """Rows shuffled, doubled and picked again half-way."""
    first = model(tokens[[2, 0, 1], :4])
    state = first.state.fork(2).select([2, 4, 1])
    empty = model(tokens[:, :0], state)  # no token at all changes nothing
    second = model(tokens[:, 4:], empty.state)
    return torch.cat([first.logits[[1, 2, 0]], second.logits], dim=1)


CUTS = [
    split_everywhere,
    one_token_at_a_time,
    packed,
    left_padded,
    right_padded,
    padded_inside,
    forked_and_selected,
]


def results(model, run, tokens):
    """Outputs, and the gradient of a fixed weighing of them for every parameter."""
    outputs = run(model, tokens)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model.zero_grad()
    (outputs * weights).sum().backward()
    return {"outputs": outputs.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_same(actual, expected, dtype):
    for name, value in expected.items():
        exact = {"rtol": 1e-7, "atol": 1e-9}
        scale = value.abs().max().item() if value is not None and value.numel() else 0.0
        rounding = exact if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5 * max(scale, 1.0)}
        torch.testing.assert_close(actual[name], value, **rounding, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_one_function_however_it_is_cut(name, backend, dtype):
    model, tokens = build(name, dtype), tokens_of(3)
    with ops.backend("reference"):
        expected = results(model, whole, tokens)
    with ops.backend(backend):
        for run in (whole, *CUTS):
            try:
                assert_same(results(model, run, tokens), expected, dtype)
            except AssertionError as error:
                raise AssertionError(f"{run.__name__}: {error}") from None


@pytest.mark.parametrize("name", MIXING)
def test_resumed_from_a_saved_state(name, tmp_path):
    model, tokens = build(name), tokens_of(3)
    with torch.no_grad():
        expected = model(tokens).logits
        model(tokens[:, :4]).state.save(tmp_path / "state.safetensors")
        state = State.load(tmp_path / "state.safetensors")
        torch.testing.assert_close(model(tokens[:, 4:], state).logits, expected[:, 4:])
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("name", MIXING)
def test_gradients_flow_through_states(name):
    """What follows reaches back into what came before, and `detach` stops it."""
    model, tokens = build(name), tokens_of(2)
    for cut, reaches in ((lambda s: s, True), (State.detach, False)):
        embedded = model.embedding(tokens[:, :4]).detach().requires_grad_()
        handle = model.embedding.register_forward_hook(lambda *_, e=embedded: e)
        state = cut(model(tokens[:, :4]).state)
        handle.remove()
        loss = model(tokens[:, 4:], state).logits.square().sum()
        grad = torch.autograd.grad(loss, embedded, allow_unused=True)[0]
        assert (grad is not None and bool(grad[:, 0].abs().max() > 0)) == reaches


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_causal(name, training):
    """A changed token leaves all earlier outputs of every row alone, in training with a capacity too."""
    model, tokens = build(name).train(training), tokens_of(3)
    exact = name not in ROUTING
    with torch.no_grad():
        before = model(tokens).logits
        for j in range(1, LENGTH):
            changed = tokens.clone()
            changed[1, j] = (changed[1, j] + 11) % 31
            after = model(changed).logits
            if exact:
                assert after[:, :j].equal(before[:, :j])
            else:
                torch.testing.assert_close(after[:, :j], before[:, :j])
            assert not after[1, j].equal(before[1, j])


@pytest.mark.parametrize("name", ROUTING)
def test_evaluation_does_not_depend_on_the_batch(name):
    model, tokens = build(name), tokens_of(5)
    with torch.no_grad():
        together = model(tokens).logits
        torch.testing.assert_close(torch.cat([model(row[None]).logits for row in tokens]), together)


class CountChoices(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in (torch.ops.aten.topk.default, torch.ops.aten.argmax.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing_and_chooses_once(name):
    model, tokens = build(name).train(), tokens_of(3)
    expected = results(model, whole, tokens)
    model.recompute = True
    with CountChoices() as counter:
        assert_same(results(model, whole, tokens), expected, torch.float64)
    assert counter.calls == len(model.config.routers)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROUTING)
def test_a_record_holds_every_choice(name, training):
    """As many as there are routers, in their order; what is not asked for changes nothing."""
    model, tokens, record = build(name).train(training), tokens_of(3), []
    expected, model.recompute = model(tokens), True
    output = model(tokens, record=record)
    assert_same({"logits": output.logits}, {"logits": expected.logits}, torch.float64)
    assert len(record) == len(output.router)
    for choice, stats, experts in zip(record, output.router, model.config.routers, strict=True):
        assert choice.indices.shape == choice.gates.shape == (*tokens.shape, experts.top_k)
        taken = torch.bincount(choice.indices.flatten(), minlength=experts.n_experts + 1)
        dropped = int(taken[experts.n_experts])
        assert dropped == round(stats.dropped.item() * taken.sum().item())
        assert (taken[:-1] <= stats.load).all() and taken.sum() == stats.load.sum()
        assert (choice.gates > 0).sum() == taken.sum() - dropped and not choice.gates.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_targets_is_cross_entropy_of_logits(name):
    model, tokens = build(name), tokens_of(2)
    targets = tokens.roll(-1, 1)
    targets[0, 3] = -100
    out = model(tokens, targets=targets)
    expected = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)


def test_bad_inputs_are_named():
    model, tokens = build("M"), tokens_of(2)
    state = model(tokens).state
    deeper = State(state.mixers * 2)
    own = f"this model's are '{'M' * len(state.mixers)}'"
    for call, message in [
        (lambda: model(tokens[0]), r"tokens has shape \(12,\); expected \(batch, length\)"),
        (lambda: model(tokens, seq_idx=tokens[:, :3]), r"seq_idx has shape \(2, 3\); expected \(2, 12\)"),
        (lambda: model(tokens[:1], state), "state holds 2 rows and tokens 1"),
        (lambda: model(tokens, deeper), f"state is of the mixers '{'M' * len(deeper.mixers)}'.*{own}"),
        (lambda: model(tokens, State(())), f"state is of the mixers ''.*{own}"),
        (lambda: model(tokens, build("A")(tokens).state), f"state is of the mixers '{'A' * len(state.mixers)}'.*{own}"),
        (lambda: model(tokens, targets=tokens[:1]), r"targets has shape \(1, 12\); expected \(2, 12\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_damaged_state_file_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    build("M")(tokens_of(2)).state.save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.safetensors holds no complete saved state"):
        State.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        State.load(tmp_path / "missing.safetensors")
