"""What is said about a comparison, in words and tables: the one content of its HTML page and of its markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..results import Comparison, Reproduction, Row, Spread
from .wording import HEADER, Measure, about, cells, says, signed, text_error, verdict


@dataclass(frozen=True)
class Grid:
    """A table."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One comparison: a title, sentences on the outcome, then parts with their headings."""

    title: str
    lead: Sequence[str]
    parts: Sequence[tuple[str, Sequence[str | Grid]]]
    command: str | None


def section(found: Comparison) -> Section:
    """What is said about a comparison."""
    more = " The paper's numbers are smoothed training losses on C4." if found.paper else ""
    if any(row.drop_gap.values for row in found.rows):
        more += " A drop gap is what the capacity limits of training would add to the loss."
    parts: list[tuple[str, Sequence[str | Grid]]] = [
        (
            "Results",
            [budget(found), _results(found), loss_notes(found.seeds) + more, *reported_tests(found), _besides(found)],
        ),
        ("Steps to equal loss", [*_steps(found), STEPS_NOTES]),
    ]
    title = " · ".join(row.name for row in found.rows)
    if found.paper:
        title = found.paper.title
        capped = any(row.drop_gap.values for row in found.rows)
        by: dict[str, Measure] = {"held-out": "loss", **({"with capacity": "capped_loss"} if capped else {})}
        by |= {"averaged weights": "averaged"} if any(row.averaged.values for row in found.rows) else {}
        by |= {"training loss": "training_loss"}
        if any(row.test.values for row in found.rows):
            averaged = any(row.averaged_test.values for row in found.rows)
            more_tests: dict[str, Measure] = {"test with capacity": "capped_test"} if capped else {}
            more_tests |= {"test, averaged weights": "averaged_test"} if averaged else {}
            by = {"test": "test", **more_tests, **by}
        claims = [(says(c), *(verdict(c, found.rows, measure) for measure in by.values())) for c in found.paper.claims]
        parts.append(("Claims", [Grid(("claim", *by), claims), CLAIMS_NOTES]))
        parts.append(("Learning rates", _rates(found.paper)))
    return Section(title, [headline(row) for row in found.rows[1:]], parts, found.command)


def budget(found: Comparison) -> str:
    """Data, tokens and seeds in a sentence or two."""
    settings, seeds = found.settings, found.seeds
    steps = settings["steps"]
    others = {name: recipe["steps"] for name, recipe in found.recipes.items() if recipe.get("steps", steps) != steps}
    own = (
        f"But {name} ran for {n:,} steps, {n * found.step_tokens:,} tokens, {_schedule(found.recipes[name])}. "
        for name, n in others.items()
    )
    return (
        f"Every model saw the same {steps * found.step_tokens:,} tokens in the same order: {steps:,} steps of "
        f"{settings['batch_size']} × {settings['context']} tokens, {seeds} seed{'s' if seeds != 1 else ''}. "
        f"{''.join(own)}Data: {settings['data']}; tokenizer: {settings['tokenizer']}."
    )


def _schedule(recipe: Mapping[str, Any]) -> str:
    """Of a model with steps of its own."""
    if trunk := recipe.get("trunk"):
        return f"a branch of {trunk}, whose steps it shares up to its own cool-down"
    return "with a schedule of that length"


def headline(row: Row) -> str:
    """One sentence on how a model stands to the baseline, on the test text where there is one."""
    if row.test_difference.values and len(row.test_difference.values) == len(row.difference.values):
        return _headline(replace(row, difference=row.test_difference), " on the test text")
    return _headline(row, "")


def _headline(row: Row, where: str) -> str:
    d = row.difference
    if row.missing or not d.values:
        return f"{row.name}: {row.verdict}."
    if d.std is not None and not d.clear:
        return f"{row.name} shows no clear difference from the baseline{where}: {signed(d)} nats per token."
    side = "below" if d.mean < 0 else "above"
    text = f"{row.name} ends {abs(d.mean):.3f} nats per token {side} the baseline{where} ({row.verdict})"
    if row.speed_up and d.mean < 0 and row.speed_up.mean > 1:
        others = {"with the capacity of training": row.capped_speed_up} if row.drop_gap.values else {}
        others |= {"by training loss": row.training_speed_up}
        also = ", ".join(f"{k} {f'{v.mean:.2f}×' if v else 'not at all'}" for k, v in others.items())
        final = "final held-out loss" if where else "final loss"
        text += f" and reaches its {final} in {row.speed_up.mean:.2f}× fewer steps ({also})"
    own = f"; that is with a schedule of its own, of {row.steps:,} steps" if row.own_schedule else ""
    return f"{text}{own}."


def loss_notes(seeds: int) -> str:
    """What the losses mean, to stand under their table."""
    spread = f"mean ± standard deviation, {seeds} seeds" if seeds > 1 else "one seed, so its spread is unknown"
    paired = " (lowest … highest)" if seeds > 1 else ""
    return (
        f"Held-out loss in nats per token at the last step, without auxiliary losses or dropping: {spread}. "
        f"Differences and speed-ups are paired by seed: same batches, same order{paired}. Parameters are without "
        "embedding and head."
    )


CLAIMS_NOTES = (
    "Differences are paired by seed, ± their standard error. A claim is confirmed or contradicted where all seeds "
    "agree and the mean exceeds twice that error. With one seed no error can be stated, so only the side is."
)

OWN_NOTES = (
    "A schedule of its own: the learning rate of these models fell within fewer or more steps than the baseline's. The "
    "paper compares within one schedule, so its speed-ups are not to be set beside these."
)

STEPS_NOTES = (
    "Steps to the baseline's final loss are interpolated between evaluations, on the lowest held-out loss so far; the "
    "speed-up is the baseline's steps over them. Beside it the same with the capacity limits of training, so with the "
    "tokens dropped that they drop, and by the paper's measure: training loss smoothed with weight 0.001 a step (15 "
    "over the steps in runs of fewer than 15,000), but without auxiliary losses. In time: the held-out speed-up times "
    "this model's tokens a second over the baseline's, which means something only where each run had its machine to "
    "itself."
)


def _results(found: Comparison) -> Grid:
    """Each model's loss by its measures (held-out dropless, with the capacity of training, with averaged weights, in
    training), each with its difference from the baseline's, beside the paper's if there is one."""
    own = ("parameters", "active", "held-out loss", "vs baseline")
    more = ("training loss", "vs its training")
    rows, baseline, paper = _cells(found), found.rows[0].name, found.paper
    averaged = {
        row.name: (about(row.averaged), signed(row.averaged_difference) if row.name != baseline else "baseline")
        for row in found.rows
        if row.averaged.values
    }
    gaps = {row.name: f"{row.drop_gap.mean:+.4f}".replace("-", "−") for row in found.rows if row.drop_gap.values}
    return Grid(
        (
            *("model", *own),
            *(("paper", "paper's difference") if paper else ()),
            *(("drop gap", "with capacity", "vs its capacity") if gaps else ()),
            *(("averaged", "vs its lower of two") if averaged else ()),
            *more,
        ),
        [
            (
                *(row[key] for key in ("model", *own)),
                *(_printed(paper, name, baseline) if paper else ()),
                *((gaps.get(name, "–"), row["with capacity"], row["vs its capacity"]) if gaps else ()),
                *(averaged.get(name, ("–", "–")) if averaged else ()),
                *(row[key] for key in more),
            )
            for name, row in rows.items()
        ],
    )


TEST_NOTES = (
    "Test loss: nats per token over all of a text, or of the half of the held-out text, that nothing was chosen by, at "
    "the end of each run. The figure behind ± is its standard error over that text, from {blocks} parts of consecutive "
    "windows; of a difference from the baseline, part by part. It does not know what another seed would change."
)


def reported_tests(found: Comparison) -> list[str | Grid]:
    """The finished runs on the text that nothing was chosen by; nothing where no run has such."""
    tested = [row for row in found.rows if row.test.values]
    if not tested:
        return []
    baseline, capped = found.rows[0], any(row.drop_gap.values for row in found.rows)
    averaged = any(row.averaged_test.values for row in tested)
    rows = []
    for row in tested:
        first = row is baseline
        tests = [test for test in row.tests if test]
        with_capacity = (
            f"{row.capped_test.mean:.4f}",
            "baseline" if first else signed(row.capped_test_difference),
        )
        rows.append(
            (
                row.name,
                f"{tests[0].tokens:,}",
                f"{row.test.mean:.4f}{_over_text(tests[0].standard_error)}",
                "baseline" if first else f"{signed(row.test_difference)}{_over_text(text_error(row, baseline))}",
                *(with_capacity if capped else ()),
                *(
                    (_mean(row.averaged_test), "baseline" if first else signed(row.averaged_test_difference))
                    if averaged
                    else ()
                ),
            )
        )
    more = [*(("with capacity", "vs its capacity") if capped else ())]
    more += ["averaged weights", "vs its lower of two"] if averaged else []
    blocks = len(next(test for test in tested[0].tests if test).blocks)
    return [Grid(("model", "tokens", "test loss", "vs baseline", *more), rows), TEST_NOTES.format(blocks=blocks)]


def _mean(spread: Spread) -> str:
    return f"{spread.mean:.4f}" if spread.values else "–"


def _over_text(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _besides(found: Comparison) -> Grid:
    """What is measured beside the losses, each model's learning rate, and how often it read the corpus if known."""
    keys, texts = ("accuracy", "bits/byte"), _cells(found)
    read = {row.name: found.epochs(row) for row in found.rows} if found.train_tokens else {}
    rows = [
        (
            row.name,
            *(texts[row.name][key] for key in keys),
            f"{found.setting(row.name, 'learning_rate'):g}",
            *((f"{epochs:.3g}" if (epochs := read[row.name]) else "–",) if read else ()),
        )
        for row in found.rows
    ]
    return Grid(("model", *keys, "learning rate", *(("epochs",) if read else ())), rows)


def _steps(found: Comparison) -> list[str | Grid]:
    """Steps to equal loss, beside the paper's if it gives them; schedules of their own in another table."""
    printed = found.paper.faster if found.paper else {}
    own = [row for row in found.rows if row.own_schedule]
    blocks: list[str | Grid] = [_steps_of(found, [row for row in found.rows if not row.own_schedule], printed)]
    return [*blocks, OWN_NOTES, _steps_of(found, own, {})] if own else blocks


def _steps_of(found: Comparison, rows: Sequence[Row], printed: Mapping[str, float]) -> Grid:
    texts, capped = _cells(found), any(row.drop_gap.values for row in found.rows)
    keys = {
        "steps to its loss": "steps to its loss",
        "speed-up, held-out": "speed-up",
        **({"with capacity": "speed-up with it"} if capped else {}),
        "training loss": "speed-up by it",
        "tokens/s": "tokens/s",
        "speed-up in time": "speed-up in time",
    }
    return Grid(
        ("model", *keys, *(("paper's speed-up",) if printed else ())),
        [
            (
                row.name,
                *(texts[row.name][key] for key in keys.values()),
                *((f"{printed[row.name]:.2f}×" if row.name in printed else "–",) if printed else ()),
            )
            for row in rows
        ],
    )


def _cells(found: Comparison) -> dict[str, dict[str, str]]:
    """By model and column."""
    texts = [dict(zip(HEADER, row, strict=True)) for row in cells(found.rows)]
    for row, text in zip(found.rows, texts, strict=True):
        first = row is found.rows[0]
        text["vs its capacity"] = "baseline" if first else signed(row.capped_difference)
        text["vs its training"] = "baseline" if first else signed(row.training_difference)
    return {text["model"]: text for text in texts}


def _printed(paper: Reproduction, model: str, baseline: str) -> tuple[str, str]:
    """The paper's loss, and its difference from the paper's baseline."""
    loss, other = paper.printed.get(model), paper.printed.get(baseline)
    if loss is None:
        return "–", "–"
    return f"{loss:.2f}", "–" if other is None else f"{loss - other:+.2f}".replace("-", "−")


def _rates(paper: Reproduction) -> list[str | Grid]:
    """How the learning rates were chosen."""
    if not paper.tunings:
        return ["Learning rates were given, not tuned."]
    tried = sorted({rate for tuning in paper.tunings.values() for rate in tuning.losses})
    rows = []
    for name, tuning in paper.tunings.items():
        at = {rate: "diverged" if math.isinf(loss) else f"{loss:.4f}" for rate, loss in tuning.losses.items()}
        edge = "yes" if tuning.beyond is not None else "no"
        rows.append((name, *(at.get(rate, "") for rate in tried), f"{tuning.chosen:g}", edge))
    return [
        f"The best after {paper.tuning_steps:,} steps with seed 0, chosen alike for every model; a grid was widened "
        "by a factor of two, at most twice, where its best rate lay at its edge. Held-out loss of each:",
        Grid(("model", *(f"{rate:g}" for rate in tried), "chosen", "still at the edge"), rows),
    ]
