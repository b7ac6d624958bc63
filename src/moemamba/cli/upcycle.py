"""`moemamba upcycle`: a dense model as a mixture of experts that computes the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..counting import count_parameters
from ..host.files import expanded
from ..reading import validate
from .options import Place, Positional
from .terminal import line, parse, show


@dataclass(frozen=True)
class Upcycle:
    """Make a dense model a mixture of experts that computes the same at first: feed-forward layers become experts that
    are copies of them; a model without any gets experts that add nothing yet after each Mamba layer."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    experts: int | tuple[int, ...] = 8
    """experts of each layer; several numbers are those of each layer, bottom to top"""
    top_k: int | None = None
    """experts that each token visits; as many as make up one copy, --granularity, if None"""
    granularity: int = 1
    """slices that a feed-forward layer is cut into, an expert each"""
    d_expert: int | None = None
    """hidden width of experts after Mamba layers, where there is no feed-forward layer to copy"""
    router_std: float = 0.0
    """how far the routers of copies begin from zero; 0 keeps the function exactly, 0.001 spreads tokens over the copies
    from the first step on"""
    seed: int = 0
    """a number that fixes what is drawn"""
    out: Place | None = None
    """the new folder, for train --start; beside the run, with -upcycled behind its name, if None"""

    def __post_init__(self) -> None:
        validate(self, positive=("experts", "top_k", "granularity", "d_expert"), not_negative=("router_std", "seed"))


def main(arguments: Sequence[str]) -> None:
    asked = parse(Upcycle, arguments, "upcycle")
    out = expanded(asked.out or f"{asked.run.rstrip('/')}-upcycled")
    from ..finetuning.upcycling import upcycle

    how = (asked.experts, asked.top_k, asked.granularity, asked.d_expert, asked.router_std, asked.seed)
    found = upcycle(asked.run, out, *how)
    counts = [count_parameters(config) for config in (found.before, found.config)]
    rows = [
        (name, config.pattern, f"{count.total:,}", f"{count.active:,}")
        for name, config, count in zip(("before", "after"), (found.before, found.config), counts, strict=True)
    ]
    show(rows, ("", "pattern", "parameters", "active"))
    line(
        f"its logits differ by {found.difference:.1e} at most, of a standard deviation of {found.spread:.2f}",
        apart=True,
    )
    line(f"written to {out}. Go on with: moemamba train --start {out} --run ...")
