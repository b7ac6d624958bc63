"""`moemamba plan`: a scaling law from comparisons, and by it which model to train."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..counting import size
from ..host.files import expanded
from ..reading import amount, validate
from .options import Place
from .terminal import line, parse, show, show_json

if TYPE_CHECKING:
    from ..experiments.law import Law
    from ..experiments.law import Plan as Planned

REACHED = 0.35  # of the speed of a large product, by training: 0.3 to 0.4 on an H100 (docs/performance.md)


@dataclass(frozen=True)
class Plan:
    """First fit a scaling law (--fit) to comparisons that you have run, of models of several sizes, tokens and numbers
    of experts; none comes with this package. Then plan a model by it (--law): for so many active parameters and tokens
    the expected loss with more and more experts, rate, batch, time and memory on this machine, and the command that
    trains it."""

    active: str = "25M"
    """parameters that a token passes through, without embedding and head: 25M"""
    tokens: str = "10B"
    """tokens to train on: 10B"""
    experts: tuple[int, ...] | None = None
    """experts for each that a token visits, 1 for none; what the law has seen if None"""
    law: Place | None = None
    """file of the law, which --fit writes and a plan reads; has to be given"""
    fit: tuple[Place, ...] | None = None
    """fit the law to these comparisons, folders that `moemamba compare` or `paper` wrote, of ten models or more (needs
    scipy), and write it to --law"""
    speed: float | None = None
    """tera-operations a second that training reaches here; measured from a large product if None"""
    device: str = "auto"
    """what time and memory are for: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    json: bool = False
    """print one JSON object in place of tables"""

    def __post_init__(self) -> None:
        validate(self, positive=("speed",))
        for value in self.experts or ():
            if not 1 <= value <= 1 << 20:
                raise ValueError(f"experts has {value}; choose numbers from 1 on")


def main(arguments: Sequence[str]) -> None:
    asked = parse(Plan, arguments, "plan")
    from ..experiments.law import plans, read_law

    if asked.fit is not None:
        _fit(asked)
        return
    law = read_law(_file(asked))
    found = plans(law, amount(asked.active, "active"), amount(asked.tokens, "tokens"), asked.experts)
    speed, memory, where = _machine(asked)
    chosen = min((plan for plan in found if memory is None or plan.memory <= memory), key=_loss, default=None)
    if asked.json:
        show_json(
            {
                "law": vars(law.fitted),
                "operations a second": speed,
                "memory": memory,
                "plans": [_plain(plan, speed) for plan in found],
                "chosen": None if chosen is None else found.index(chosen),
            }
        )
        return
    _tell(law, found, chosen, speed, memory, where)


def _loss(plan: "Planned") -> float:
    return plan.loss


def _file(asked: Plan) -> Path:
    """Where the law is."""
    if asked.law is None:
        raise ValueError(
            "a plan needs a scaling law, and none comes with this version: fit one to comparisons of your own "
            "(moemamba plan --fit runs/a runs/b --law law.json), then name it with --law law.json"
        )
    return expanded(asked.law)


def _fit(asked: Plan) -> None:
    from ..experiments.law import fit, points, write_law
    from ..experiments.results import read_results

    if asked.law is None or not asked.fit:
        raise ValueError("--fit needs comparisons, and --law, the file to write: --fit runs/a runs/b --law law.json")
    comparisons = [read_results(expanded(run)) for run in asked.fit]
    found, measure = points(comparisons)
    settings = comparisons[0].settings
    law = fit(found, settings["data"], settings["tokenizer"], measure)
    write_law(law, expanded(asked.law))
    if asked.json:
        show_json({name: value for name, value in vars(law).items() if isinstance(value, float)} | vars(law.fitted))
        return
    known = law.fitted
    show(
        [
            ("points", f"{known.points:,}", f"of {known.models:,} models, {known.measure} loss"),
            ("residual", f"{known.residual:.4f}", f"nats, root mean square; {known.largest:.4f} at most"),
            ("held out", f"{known.held_out:.4f}", f"each model by the others; {known.held_out_largest:.4f} at most"),
        ]
    )
    numbers = ", ".join(f"{name} = {value:.5g}" for name, value in vars(law).items() if isinstance(value, float))
    line(f"L = a E^d N^(alpha + g ln E) + b E^w D^(beta + z ln E) + c with {numbers}")
    line(f"law: {asked.law}")


def _machine(asked: Plan) -> tuple[float, int | None, str]:
    """Operations a second that training reaches, bytes there are, and how that is known."""
    from ..checkpoint import device_memory
    from ..device import find_device, product_speed

    device = find_device(asked.device)
    memory = device_memory(device)
    if asked.speed is not None:
        return asked.speed * 1e12, memory, "as told"
    reached = product_speed(device)
    return REACHED * reached, memory, f"{REACHED:.0%} of the {reached / 1e12:.3g} that a product reaches on {device}"


def _tell(
    law: "Law", found: "Sequence[Planned]", chosen: "Planned | None", speed: float, memory: int | None, where: str
) -> None:
    rows = [
        (
            f"{plan.experts:g}",
            f"{plan.model.pattern} × {plan.model.n_blocks}, {plan.model.d_model}",
            f"{plan.parameters.total / 1e6:,.1f}M",
            f"{plan.parameters.active / 1e6:,.1f}M",
            f"{plan.loss:.4f}",
            _time(plan.operations / speed),
            size(plan.memory) + ("" if memory is None or plan.memory <= memory else ", too much"),
        )
        for plan in found
    ]
    show(rows, ("experts", "layers, width", "parameters", "active", "expected loss", "time", "memory"))
    known = law.fitted
    print(
        f"\nThe law was fitted to {known.models} models ({known.data}); it misses models that it has not seen by ",
        end="",
    )
    print(f"{known.held_out:.4f} nats, {known.held_out_largest:.4f} at most.")
    for beyond in dict.fromkeys(said for plan in found for said in plan.beyond):
        line(f"Beyond it: {beyond}.")
    line(f"Time: {speed / 1e12:.3g} tera-operations a second, {where}. Memory: without activations.")
    if chosen is None:
        there = "" if memory is None else f" of {size(memory)}"
        line(f"None of them can be trained in the memory{there}: fewer --experts, or several devices.")
    else:
        line("Lowest of what fits:")
        line(chosen.command)


def _plain(plan: "Planned", speed: float) -> dict[str, object]:
    """For programs."""
    return {
        "experts": plan.experts,
        "d_model": plan.model.d_model,
        "n_blocks": plan.model.n_blocks,
        "parameters": plan.parameters.total,
        "active": plan.parameters.active,
        "loss": plan.loss,
        "beyond": list(plan.beyond),
        "learning_rate": plan.learning_rate,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "operations": plan.operations,
        "seconds": plan.operations / speed,
        "memory": plan.memory,
        "command": plan.command,
    }


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} seconds"
