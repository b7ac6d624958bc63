"""Arguments of every op, in the order in which its face hands them on: what the tests of doors are generated from."""

import torch

from moemamba.ops.mamba_step import Inner

CONSTANT = {"valid"}  # floating, but no op has a gradient of it


def _packed(batch, length):
    seq_idx = (torch.rand(batch, length) < 0.2).cumsum(1)
    return seq_idx.masked_fill(torch.rand(batch, length) < 0.2, -1).int()


def selective_scan():
    b, l, i, n = 2, 37, 11, 5  # noqa: E741
    u, dt, z = torch.randn(3, b, l, i)
    B, C = torch.randn(2, b, l, n)
    x = {"u": u, "dt": dt, "A": -torch.rand(i, n) - 0.1, "B": B, "C": C, "D": torch.randn(i), "z": z}
    x |= {"dt_bias": torch.randn(i), "dt_softplus": True, "initial_state": torch.randn(b, i, n)}
    yield x | {"seq_idx": _packed(b, l)}
    yield x | {"D": None, "z": None, "dt_bias": None, "dt_softplus": True, "initial_state": None, "seq_idx": None}


def causal_conv1d():
    x = {"x": torch.randn(2, 19, 8), "weight": torch.randn(8, 4), "bias": torch.randn(8), "activation": "silu"}
    yield x | {"initial_state": torch.randn(2, 8, 3), "seq_idx": _packed(2, 19)}
    yield x | {"bias": None, "activation": None, "initial_state": None, "seq_idx": None}


def linear():
    yield {
        "x": torch.randn(3, 64),
        "weight": torch.randn(1100, 64),
        "bias": torch.randn(1100),
    }  # large enough to stream
    yield {"x": torch.randn(2, 5, 7), "weight": torch.randn(4, 7), "bias": None}


def linear_beside():
    yield {"x": torch.randn(2, 9, 16), "weight": torch.randn(7, 16)}


def norm_linear():
    for rows, activation in ((1, None), (5, "swiglu"), (20, "relu2")):
        x = {"x": torch.randn(rows, 24), "weight": torch.randn(38, 24), "bias": torch.randn(38)}
        norm = {"norm_weight": torch.randn(24), "norm_bias": torch.randn(24) if rows > 1 else None}
        yield x | norm | {"eps": 1e-3, "activation": activation}
    yield x | dict.fromkeys(("bias", "norm_weight", "norm_bias")) | {"eps": 1e-5, "activation": "gelu"}


def linear_add():
    for rows in (1, 5, 20):
        x = {"x": torch.randn(rows, 24), "weight": torch.randn(38, 24)}
        yield x | {"bias": torch.randn(38) if rows == 5 else None, "residual": torch.randn(rows, 38)}


def rms_norm():
    yield {"x": torch.randn(3, 13, 21), "weight": torch.randn(21), "eps": 1e-5}
    yield {"x": torch.randn(3, 13, 21), "weight": None, "eps": 1e-3}


def _choices(tokens, top_k, n_experts):
    """With dropped ones, and expert 1 empty."""
    indices = torch.rand(tokens, n_experts + 1).argsort(1)[:, :top_k]
    return indices.masked_fill(indices == 1, n_experts)


def expert_feedforward():
    for activation, rows in (("relu", 6), ("swiglu", 12)):
        x = {"x": torch.randn(17, 8), "indices": _choices(17, 2, 4), "gates": torch.rand(17, 2)}
        yield x | {"up": torch.randn(4, rows, 8), "down": torch.randn(4, 8, 6), "activation": activation}
    x |= {"up": torch.randn(4, 12, 8), "down": torch.randn(4, 8, 6), "activation": "geglu"}
    yield x | {"up_bias": torch.randn(4, 12), "down_bias": torch.randn(4, 8)}
    yield x | {"up": torch.randn(4, 6, 8), "activation": "relu2"}


def activate():
    yield from ({"x": torch.randn(5, 3, 14), "activation": name} for name in ("relu", "gelu", "silu", "swiglu"))


def expert_linear():
    x = {"x": torch.randn(17, 8), "indices": _choices(17, 2, 4), "gates": torch.rand(17, 2)}
    yield x | {"weight": torch.randn(4, 6, 8)}
    yield x | {"gates": None, "weight": torch.randn(4, 6, 8)}


def grouped_linear():
    yield {"x": torch.randn(9, 8), "weight": torch.randn(3, 6, 8), "counts": torch.tensor([2, 0, 5])}


def places_in_queues():
    yield {"queues": torch.randint(0, 5, (150,)), "n_queues": 6}


def linear_cross_entropy():
    x = {"hidden": torch.randn(23, 16), "weight": torch.randn(37, 16), "targets": torch.randint(0, 37, (23,))}
    x["targets"][3:7] = -100
    yield from (x | {"ignore_index": -100, "reduction": reduction} for reduction in ("mean", "sum"))


def linear_argmax():
    yield {"x": torch.randn(3, 16), "weight": torch.randn(200, 16)}


def mamba_step():
    b, d, i, n, k, r = 2, 16, 32, 5, 4, 3
    shapes = {"x": (b, 1, d), "conv_state": (b, i, k - 1), "ssm_state": (b, i, n), "in_proj": (2 * i, d)}
    shapes |= {"conv_weight": (i, k), "conv_bias": (i,), "x_proj": (r + 2 * n, i), "dt_proj": (i, r), "dt_bias": (i,)}
    shapes |= {"A_log": (i, n), "D": (i,), "out_proj": (d, i)}
    x = {name: torch.randn(shape) / 2 for name, shape in shapes.items()}
    rest = {"norm_weight": None, "norm_bias": None, "eps": 1e-5, "in_place": False}
    yield x | {"inner": None} | rest
    yield x | {"inner": Inner(torch.randn(r), torch.randn(n), torch.randn(n), 1e-3)} | rest
    yield x | {"inner": Inner(None, None, None, 1e-6)} | rest
    yield x | {"inner": None} | rest | {"norm_weight": torch.randn(d), "norm_bias": torch.randn(d)}


def moe_step():
    b, d, e, f = 5, 16, 6, 20
    x = {"x": torch.randn(b, 1, d), "router": torch.randn(e, d), "balance_bias": torch.randn(e) / e}
    rest = {"logit_bias": None, "scores": "softmax", "up_bias": None, "down_bias": None}
    for activation, rows, top_k in (("relu", f, 1), ("swiglu", 2 * f, 2)):
        weights = {"up": torch.randn(e, rows, d) / 4, "down": torch.randn(e, d, f) / 4, "top_k": top_k}
        yield x | weights | {"activation": activation} | rest
    rest = {"logit_bias": torch.randn(e), "scores": "sigmoid", "up_bias": torch.randn(e, 2 * f)}
    rest |= {"down_bias": torch.randn(e, d), "norm_weight": torch.randn(d), "norm_bias": torch.randn(d), "eps": 1e-3}
    yield x | weights | {"activation": "geglu"} | rest
    yield x | weights | {"activation": "geglu"} | rest | {"x": torch.randn(23, 1, d), "norm_bias": None}


def attention():
    q, k, v = torch.randn(3, 2, 3, 9, 20)
    yield {"q": q, "k": k, "v": v, "visible": None}
    yield {"q": torch.randn(2, 6, 9, 20), "k": k, "v": v, "visible": None}
    k, v = torch.randn(2, 2, 3, 150, 20)
    yield {"q": q, "k": k, "v": v, "visible": None}
    yield {"q": q, "k": k, "v": v, "visible": (torch.rand(2, 9, 150) < 0.7) | (torch.arange(150) == 3)}
    yield {"q": q, "k": k, "v": v, "visible": (torch.arange(150) < 141 + torch.arange(9)[:, None]).expand(2, -1, -1)}


def attention_step():
    for heads, groups, width, base in ((3, 3, 20, 1e4), (6, 2, 16, None)):
        keys, values = torch.randn(2, 3, groups, 150, width)
        place = torch.tensor([0, 70, 149])
        positions = torch.arange(150) - torch.tensor([0, 3, 0])[:, None]
        positions = positions.masked_fill((positions < 0) | (torch.arange(150) >= place[:, None]), -1)
        qkv = torch.randn(3, (heads + 2 * groups) * width)
        yield {"qkv": qkv, "keys": keys, "values": values, "positions": positions, "place": place, "base": base}


def rotary():
    yield {"x": torch.randn(2, 3, 5, 8), "place": torch.randint(0, 100, (2, 5)), "base": 1e4}


def _router(tokens):
    return {"x": torch.randn(tokens, 16), "weight": torch.randn(5, 16)}


def router():
    x = _router(24) | {"bias": torch.randn(5) / 5, "top_k": 2}
    yield x | {"valid": (torch.rand(24) < 0.8).float(), "groups": 3}
    yield x | {"top_k": 1, "valid": None, "groups": 1}
    yield x | {"valid": None, "groups": 2, "logit_bias": torch.randn(5), "scores": "sigmoid"}


def router_choices():
    yield _router(7) | {"bias": torch.randn(5) / 5, "top_k": 2}
    yield _router(7) | {"bias": torch.randn(5) / 5, "top_k": 2, "logit_bias": torch.randn(5), "scores": "sigmoid"}


def router_means():
    yield {"logits": torch.randn(7, 5), "bias": torch.randn(5) / 5, "top_k": 2}
    yield {"logits": torch.randn(7, 5), "bias": torch.randn(5) / 5, "top_k": 2, "scores": "sigmoid"}


def router_logits():
    yield _router(7)


def of(op):
    """The samples of an op by its name: dicts of its arguments."""
    torch.manual_seed(0)
    return list(globals()[op]())
