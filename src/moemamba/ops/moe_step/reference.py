"""One position of a mixture-of-experts sub-layer in plain PyTorch: what it means."""

import torch.nn.functional as F
from torch import Tensor

from ..dense.reference import rms_norm
from ..experts.reference import expert_feedforward
from ..router.reference import route


def moe_step(
    x: Tensor,
    router: Tensor,
    balance_bias: Tensor,
    up: Tensor,
    down: Tensor,
    top_k: int,
    activation: str = "relu",
    logit_bias: Tensor | None = None,
    scores: str = "softmax",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `moemamba.ops.moe_step`."""
    h = x[:, 0]
    if norm_weight is not None and norm_bias is None:
        h = rms_norm(h, norm_weight, eps)
    elif norm_weight is not None:
        h = F.layer_norm(h, norm_weight.shape, norm_weight, norm_bias, eps)
    indices, gates = route(h, router, balance_bias, top_k, logit_bias, scores)
    y = expert_feedforward(h, indices, gates, up, down, activation, up_bias, down_bias)[:, None]
    return y if norm_weight is None else x + y
