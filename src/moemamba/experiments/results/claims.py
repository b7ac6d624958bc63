"""What the runs say of a claim."""

from collections.abc import Sequence
from typing import Literal

from ..paper.tables import Claim
from .comparison import Row, Spread

Measure = Literal["loss", "capped_loss", "training_loss"]


def verdict(claim: Claim, rows: Sequence[Row], measure: Measure = "loss") -> str:
    """What the runs say of a claim: "confirmed", "contradicted" or "no clear difference", with the difference and its
    standard error; with one seed only which side is lower (or more accurate), since its noise is unknown.

    Differences are paired by seed; `Spread.clear` says which stand out.

    Args:
        measure: of a claim on loss: held-out, held-out with the capacity limits of training, or smoothed training loss.
    """
    by_name = {row.name: row for row in rows}
    better, worse = by_name[claim.better], by_name[claim.worse]
    sides = [getattr(row, "accuracy" if claim.accuracy else measure) for row in (better, worse)]
    ours, theirs = (
        dict(zip(row.seeds, side.values, strict=True)) if len(side.values) == len(row.seeds) else {}
        for row, side in zip((better, worse), sides, strict=True)
    )
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not differences:
        return f"not to be judged ({', '.join(f'{row.name}: {row.missing}' for row in (better, worse) if row.missing)})"
    d, form, unit = Spread(tuple(differences)), *((".2%", "") if claim.accuracy else (".4f", " nats"))
    mean, error = format(d.mean, f"+{form}"), d.standard_error
    if error is None:
        side = "lower" if d.mean < 0 else "higher" if d.mean > 0 else "no difference"
        return f"{side}, one seed ({mean}{unit})".replace("-", "−")
    found = "no clear difference"
    if d.clear:
        found = "confirmed" if (d.mean > 0) == claim.accuracy else "contradicted"
    return f"{found} ({mean} ± {error:{form}}{unit}, {len(differences)} seeds)".replace("-", "−")


def says(claim: Claim) -> str:
    """A claim in words."""
    return f"{claim.better} {'more accurate than' if claim.accuracy else 'below'} {claim.worse}"
