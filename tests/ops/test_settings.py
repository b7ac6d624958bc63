"""Laws 6 and 10: torch's settings and other threads change nothing; derivatives are right or refused; plain layers."""

import threading

import pytest
import torch
from models import MODELS, build, tokens_of
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from moemamba import ModelConfig, MoEMamba, ops, preset
from moemamba.initialisation import draw
from moemamba.layers.plain import reasons, why_not_plain
from moemamba.ops.kit.cpu import address, new, rows

# torch's own decompositions for forward mode, loaded at their first use, are compiled by what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
DTYPES = [torch.float16, torch.bfloat16, torch.float64]


def look(model, tokens):
    """Outputs, router statistics and gradients, in training and in evaluation, with and without a state."""
    model.zero_grad()
    out = model.train()(tokens, targets=tokens)
    (out.loss + sum(s.balance_loss + s.z_loss for s in out.router)).backward()
    found = [out.loss.detach(), *[p.grad for p in model.parameters()]]
    with torch.no_grad():
        first = model.eval()(tokens)
        step = model(tokens[:, :1], first.state)
    for output in (first, step):
        found += [output.logits, *[value for stats in output.router for value in stats]]
    return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_default_dtype_and_device_change_nothing(name, backend):
    model, tokens = build(name, torch.float32), tokens_of(2)
    with ops.backend(backend):
        want = look(model, tokens)
        try:
            for dtype in DTYPES:
                torch.set_default_dtype(dtype)
                for a, b in zip(look(model, tokens), want, strict=True):
                    assert torch.equal(a, b) and a.dtype == b.dtype
            torch.set_default_dtype(torch.float32)
            torch.set_default_device("meta")
            for a, b in zip(look(model, tokens), want, strict=True):
                assert torch.equal(a.to("cpu"), b)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)


def test_kernels_are_given_what_they_read():
    good = new(2, 3, 4)
    assert address(good, 2, 3, 4) == good.data_ptr() == rows(good, 2, 3, 4)[0]
    assert address(None, 2) == 0
    for bad in (good.double(), good.transpose(0, 1), good.to("meta"), good[:1], nn.Buffer(good).as_subclass(Strange)):
        with pytest.raises(
            RuntimeError, match=r"a kernel for the CPU reads contiguous torch\.float32 of shape .*; use"
        ):
            address(bad, 2, 3, 4)
    one, none = new(2, 1, 5).transpose(1, 2), new(0, 1, 1) * 2  # strides of what has no second entry are anything
    assert one.stride(-1) != 1 and none.stride(-1) != 1
    assert rows(one, 2, 5, 1) == (one.data_ptr(), 20, 4, 4) and rows(none, 0, 1, 1)[0] == none.data_ptr()
    with pytest.raises(RuntimeError, match="reads rows of float32 or bfloat16"):
        rows(good.transpose(1, 2), 2, 4, 3)


class Strange(torch.Tensor):
    pass


def total(model, parameters, tokens):
    out = functional_call(model, parameters, (tokens,), {"targets": tokens})
    return out.loss + sum(s.balance_loss + s.z_loss for s in out.router)


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), (None, torch.float32)])
@pytest.mark.parametrize("name", MODELS)
def test_functional_derivatives(name, backend, dtype):
    """torch.func in the reference and in the natural choice; a kernel that was asked for by name refuses."""
    model, tokens = build(name, dtype), tokens_of(2, 6)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    with ops.backend(backend):
        total(model, dict(model.named_parameters()), tokens).backward()
        want = {key: p.grad for key, p in model.named_parameters()}
        found = grad(lambda p: total(model, p, tokens))(parameters)
        directions = {key: torch.randn_like(p) for key, p in parameters.items()}
        _, along = jvp(lambda p: total(model, p, tokens), (parameters,), (directions,))
        each = vmap(grad(lambda p, t: total(model, p, t)), (None, 0))(parameters, tokens[:, None])
        alone = grad(lambda p: total(model, p, tokens[:1]))(parameters)
    for key, gradient in want.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each[key][0], alone[key], rtol=1e-4, atol=1e-5)
    slope = sum((directions[key] * gradient).sum() for key, gradient in want.items())
    torch.testing.assert_close(along, slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode(name):
    model, tokens = build(name, torch.float32), tokens_of(2, 6)
    model(tokens, targets=tokens).loss.backward()
    directions = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    want = sum((directions[key] * p.grad).sum() for key, p in model.named_parameters())
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(p.detach(), directions[key]) for key, p in model.named_parameters()}
        loss = functional_call(model, duals, (tokens,), {"targets": tokens}).loss
        torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, want, rtol=1e-3, atol=1e-4)


def test_kernels_refuse_forward_mode():
    x, weight = torch.randn(2, 5), torch.ones(5)
    with forward_ad.dual_level(), ops.backend("cpu"):
        assert ops.rms_norm(x, weight).shape == x.shape  # what carries no derivative may go on
        with pytest.raises(RuntimeError, match=r'knows neither torch\.func nor forward mode; use ops\.backend\("ref'):
            ops.rms_norm(forward_ad.make_dual(x, x), weight)
    with ops.backend("cpu"), pytest.raises(RuntimeError, match=r"torch\.func"):
        grad(lambda x: ops.rms_norm(x, weight).sum())(x)


def test_each_thread_chooses_for_itself():
    seen, inside, leave = {}, threading.Event(), threading.Event()

    def hold():
        with ops.backend("reference"):
            seen["held"] = ops.choose("selective_scan", torch.zeros(1))
            inside.set()
            leave.wait(20)
        seen["left"] = ops.choose("selective_scan", torch.zeros(1))

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(20)
    assert ops.choose("selective_scan", torch.zeros(1)) == "cpu"
    with ops.backend("cpu"):
        leave.set()
        thread.join()
    assert ops.choose("selective_scan", torch.zeros(1)) == "cpu"
    assert seen == {"held": "reference", "left": "cpu"}


def test_what_is_computed_again_keeps_its_backend():
    with ops.backend("reference"):
        again = ops.bound(lambda: ops.choose("selective_scan", torch.zeros(1)))
    found = []
    thread = threading.Thread(target=lambda: found.append(again()))
    thread.start()
    thread.join()
    assert found == ["reference"] and ops.choose("selective_scan", torch.zeros(1)) == "cpu"


@pytest.mark.parametrize("init", ["default", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_drawing_leaves_the_generators_of_others_alone(name, init):
    config = MODELS[name].replace(d_model=16, vocab_size=31, init=init)
    torch.manual_seed(3)
    want = MoEMamba(config).state_dict()
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = MoEMamba(config)
    draw(model.to_empty(device="cpu"), lambda tensor, values: tensor.data.copy_(values), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in want.items())


@pytest.mark.parametrize("routing", ["shared", "independent"])
@pytest.mark.parametrize("pattern", ["M", "E", "F", "A", "R"])
def test_depth_scales_what_writes_into_the_residual_stream(pattern, routing):
    kept = {"M": ["out_proj.weight"], "A": ["out_proj.weight"], "F": ["down_proj.weight"]}
    experts = ["experts.down_proj", "shared.down_proj.weight"]
    out = ["out_proj.weight"] if routing == "shared" else [f"out_proj.{name}" for name in experts]
    kept |= {"E": experts, "R": out}
    base = ModelConfig(pattern, 1, 16, 31).replace(**({"routing": routing} if pattern == "R" else {}))
    config = (
        base.replace(n_shared_experts=1) if pattern == "E" or (out != ["out_proj.weight"] and pattern == "R") else base
    )
    weights = []
    for blocks in (1, 4):
        torch.manual_seed(0)
        model = MoEMamba(config.replace(n_blocks=blocks))
        weights.append(dict(model.layers[0].branches[0].named_parameters()))
    scaled = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert sorted(scaled) == sorted(kept[pattern])
    for name in scaled:
        torch.testing.assert_close(weights[1][name] * 2, weights[0][name])


def test_replace_reaches_every_part_that_the_pattern_uses():
    config = ModelConfig("MERF")
    assert config.replace(n_experts=4).experts.n_experts == config.replace(n_experts=4).routed.experts.n_experts == 4
    assert config.replace(routing="independent", d_expert=7).routed.experts.d_expert == 7
    linear = config.replace(d_expert=7)
    assert (linear.experts.d_expert, linear.routed.experts.d_expert) == (7, None)
    assert config.replace(n_experts=2, top_k=2).experts.top_k == 2
    assert config.replace(activation="relu").feedforward.activation == "relu"
    assert ModelConfig("M").replace(pattern="E", n_experts=3).experts.n_experts == 3
    assert preset("inner-moe-mamba-25m", n_experts=8).routed.experts.n_experts == 8
    for pattern, change in (("M", "n_experts"), ("E", "n_heads"), ("A", "d_state"), ("ME", "d_ff"), ("R", "d_expert")):
        with pytest.raises(ValueError, match=f"{change} would change nothing: no letter of the pattern '{pattern}'"):
            ModelConfig(pattern).replace(**{change: 2})
    with pytest.raises(ValueError, match="nonsense is no field of the configuration"):
        config.replace(nonsense=1)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", HOOKS)
def test_every_hook_inside_a_mamba_layer_fires(kind):
    torch.manual_seed(0)
    model, seen = MoEMamba(ModelConfig("M", 1, 32, 29)), []
    layer = model.layers[0].branches[0]
    tokens = torch.randint(0, 29, (2, 5))
    for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
        child = getattr(layer, name)
        getattr(child, f"register_{kind}")(lambda *_, name=name: seen.append(name))
        assert why_not_plain(child, type(child)).startswith("has a ")
    assert len(reasons(model)) == 5
    model(tokens, targets=tokens).loss.backward()
    assert sorted(seen) == ["conv1d", "dt_proj", "in_proj", "out_proj", "x_proj"]


def test_a_weight_of_another_type_is_noticed():
    layer = nn.Linear(3, 3)
    assert why_not_plain(layer, nn.Linear) is None
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Strange))
    assert why_not_plain(layer, nn.Linear) == "has a Strange as its weight"
    assert why_not_plain(layer, nn.Module) == "is a Linear, not a Module"
