"""One decoded token's experts, their router and norm: the kernels of a whole sub-layer against the reference."""

import pytest
import torch

from moemamba import ModelConfig, MoEMamba, ops
from moemamba.config import ExpertsConfig
from moemamba.inference import generate
from moemamba.layers import MoE
from moemamba.layers.norm import make_norm

pytest.importorskip("triton")

from moemamba.ops.kit.triton_step import Cut
from moemamba.ops.moe_step import CHOICES, EXPERTS
from moemamba.ops.moe_step import triton as moe_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's products take bfloat16 for what its bits are as integers.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.* encountered"),  # numpy's, of nonsense
]


@pytest.fixture
def small_tiles(monkeypatch):
    """So that sums come in parts, experts in several tiles of rows, and few choices are many."""
    monkeypatch.setattr(moe_step, "FEW", 2)
    monkeypatch.setattr(moe_step, "ROUTER", 256)
    for name in ("UP", "DOWN"):
        monkeypatch.setattr(moe_step, name, {None: Cut(16, 16, 16, 4)})
        monkeypatch.setattr(moe_step, f"{name}_FEW", Cut(1, 8, 16, 4))


def make(batch, d=24, e=5, f=20, top_k=1, activation="relu", norm="layernorm", biases=False, dtype=torch.float32):
    """Arguments of `moe_step`, by name."""
    torch.manual_seed(batch)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

    rows = f * (2 if activation in ("swiglu", "geglu") else 1)
    given = {"x": draw(batch, 1, d), "router": draw(e, d).float(), "balance_bias": draw(e).float() / 9}
    given |= {"up": draw(e, rows, d, scale=d**-0.5), "down": draw(e, d, f, scale=f**-0.5), "top_k": top_k}
    given |= {"activation": activation, "eps": 1e-3}
    if norm != "none":
        given["norm_weight"] = draw(d)
    if norm == "layernorm":
        given["norm_bias"] = draw(d)
    if biases:
        given |= {"logit_bias": draw(e), "up_bias": draw(e, rows), "down_bias": draw(e, d), "scores": "sigmoid"}
    return given


def assert_equal(given):
    x = given["x"]
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with ops.backend("reference"):
        expected = ops.moe_step(**wide)
    with ops.backend("triton"):
        found = ops.moe_step(**given)
    error = float((found.float() - expected).norm() / expected.norm())
    assert found.dtype == x.dtype and found.shape == x.shape and error < TOLERANCE[x.dtype], error
    return found


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 21])
def test_each_way_equals_the_reference(batch, dtype):
    """Each routes for itself, after a kernel that routes, and grouped."""
    assert_equal(make(batch, top_k=1 + batch % 4 // 2, dtype=dtype))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu", "relu2", "gelu_erf", "geglu"])
@pytest.mark.parametrize("batch", [1, 17])
def test_every_activation(batch, activation):
    assert_equal(make(batch, activation=activation, norm="none", biases=batch == 17))


@pytest.mark.parametrize(("batch", "top_k"), [(1, 2), (2, 1), (3, 1), (9, 3)])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_sums_in_several_parts(batch, top_k, activation, small_tiles):
    given = make(batch, d=35, e=7, f=41, top_k=top_k, activation=activation, norm="rmsnorm", biases=batch == 9)
    assert_equal(given)


@pytest.mark.parametrize("searched", [0, 256], ids=["listed", "searched"])
def test_hot_and_empty_experts(searched, small_tiles, monkeypatch):
    """All rows choose one expert, in three tiles; of the others each has none."""
    monkeypatch.setattr(moe_step, "SEARCHED", searched)
    given = make(37, d=20, f=33, norm="rmsnorm")
    given["balance_bias"] = torch.tensor([0.0, 0, 9, 0, 0], device=DEVICE)
    hot = assert_equal(given)
    given["down"][[0, 1, 3, 4]] = torch.nan  # nobody reads the others
    with ops.backend("triton"):
        assert torch.equal(ops.moe_step(**given), hot)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_as_many_experts_and_choices_as_there_may_be(batch):
    assert_equal(make(batch, d=12, e=EXPERTS, f=9, top_k=CHOICES, norm="rmsnorm"))


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_equal_experts_give_the_first(batch):
    """A router of zeros chooses the first two, with equal gates."""
    given = make(batch, top_k=2, norm="none")
    given["router"].zero_()
    given["up"][2:] = torch.nan
    given["balance_bias"] = -torch.arange(5.0, device=DEVICE)
    expected = assert_equal(given)
    given["balance_bias"].zero_()
    with ops.backend("triton"):
        assert torch.equal(ops.moe_step(**given), expected)


@pytest.mark.parametrize("batch", [2, 18])
def test_nonsense_stays_in_its_row(batch):
    given = make(batch, norm="rmsnorm")
    expected = assert_equal(given)
    given["x"][1] = torch.nan
    with ops.backend("triton"):
        found = ops.moe_step(**given)
    assert found[1].isnan().all()
    others = [row for row in range(batch) if row != 1]
    assert torch.equal(found[others], expected[others])


def step(layer, norm, x):
    place = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.no_grad(), ops.backend("triton"):
        return layer.step_with_norm(x, norm, None, len(x), place)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "geglu", "scores": "sigmoid", "router_bias": True, "bias": True}]
)
def test_a_layer_takes_it(options):
    torch.manual_seed(0)
    layer, norm, x = MoE(16, 4, 24, top_k=2, **options), make_norm("rmsnorm", 16), torch.randn(3, 1, 16)
    layer, norm, x = layer.to(DEVICE).eval(), norm.to(DEVICE), x.to(DEVICE)
    found = step(layer, norm, x)
    torch.testing.assert_close(found, x + layer.serve(norm(x)), rtol=1e-4, atol=1e-5)
    assert layer.step_with_norm(x, norm, None, 3, None) is None  # unasked, or with gradients
    norm.register_forward_hook(lambda *_: None)
    assert step(layer, norm, x) is None


def test_it_says_what_it_cannot_do():
    norm, x = make_norm("rmsnorm", 16).to(DEVICE), torch.randn(3, 1, 16, device=DEVICE)
    layer = MoE(16, 4, 24, n_shared_experts=1).to(DEVICE)
    assert "shared" in layer.why_not_fused() and step(layer, norm, x) is None
    arguments = list(make(3).values())[:6]
    assert ops.why_not_moe_step(*arguments) is None
    assert "torch.float16" in ops.why_not_moe_step(arguments[0].half(), *arguments[1:])
    assert "its router" in ops.why_not_moe_step(arguments[0], arguments[1].half(), *arguments[2:])
    assert "1 to 1024 rows" in ops.why_not_moe_step(torch.zeros(1025, 1, 24), *arguments[1:])
    assert "16 choices" in ops.why_not_moe_step(*arguments[:5], 17)
    most = list(make(3, d=4, e=EXPERTS, f=4).values())[:6]
    assert ops.why_not_moe_step(*most) is None
    many = list(make(3, d=4, e=EXPERTS + 1, f=4).values())[:6]
    assert ops.why_not_moe_step(*many) == "it has 129 experts, and the kernels hold the scores of up to 128"
    assert ops.choose("moe_step", x) == "reference"  # until it has been measured


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["ME", "AF"])
def test_a_model_decodes_the_same_tokens(pattern):
    """A step of the whole engine, with the kernels and without."""
    torch.manual_seed(0)
    config = ModelConfig(pattern, 1, 32, vocab_size=41, experts=ExpertsConfig(4, d_expert=24, top_k=2))
    model = MoEMamba(config).to(DEVICE).eval().requires_grad_(False)
    prompt = torch.randint(0, 41, (2, 5)).tolist()
    expected = generate(model, prompt, 4, temperature=0)
    with ops.backend("triton"):
        assert generate(model, prompt, 4, temperature=0) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 64, 256, 257, 1024])
@pytest.mark.parametrize(("top_k", "e", "f", "activation"), [(1, 42, 1536, "relu"), (4, 128, 256, "swiglu")])
def test_real_sizes(rows, top_k, e, f, activation):
    given = make(rows, 512, e, f, top_k, activation, dtype=torch.bfloat16)
    given["router"] *= 0.1
    given["down"] *= 16  # so that experts have the greater share
    with ops.backend("reference"):
        expected = ops.moe_step(**given)[:, 0].float()
    with ops.backend("triton"):
        found = ops.moe_step(**given)
        assert torch.equal(ops.moe_step(**given), found)  # from run to run
    distances = (found[:, 0].float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (
        distances.quantile(0.97) < TOLERANCE[torch.bfloat16]
    )  # of choices that are nearly equal one may fall otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 9, 80, 600])
def test_a_graph_holds_a_step(rows):
    """Choices are the device's affair: replayed with other rows it is what a call would be."""
    given = make(rows, 512, 32, 1536, dtype=torch.bfloat16)
    with ops.backend("triton"):
        ops.moe_step(**given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x = given["x"]
            for _ in range(3):
                y = ops.moe_step(**(given | {"x": y}))
        for _ in range(3):
            x.normal_()
            graph.replay()
            expected = x
            for _ in range(3):
                expected = ops.moe_step(**(given | {"x": expected}))
            assert torch.equal(y, expected)
