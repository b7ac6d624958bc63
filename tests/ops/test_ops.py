"""Floor 1: the reference ops against loops that follow the definitions word by word, and gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F

from moemamba import ops
from moemamba.ops import packing
from moemamba.ops.experts import grouped_linear
from moemamba.ops.head import reference as head_reference
from moemamba.ops.scan import reference as scan_reference

f64 = {"dtype": torch.float64}

# Rows with padding on the left, inside and on the right, several sequences, one of them a single token; all padding.
SEQ_IDX = torch.tensor(
    [
        [-1, 0, 0, -1, 0, 1, 1, -1, -1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [-1, -1, -1, -1, -1, -1, -1, -1, -1],
        [5, 4, 3, 3, 3, 3, -1, 2, 2],
    ],
    dtype=torch.int32,
)


def scan_inputs(b=4, l=9, i=3, n=2):  # noqa: E741
    shapes = {"u": (b, l, i), "dt": (b, l, i), "A": (i, n), "B": (b, l, n), "C": (b, l, n), "D": (i,), "z": (b, l, i)}
    shapes |= {"dt_bias": (i,), "initial_state": (b, i, n)}
    inputs = {name: torch.randn(shape, **f64) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return inputs


def follow(seq_idx, row, t):
    """The positions of t's own sequence up to and including t, and whether it is the row's first sequence."""
    members, first, last = [], True, None
    for s in range(t + 1):
        idx = int(seq_idx[row, s])
        if idx < 0:
            continue
        if last is not None and idx != last:
            members, first = [], False
        members.append(s)
        last = idx
    return members, first


def slow_scan(x, seq_idx):
    """One channel, one state at a time, each output from the whole history of its own sequence."""
    b, l, i = x["u"].shape  # noqa: E741
    y, final = torch.zeros(b, l, i, **f64), x["initial_state"].clone()
    for row in range(b):
        for t in range(l):
            members, first = follow(seq_idx, row, t)
            for c in range(i):
                h = x["initial_state"][row, c] if first else torch.zeros_like(x["A"][c])
                for s in members:
                    step = math.log1p(math.exp(x["dt"][row, s, c] + x["dt_bias"][c]))
                    h = torch.exp(step * x["A"][c]) * h + step * x["B"][row, s] * x["u"][row, s, c]
                if members:
                    final[row, c] = h
                if seq_idx[row, t] >= 0:
                    z = x["z"][row, t, c]
                    y[row, t, c] = ((h * x["C"][row, t]).sum() + x["D"][c] * x["u"][row, t, c]) * z * torch.sigmoid(z)
    return y, final


def slow_conv(x, weight, bias, state, seq_idx):
    b, l, i = x.shape  # noqa: E741
    k = weight.shape[1]
    y, final = torch.zeros_like(x), state.clone()
    for row in range(b):
        for t in range(l):
            members, first = follow(seq_idx, row, t)
            past = [*(state[row].T if first else torch.zeros(k - 1, i, **f64)), *(x[row, s] for s in members)]
            window = torch.stack(past[-k:])
            final[row] = torch.stack(past[-(k - 1) :]).T
            if seq_idx[row, t] >= 0:
                y[row, t] = F.silu((window * weight.T).sum(0) + bias)
    return y, final


@pytest.mark.parametrize("packed", [False, True])
def test_selective_scan_follows_its_definition(packed):
    x = scan_inputs()
    seq_idx = SEQ_IDX if packed else None
    y, final = ops.selective_scan(**x, seq_idx=seq_idx)
    y_slow, final_slow = slow_scan(x, SEQ_IDX if packed else torch.zeros_like(SEQ_IDX))
    torch.testing.assert_close(y, y_slow)
    torch.testing.assert_close(final, final_slow)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [2, 4])
def test_causal_conv1d_follows_its_definition(packed, width):
    x, weight, bias, state = (torch.randn(s, **f64) for s in ((4, 9, 3), (3, width), (3,), (4, 3, width - 1)))
    y, final = ops.causal_conv1d(x, weight, bias, initial_state=state, seq_idx=SEQ_IDX if packed else None)
    y_slow, final_slow = slow_conv(x, weight, bias, state, SEQ_IDX if packed else torch.zeros_like(SEQ_IDX))
    torch.testing.assert_close(y, y_slow)
    torch.testing.assert_close(final, final_slow)


@pytest.mark.parametrize("packed", [False, True])
def test_selective_scan_gradcheck(packed, monkeypatch):
    monkeypatch.setattr(scan_reference, "SCAN_CHUNK", 4)  # so that gradients cross chunk borders
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(b=4, i=2).items()}
    seq_idx = SEQ_IDX if packed else None
    call = lambda *args: ops.selective_scan(**dict(zip(inputs, args, strict=True)), seq_idx=seq_idx)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("packed", [False, True])
def test_causal_conv1d_gradcheck(packed):
    shapes = ((4, 9, 2), (2, 4), (2,), (4, 2, 3))
    inputs = tuple(torch.randn(s, **f64, requires_grad=True) for s in shapes)
    seq_idx = SEQ_IDX if packed else None
    call = lambda x, w, b, s: ops.causal_conv1d(x, w, b, initial_state=s, seq_idx=seq_idx)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu"])
def test_expert_ops_gradcheck(activation):
    indices = torch.tensor([[0, 2], [2, 3], [3, 3], [0, 0], [2, 0]])  # expert 1 is empty, 3 marks a dropped choice
    rows = 6 if activation == "swiglu" else 3
    x, gates, up, down = (torch.randn(s, **f64, requires_grad=True) for s in ((5, 4), (5, 2), (3, rows, 4), (3, 2, 3)))
    feed = lambda x, g, u, d: ops.expert_feedforward(x, indices, g, u, d, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(feed, (x, gates, up, down))
    assert torch.autograd.gradcheck(lambda x, g, u: ops.expert_linear(x, indices, g, u), (x, gates, up))
    assert not feed(x, gates, up, down)[2].any()


def test_grouped_linear_is_a_loop_over_groups():
    x, weight = torch.randn(7, 4, **f64), torch.randn(3, 5, 4, **f64)
    y = grouped_linear(x, weight, torch.tensor([2, 0, 3]))
    expected = [*(weight[0] @ row for row in x[:2]), *(weight[2] @ row for row in x[2:5]), *torch.zeros(2, 5, **f64)]
    torch.testing.assert_close(y, torch.stack(expected))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_is_cross_entropy_of_logits(reduction, monkeypatch):
    monkeypatch.setattr(head_reference, "LOSS_CHUNK", 3)
    hidden, weight = torch.randn(8, 4, **f64, requires_grad=True), torch.randn(11, 4, **f64, requires_grad=True)
    targets = torch.tensor([1, 2, -100, 10, 0, -100, 5, 5])
    loss = ops.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction=reduction))
    call = lambda h, w: ops.linear_cross_entropy(h, w, targets, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(call, (hidden, weight))


def test_memory_of_the_scan_does_not_grow_with_length_times_states():
    """What the backward pass keeps is far below one (b, l, i, n) tensor."""
    b, l, i, n = 1, 512, 8, 16  # noqa: E741
    x = {name: t.float() for name, t in scan_inputs(b, l, i, n).items()}
    x["u"].requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), ops.backend("reference"):
        ops.selective_scan(**x)
    assert 0 < sum(saved.values()) < b * l * i * n * 4 / 2


def test_positions_count_the_tokens_of_a_sequence():
    expected = [[-1, 0, 1, -1, 2, 0, 1, -1, -1], list(range(9)), [-1] * 9, [0, 0, 0, 1, 2, 3, -1, 0, 1]]
    assert packing.positions(SEQ_IDX).tolist() == expected
    continued = packing.positions(SEQ_IDX, torch.tensor([10, 10, 10, 10]))
    assert continued[0].tolist() == [-1, 10, 11, -1, 12, 0, 1, -1, -1]


BACKENDS = ["cpu", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore:.* encountered"))]


def scattered(t):
    """The same values, none of them next to another in memory."""
    apart = torch.full((*t.shape[:-1], 2 * t.shape[-1]), -7).to(t.dtype)
    apart[..., ::2] = t
    return apart[..., ::2]


def transposed(t):
    """The same values with the last dimension but one innermost, also where `contiguous` sees no difference."""
    return t.mT.clone(memory_format=torch.contiguous_format).mT


@pytest.mark.parametrize("i,n", [(3, 2), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_may_lie_in_memory_in_any_order(backend, i, n):
    if ops.why_not(backend, "cpu"):
        pytest.skip(ops.why_not(backend, "cpu"))
    x = {name: t.float() for name, t in scan_inputs(i=i, n=n).items()}
    conv = {"x": x["u"], "weight": torch.randn(i, 4), "bias": x["D"], "initial_state": torch.randn(4, i, 3)}
    experts = {"x": torch.randn(5, 4), "gates": torch.rand(5, 2), "weight": torch.randn(3, 6, 4)}
    indices = torch.tensor([[0, 2], [2, 3], [3, 3], [0, 0], [2, 0]])
    router = {"x": torch.randn(8, 4), "weight": torch.randn(3, 4), "bias": torch.randn(3) / 4, "valid": torch.ones(8)}
    router["valid"][2:4] = 0
    feed = {"x": experts["x"], "gates": experts["gates"], "up": torch.randn(3, 5, 4), "down": torch.randn(3, 2, 5)}
    for op, inputs in [
        (ops.selective_scan, x | {"seq_idx": SEQ_IDX}),
        (ops.causal_conv1d, conv | {"seq_idx": SEQ_IDX}),
        (ops.expert_linear, experts | {"indices": indices}),
        (ops.expert_feedforward, feed | {"indices": indices}),
        (ops.router, router | {"top_k": 2, "groups": 2}),
    ]:
        lain = {
            "scattered": {k: scattered(t) if isinstance(t, torch.Tensor) else t for k, t in inputs.items()},
            "transposed": {k: transposed(t) if getattr(t, "ndim", 0) > 1 else t for k, t in inputs.items()},
        }
        with ops.backend("reference"):
            expected = op(**inputs)
        for layout, arguments in lain.items():
            with ops.backend(backend):
                actual = op(**arguments)
            for a, e in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (actual, expected)), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, msg=lambda m, w=(op, layout): f"{w}: {m}")


def test_float64_stays_itself_under_autocast():
    """As in PyTorch's own products."""
    x, up, down = torch.randn(5, 4, **f64), torch.randn(3, 6, 4, **f64), torch.randn(3, 2, 6, **f64)
    indices, targets = torch.tensor([[0], [1], [2], [3], [0]]), torch.arange(5)
    calls = (
        lambda: ops.expert_feedforward(x, indices, None, up, down),
        lambda: ops.expert_linear(x, indices, None, up),
        lambda: grouped_linear(x, up, torch.tensor([1, 2, 1])),
        lambda: ops.linear_cross_entropy(x, up.flatten(0, 1), targets),
    )
    expected = [call() for call in calls]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close([call() for call in calls], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.selective_scan(x, x, x, x, x), r"u has shape \(4, 4\); expected \(b, l, i\)"),
        (lambda x: ops.causal_conv1d(x, x), r"x has shape \(4, 4\); expected \(b, l, i\)"),
        (lambda x: ops.expert_linear(x[None], x.long(), None, x[None]), r"x has shape \(1, 4, 4\); expected \(t, d\)"),
        (lambda x: ops.expert_feedforward(x, x.long(), None, x, x), r"up has shape \(4, 4\); expected \(e, f, d\)"),
        (lambda x: ops.linear_cross_entropy(x[None], x, x), r"hidden has shape \(1, 4, 4\); expected \(t, d\)"),
        (lambda x: ops.router_choices(x, x, x[0], 5), "top_k is 5; of 4 experts a token can choose 1 to 4"),
        (lambda x: ops.router_means(x, x, x[0], 5), "top_k is 5; of 4 experts"),
        (lambda x: ops.router(x, x, x[0], 0), "top_k is 0; of 4 experts"),
    ],
)
def test_a_wrong_number_of_dimensions_or_choices_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 4))


def test_a_wrong_shape_is_named():
    x = scan_inputs()
    x["B"] = x["B"][:, :-1]
    with pytest.raises(ValueError, match=r"B has shape \(4, 8, 2\); expected \(4, 9, 2\)"):
        ops.selective_scan(**x)


def test_backends_are_asked_for_by_name_or_refused_with_a_reason(monkeypatch):
    with pytest.raises(ValueError, match="backend 'vulkan' is unknown; choose one of reference, cpu, triton, cuda"):
        ops.backend("vulkan")
    with ops.backend("reference"):
        assert ops.choose("selective_scan", torch.zeros(1)) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="the triton backend runs on CUDA tensors"):
            ops.backend("triton")
