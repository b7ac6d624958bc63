"""One decoded token's attention in buffers that stay where they are: every backend against the reference."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ops
from moemamba.layers import Attention, FeedForward
from moemamba.layers.norm import make_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["cpu"] if DEVICE == "cpu" else []
BACKENDS += ["triton"] if importlib.util.find_spec("triton") else []
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered")  # numpy's, of nonsense


def make(
    lengths=(5, 70, 130), padding=(0, 3, 129), heads=4, groups=2, width=16, room=140, base=1e4, dtype=torch.float32
):
    """Arguments of `attention_step`: of each row its entries, of which the first are padding."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows, time = len(lengths), torch.arange(room)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    place, first = torch.tensor(lengths), torch.tensor(padding)[:, None]
    positions = (time - first).masked_fill((time < first) | (time >= place[:, None]), -1)
    keys, values = draw(2, rows, groups, room, width)
    return [draw(rows, (heads + 2 * groups) * width), keys, values, positions.to(DEVICE), place.to(DEVICE), base]


def copied(arguments):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def outcome(backend, arguments):
    own = copied(arguments)
    with torch.no_grad(), ops.backend(backend):
        return dict(zip(("y", "keys", "values", "positions"), (ops.attention_step(*own), *own[1:4]), strict=True))


def assert_equal(backend, arguments):
    found, expected = outcome(backend, arguments), outcome("reference", arguments)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert found[name].dtype == value.dtype and error < TOLERANCE[arguments[0].dtype], f"{name}: {error:.1e}"
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 90), st.floats(0, 1)), min_size=1, max_size=3),
    shape=st.sampled_from([(4, 4, 16), (6, 2, 20), (3, 1, 8)]),
    base=st.sampled_from([None, 1e4]),
)
def test_it_equals_the_reference(backend, rows, shape, base):
    lengths = [length for length, _ in rows]
    padding = [int(share * length) for length, share in rows]
    heads, groups, width = shape
    assert_equal(backend, make(lengths, padding, heads, groups, width, 97, base))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_further_apart_than_32_bits_count(backend):
    qkv, keys, values, *others = make((5,), (0,), heads=5, groups=5, room=8, dtype=torch.float16)
    apart, groups, width = (
        2**29 + 2**20,
        keys.shape[1],
        keys.shape[3],
    )  # of memory that is asked for, and hardly touched
    far = torch.empty(groups * apart, dtype=keys.dtype, device=DEVICE)
    far = far.as_strided(keys.shape, (groups * apart, apart, width, 1)).copy_(keys)
    near = [qkv, keys, values, *others]
    expected = outcome(backend, near)["y"]
    with torch.no_grad(), ops.backend(backend):
        y = ops.attention_step(qkv, far, *copied([values, *others]))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_of_the_sequence_never_reaches_it(backend):
    arguments = make()
    expected = assert_equal(backend, arguments)["y"]
    for tensor in arguments[1:3]:
        tensor[1, :, :3] = torch.nan  # padding; and of another row a key of its sequence
        tensor[2, :, 129] = torch.nan
    found = outcome(backend, arguments)["y"]
    assert torch.equal(found[:2], expected[:2])
    assert backend == "cpu" or found[2].isnan().all()  # there the layer looks for such itself


def test_new_entries_lie_where_the_buffers_are():
    """Nothing is copied: views of larger buffers are written, all else stays as it is."""
    arguments = make()
    wide = [torch.full((5, 2, 300, 16), 7.0, device=DEVICE) for _ in range(2)]
    for buffer, tensor in zip(wide, arguments[1:3], strict=True):
        buffer[:3, :, :140] = tensor
    for backend in BACKENDS:
        own = [arguments[0], *(buffer.clone() for buffer in wide), *copied(arguments[3:])]
        inside = [own[1][:3, :, :140], own[2][:3, :, :140]]
        with torch.no_grad(), ops.backend(backend):
            y = ops.attention_step(own[0], *inside, *own[3:])
        found = outcome(backend, arguments)
        assert torch.equal(y, found["y"]) and torch.equal(inside[0], found["keys"])
        assert own[1][3:].eq(7).all() and own[2][:, :, 140:].eq(7).all()


def layer_and_buffers():
    torch.manual_seed(0)
    layer, norm = Attention(32, 4, n_kv_heads=2).to(DEVICE).eval(), make_norm("rmsnorm", 32).to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    with torch.no_grad():
        state = layer(x)[1]
        buffers = Attention.allocate(3, 40, state)
        Attention.put(buffers, slice(0, 2), state)
    return layer, norm, x[:, :1], buffers


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_steps_in_place(backend):
    layer, norm, x, buffers = layer_and_buffers()
    place, where = torch.full((2,), 9, device=DEVICE), buffers.keys.data_ptr()
    before = type(buffers)(*(buffer[:2].clone() for buffer in buffers))
    with torch.no_grad(), ops.backend("reference"):
        expected, after = layer(norm(x), before)
    with torch.no_grad(), ops.backend(backend):
        found = layer.step_with_norm(x, norm, buffers, 2, place)
        assert (found is None) == (backend == "cpu")
        found = x + layer.step(norm(x), buffers, 2, place) if found is None else found
    torch.testing.assert_close(found, x + expected, rtol=1e-4, atol=1e-5)
    assert buffers.keys.data_ptr() == where
    torch.testing.assert_close(buffers.keys[:2, :, 9], after.keys[:, :, -1], rtol=1e-4, atol=1e-5)
    assert buffers.positions[:2, 9].tolist() == [9, 9] and buffers.positions[2].eq(-1).all()
    for hooked in (layer.out_proj, norm):  # then it is called as it stands
        handle = hooked.register_forward_hook(lambda *_: None)
        with torch.no_grad(), ops.backend(backend):
            assert layer.step_with_norm(x, norm, buffers, 2, place) is None
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_piece_that_sees_all_before_it_needs_no_mask(dtype, monkeypatch):
    torch.manual_seed(0)
    layer, x = Attention(32, 4, n_kv_heads=2).to(dtype).eval(), torch.randn(2, 9, 32, dtype=dtype)
    plain, masks = ops.attention, []
    monkeypatch.setattr("moemamba.layers.attention.ops.attention", lambda *args: masks.append(args[3:]) or plain(*args))
    with torch.no_grad():
        expected, whole = layer(x)
        first, state = layer(x[:, :4])
        second, state = layer(x[:, 4:], state)
        assert masks == [()] * 3
        torch.testing.assert_close(torch.cat([first, second], 1), expected)
        for a, b in zip(state, whole, strict=True):
            torch.testing.assert_close(a, b)
        state.positions[1, 0] = -1
        layer(x[:, 4:], state)
    assert masks[-1] != ()
    with pytest.raises(ValueError, match="without `visible`"):
        plain(torch.zeros(1, 1, 3, 4), *torch.zeros(2, 1, 1, 2, 4))


if "triton" in BACKENDS:
    from moemamba.ops.attention import triton_step
    from moemamba.ops.dense import triton_step as dense_step
    from moemamba.ops.kit.triton_step import Cut

    @pytest.fixture
    def shares(monkeypatch):
        """Rows of 140 entries are three shares."""
        monkeypatch.setattr(triton_step, "SHARE", 50)
        monkeypatch.setattr(triton_step, "PROGRAMS", 64)
        monkeypatch.setattr(triton_step, "BLOCK", 16)

    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize("groups", [4, 2])
    def test_shares_of_a_row(groups, dtype, shares):
        assert_equal("triton", make(groups=groups, dtype=dtype))

    def test_a_row_without_entries_and_one_that_is_full(shares):
        assert_equal("triton", make((0, 139), (0, 0)))

    @pytest.mark.parametrize("batch", [1, 3, 17])
    def test_linear_layers_of_a_step(batch, monkeypatch):
        for name in ("ENTER", "LEAVE"):
            cuts = {1: Cut(1, 8, 16, 4), 16: Cut(16, 16, 16, 4)}
            monkeypatch.setattr(dense_step, name, cuts)
        torch.manual_seed(0)
        x, weight, bias, scale = (torch.randn(*shape, device=DEVICE) for shape in ((batch, 45), (38, 45), (38,), (45,)))
        back = torch.randn(45, 19, device=DEVICE)
        results = {}
        for backend in ("triton", "reference"):
            with ops.backend(backend):
                h = ops.norm_linear(x, weight, bias, scale, scale + 1, activation="geglu")
                results[backend] = h, ops.linear_add(h, back, scale, x)
        for found, expected in zip(results["triton"], results["reference"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("activation", ["relu", "swiglu"])
    def test_a_dense_layer_takes_them(activation):
        torch.manual_seed(0)
        layer, norm = FeedForward(16, 40, activation, bias=True).to(DEVICE), make_norm("layernorm", 16).to(DEVICE)
        x, place = torch.randn(3, 1, 16, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
        with torch.no_grad():
            assert layer.step_with_norm(x, norm, None, 3, place) is None  # unasked
            with ops.backend("triton"):
                found = layer.step_with_norm(x, norm, None, 3, place)
            torch.testing.assert_close(found, x + layer(norm(x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.gpu
    @pytest.mark.parametrize("groups", [8, 2])
    @pytest.mark.parametrize("lengths", [(5,), (300, 64), (32_000,), (32_000, 0, 777) * 5])
    def test_real_sizes(lengths, groups):
        padding = [length // 3 for length in lengths]
        arguments = make(lengths, padding, 8, groups, 64, 32_768, dtype=torch.bfloat16)
        assert_equal("triton", arguments)

    @pytest.mark.gpu
    def test_a_graph_holds_a_step():
        """Lengths are the device's affair: replayed it reads one entry more each time."""
        own, other = copied(make(dtype=torch.bfloat16)), copied(make(dtype=torch.bfloat16))
        with torch.no_grad(), ops.backend("triton"):
            ops.attention_step(*copied(own))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.attention_step(*own)
                own[4] += 1
            for _ in range(5):
                graph.replay()
                assert torch.equal(y, ops.attention_step(*other))
                other[4] += 1
            assert all(torch.equal(a, b) for a, b in zip(own[1:5], other[1:5], strict=True))
