"""What is minimised: the language model's loss, and besides it the routers' losses, weighed here and nowhere else."""

from typing import NamedTuple

from torch import Tensor

from ...config import ExpertsConfig
from ...model import Output


class Losses(NamedTuple):
    """Scalars, each with its gradient."""

    language: Tensor
    """() mean cross-entropy in nats; no auxiliary loss in it"""
    auxiliary: Tensor
    """() weighed losses of the routers, averaged over them; 0 without routers"""


def losses(output: Output, routers: tuple[ExpertsConfig, ...]) -> Losses:
    """The two parts of the training loss.

    Args:
        output: of the model, with targets.
        routers: `config.routers`, whose weights apply.
    """
    assert output.loss is not None, "the model was called without targets"
    auxiliary = output.loss.new_zeros(())
    for stats, experts in zip(output.router, routers, strict=True):
        auxiliary = auxiliary + experts.balance_weight * stats.balance_loss + experts.z_weight * stats.z_loss
    return Losses(output.loss, auxiliary / max(1, len(routers)))
