"""The Triton kernels of experts and head against the reference and a double loop, in the interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from doors import reference

from moemamba import ops

pytest.importorskip("triton")

from moemamba.ops.experts import ACTIVATIONS, GATED, grouped_linear, places_in_queues, triton_sort
from moemamba.ops.experts import triton_products as products
from moemamba.ops.head import triton as triton_cross_entropy
from moemamba.ops.router import linear_float32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.* encountered in"),  # numpy's, of rows that belong to nobody
]


def test_what_is_poisoned_here_is_whole_again_later(monkeypatch):
    """Torch keeps a list of the functions that make tensors, from the first time that it is asked for one."""
    with torch.device("meta"):
        torch.zeros(1)
    monkeypatch.undo()
    with torch.device("meta"):
        assert torch.empty(1).is_meta and torch.zeros(1).is_meta


def make(
    tokens=37, n_experts=4, top_k=1, d=24, f=40, o=24, activation="relu", dtype=torch.float32, dropped=0.2, seed=0
):
    """Arguments of `expert_feedforward`; expert 1 is chosen by nobody, and a fifth of the choices is dropped."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    groups = 2 if activation in GATED else 1
    scores = draw(tokens, n_experts)
    if n_experts > 2:
        scores[:, 1] = -float("inf")
    indices = scores.topk(top_k).indices
    indices[torch.rand(tokens, top_k, generator=generator, device=DEVICE) < dropped] = n_experts
    tensors = {
        "x": draw(tokens, d),
        "gates": draw(tokens, top_k),
        "up": draw(n_experts, groups * f, d) / d**0.5,
        "down": draw(n_experts, o, f) / f**0.5,
    }
    tensors = {name: (t if name == "gates" else t.to(dtype)).requires_grad_() for name, t in tensors.items()}
    return tensors, indices


def double_loop(x, indices, gates, up, down, activation):
    """Every token through each of its experts, one at a time."""
    rows = []
    for token in range(x.shape[0]):
        y = x.new_zeros(down.shape[1])
        for choice in range(indices.shape[1]):
            expert = indices[token, choice]
            if expert < up.shape[0]:
                h = ACTIVATIONS[activation](up[expert] @ x[token])
                y = y + (gates[token, choice] if gates is not None else 1) * (down[expert] @ h)
        rows.append(y)
    return torch.stack(rows)


def assert_same(function, oracle, tensors, tolerance=1e-5):
    """Same output and, by name, same gradients: ||a - b|| <= tolerance ||b||."""
    results = []
    for f in (function, oracle):
        y = f(**tensors)
        seed = torch.Generator(DEVICE).manual_seed(1)
        dy = torch.randn(y.shape, generator=seed, device=DEVICE).to(y.dtype)
        wanted = [t for t in tensors.values() if t is not None]
        results.append((y, *torch.autograd.grad(y, wanted, dy)))
    for name, got, expected in zip(("y", *(n for n, t in tensors.items() if t is not None)), *results, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype, name
        error = (got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def triton_feedforward(indices, activation):
    def run(x, gates, up, down):
        with ops.backend("triton"):
            return ops.expert_feedforward(x, indices, gates, up, down, activation=activation)

    return run


def compare_feedforward(tensors, indices, activation, tolerance=1e-5, loop=True):
    def specification(x, gates, up, down):
        return reference.expert_feedforward(x, indices, gates, up, down, activation)

    def loops(x, gates, up, down):
        return double_loop(x, indices, gates, up, down, activation)

    assert_same(triton_feedforward(indices, activation), specification, tensors, tolerance)
    if loop:
        assert_same(triton_feedforward(indices, activation), loops, tensors, tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_feedforward(activation, top_k):
    tensors, indices = make(top_k=top_k, activation=activation)
    compare_feedforward(tensors, indices, activation)


@pytest.mark.skipif(DEVICE == "cuda", reason="the larger tilings are not for float32")
@pytest.mark.parametrize("tiles", products.TILES)
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_every_tiling(tiles, activation, monkeypatch):
    monkeypatch.setattr(products, "choose_tiles", lambda *_: products.TILES[tiles])
    tensors, indices = make(tokens=70, n_experts=3, top_k=2, d=72, f=136, o=40, activation=activation)
    compare_feedforward(tensors, indices, activation, loop=False)


@pytest.mark.parametrize("widths", [(5, 7, 3), (33, 65, 17), (1, 1, 1)])
def test_odd_widths(widths):
    d, f, o = widths
    for activation in ("silu", "swiglu"):
        tensors, indices = make(d=d, f=f, o=o, activation=activation)
        compare_feedforward(tensors, indices, activation)


@pytest.mark.parametrize("expert", [0, 2, 3], ids=["first", "last", "dropped"])
def test_one_hot_expert(expert):
    tensors, indices = make(tokens=150, n_experts=3)
    compare_feedforward(tensors, torch.full_like(indices, expert), "relu", loop=False)


def test_without_gates_and_without_tokens():
    tensors, indices = make(top_k=2)
    compare_feedforward(tensors | {"gates": None}, indices, "gelu")
    tensors, indices = make(tokens=0)
    y = triton_feedforward(indices, "relu")(**tensors)
    assert y.shape == (0, 24)
    assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), list(tensors.values())))


def test_gate_of_zero_has_a_gradient():
    tensors, indices = make()
    tensors["gates"].data[::2] = 0
    for activation in ("relu", "gelu"):
        compare_feedforward(tensors, indices, activation)


def test_float16_and_float32_weights():
    tensors, indices = make(dtype=torch.float16)
    compare_feedforward(tensors, indices, "relu", tolerance=3e-3, loop=False)
    tensors["up"], tensors["down"] = (tensors[name].detach().float().requires_grad_() for name in ("up", "down"))
    compare_feedforward(tensors, indices, "relu", tolerance=3e-3, loop=False)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gated", [True, False])
def test_linear(top_k, gated):
    tensors, indices = make(top_k=top_k, d=33, o=130)
    tensors = {"x": tensors["x"], "gates": tensors["gates"] if gated else None, "weight": tensors["up"]}

    def run(x, gates, weight):
        with ops.backend("triton"):
            return ops.expert_linear(x, indices, gates, weight)

    def loops(x, gates, weight):
        rows = x.new_zeros(x.shape[0], weight.shape[1])
        for token, choice in (indices < weight.shape[0]).nonzero().tolist():
            gate = 1 if gates is None else gates[token, choice]
            row = torch.zeros_like(rows)
            row[token] = gate * (weight[indices[token, choice]] @ x[token])
            rows = rows + row
        return rows

    assert_same(run, lambda **t: reference.expert_linear(t["x"], indices, t["gates"], t["weight"]), tensors)
    assert_same(run, loops, tensors)


def test_grouped_linear():
    tensors, _ = make(tokens=20)
    counts = torch.tensor([3, 0, 9, 5], device=DEVICE)  # three rows belong to nobody
    tensors = {"x": tensors["x"], "weight": tensors["up"]}

    def run(x, weight):
        with ops.backend("triton"):
            return grouped_linear(x, weight, counts)

    assert_same(run, lambda x, weight: reference.grouped_linear(x, weight, counts), tensors)
    with torch.no_grad():
        assert torch.equal(run(**tensors)[17:], torch.zeros(3, 40, device=DEVICE))


@pytest.mark.parametrize("n_pairs", [1, 127, 128, 1000])
def test_sort_is_stable(n_pairs):
    n_experts, tile = 5, 32
    indices = torch.randint(0, n_experts + 1, (n_pairs, 1), device=DEVICE)
    order = triton_sort.sort_by_expert(indices, n_experts, tile)
    bounds = order.bounds.tolist()
    for group in range(n_experts + 1):
        first, last = bounds[2 * group : 2 * group + 2]
        end = first + (last - first + tile - 1) // tile * tile
        assert order.pairs[first:last].tolist() == (indices.flatten() == group).nonzero().flatten().tolist()
        assert order.pairs[last:end].eq(-1).all()
        assert order.experts[first // tile : end // tile].eq(group).all()
        assert end == bounds[2 * group + 2]


@pytest.mark.parametrize("n_entries", [0, 1, 128, 700])
def test_places_in_queues(n_entries):
    queues = torch.randint(0, 5, (n_entries,), device=DEVICE)
    with ops.backend("triton"):
        places = places_in_queues(queues, 7)
    assert places.equal(reference.places_in_queues(queues, 7))
    assert places.tolist() == [queues[:i].eq(queues[i]).sum().item() for i in range(n_entries)]


@pytest.mark.parametrize("sizes", [(70, 40, 5), (1100, 17, 33), (0, 8, 4)])
def test_linear_float32(sizes):
    tokens, d, n_experts = sizes
    x = torch.randn(tokens, d, device=DEVICE).half().requires_grad_()
    weight = torch.randn(n_experts, d, device=DEVICE).requires_grad_()

    def run(x, weight):
        with ops.backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
            return linear_float32(x, weight)

    assert_same(run, reference.router_logits, {"x": x, "weight": weight}, tolerance=2e-3)
    with torch.no_grad():  # gradients are products in float16, the logits are not
        torch.testing.assert_close(run(x, weight), x.float() @ weight.T, rtol=1e-5, atol=1e-4)


def make_head(tokens=50, d=24, v=131, dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, d, generator=generator, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, device=DEVICE).requires_grad_()
    targets = torch.randint(0, v, (tokens,), generator=generator, device=DEVICE)
    targets[::7] = -100
    return {"hidden": hidden, "weight": weight}, targets


def compare_head(tensors, targets, tolerance=1e-5, **options):
    def run(hidden, weight):
        with ops.backend("triton"):
            return ops.linear_cross_entropy(hidden, weight, targets, **options)

    def oracle(hidden, weight):
        return F.cross_entropy(hidden.float() @ weight.T, targets, **options)

    assert_same(run, oracle, tensors, tolerance)
    with torch.no_grad():
        torch.testing.assert_close(run(**tensors), oracle(**tensors), rtol=tolerance, atol=0)


@pytest.fixture(params=["recomputed", "stored"])
def way(request, monkeypatch):
    """Both ways to the head's loss, whatever its shape would choose."""
    monkeypatch.setattr(triton_cross_entropy, "MANY_WORDS", 0)
    monkeypatch.setattr(triton_cross_entropy, "RECOMPUTED", 128 if request.param == "recomputed" else 0)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(reduction, way):
    tensors, targets = make_head(tokens=70)
    compare_head(tensors, targets, reduction=reduction)
    compare_head(tensors, targets.where(targets >= 0, 5), ignore_index=5, reduction=reduction)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_linear_cross_entropy_at_the_edges(way):
    tensors, targets = make_head(tokens=3, d=17, v=5)
    compare_head(tensors, targets)
    compare_head(tensors, targets.fill_(-100), reduction="sum")
    tensors, targets = make_head(tokens=40)
    tensors["hidden"].data[11] = float("nan")
    with ops.backend("triton"):
        assert ops.linear_cross_entropy(**tensors, targets=targets).isnan()


def test_tensors_that_begin_anywhere():
    """Descriptors ask for whole blocks of 16 bytes; a part of another tensor need not begin at one."""
    _, targets = make_head(tokens=30, d=24, v=64)
    hidden, weight = (torch.randn(1 + n * 24, device=DEVICE)[1:].view(n, 24).requires_grad_() for n in (30, 64))
    compare_head({"hidden": hidden, "weight": weight}, targets)
    one_row = torch.randn(1, 26, device=DEVICE)[:, :24].requires_grad_()
    compare_head({"hidden": one_row, "weight": weight}, targets[1:2])
    up, down = (torch.randn(1 + 3 * 8 * 24, device=DEVICE)[1:].view(3, *shape) for shape in ((8, 24), (24, 8)))
    indices = torch.arange(30, device=DEVICE)[:, None] % 3
    y, expected = [], []
    for backend, found in (("triton", y), ("reference", expected)):
        with ops.backend(backend):
            found.append(ops.expert_feedforward(hidden, indices, None, up, down))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_linear_cross_entropy_in_chunks(monkeypatch):
    monkeypatch.setattr(triton_cross_entropy, "SCORES_BYTES", 1)
    compare_head(*make_head(tokens=140))


def test_linear_cross_entropy_with_large_logits(way):
    tensors, targets = make_head(tokens=20, v=300)
    tensors["weight"].data *= 100  # a target's probability may be e^-1000
    compare_head(tensors, targets, tolerance=1e-4)


def test_linear_cross_entropy_float16(way):
    tensors, targets = make_head(dtype=torch.float16)
    compare_head(tensors, targets, tolerance=3e-3)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compile_without_graph_breaks():
    tensors, indices = make(top_k=2)
    head, targets = make_head(tokens=37)

    def step(x, gates, up, down, weight):
        y = ops.expert_feedforward(x, indices, gates, up, down)
        y = y + ops.expert_linear(x, indices, gates, up)[:, :24]
        return ops.linear_cross_entropy(y, weight, targets)

    with ops.backend("triton"):
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        assert_same(compiled, step, tensors | {"weight": head["weight"]})


@gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("tokens", [64, 5000])
def test_feedforward_on_a_gpu(activation, top_k, tokens):
    shape = {"tokens": tokens, "n_experts": 8, "top_k": top_k, "d": 200, "f": 328, "o": 136}
    for dtype in (torch.bfloat16, torch.float16):
        tensors, indices = make(**shape, activation=activation, dtype=dtype)
        compare_feedforward(tensors, indices, activation, tolerance=2e-2, loop=False)
    tensors, indices = make(**shape, activation=activation)
    compare_feedforward(tensors, indices, activation, tolerance=1e-4, loop=False)


@gpu
@pytest.mark.parametrize("tiles", products.TILES)
def test_every_tiling_on_a_gpu(tiles, monkeypatch):
    monkeypatch.setattr(products, "choose_tiles", lambda *_: products.TILES[tiles])
    dtype = torch.float32 if tiles == "float32" else torch.bfloat16
    tensors, indices = make(tokens=3000, n_experts=6, d=264, f=520, o=200, dtype=dtype)
    compare_feedforward(tensors, indices, "relu", tolerance=1e-4 if tiles == "float32" else 2e-2, loop=False)


@gpu
@pytest.mark.parametrize(("d", "v"), [(136, 50_257), (520, 5_000), (128, 50_257), (40, 50_257), (72, 300)])
def test_linear_cross_entropy_on_a_gpu(d, v, monkeypatch):
    tensors, targets = make_head(tokens=3000, d=d, v=v, dtype=torch.bfloat16)
    # What the products read: at logits of 50 the rounding of weights alone changes hidden's gradient by 1.5%.
    weight = tensors["weight"].data.bfloat16().float()
    tensors["weight"].data = weight / 16
    compare_head(tensors, targets, tolerance=1e-2)
    tensors["weight"].data = weight * 4
    compare_head(tensors, targets, tolerance=1e-2)
    monkeypatch.setattr(triton_cross_entropy, "LARGEST_SUM", 0.0)  # all scores are computed anew
    monkeypatch.setattr(triton_cross_entropy, "SCORES_BYTES", 60 << 20)
    compare_head(tensors, targets, tolerance=1e-2)
