"""What the runs say of a claim."""

import math
import statistics
from collections.abc import Sequence

from .results import Row
from .tables import Claim


def verdict(claim: Claim, rows: Sequence[Row]) -> str:
    """What the runs say of a claim: "confirmed", "contradicted" or "no clear difference", with the difference.

    Differences are paired by seed; one stands out if all seeds agree and its mean exceeds their standard deviation.
    """
    by_name = {row.name: row for row in rows}
    better, worse = by_name[claim.better], by_name[claim.worse]
    sides = (better.accuracy, worse.accuracy) if claim.accuracy else (better.loss, worse.loss)
    ours, theirs = (
        dict(zip(row.seeds, side.values, strict=True)) if len(side.values) == len(row.seeds) else {}
        for row, side in zip((better, worse), sides, strict=True)
    )
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not differences:
        return f"not to be judged ({', '.join(f'{row.name}: {row.missing}' for row in (better, worse) if row.missing)})"
    mean, seeds = statistics.fmean(differences), len(differences)
    gain = [d > 0 if claim.accuracy else d < 0 for d in differences]
    clear = math.isfinite(mean) and (seeds == 1 or abs(mean) > statistics.stdev(differences))
    found = "no clear difference"
    if clear and (all(gain) or not any(gain)):
        found = "confirmed" if all(gain) else "contradicted"
    text = f"{mean:+.2%}" if claim.accuracy else f"{mean:+.4f} nats"
    return f"{found} ({text}, {seeds} seed{'s' if seeds > 1 else ''})".replace("-", "−")


def says(claim: Claim) -> str:
    """A claim in words."""
    return f"{claim.better} {'more accurate than' if claim.accuracy else 'below'} {claim.worse}"
