"""The law fitted: least squares of the logarithm of the loss, robust, from many starts; scipy does the descent."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .law import Anchor, Fitted, Law
from .points import Point

LEAST = 10  # points: the law has nine numbers
ROBUST = 1e-3  # residual of ln L from which a point counts less than its square

Array = NDArray[np.float64]


def fit(found: Sequence[Point], data: str, tokenizer: str, measure: str) -> Law:
    """The law of some models, its residual, and its error on each model when the others alone are fitted.

    Raises:
        ValueError: points that cannot tell the law, or scipy is not installed.
    """
    spans = {
        "active parameters": {point.active for point in found},
        "tokens": {point.tokens for point in found},
        "experts": {point.experts for point in found},
    }
    alike = [name for name, values in spans.items() if len(values) < 2]
    if len(found) < LEAST or alike:
        more = f", all with the same {alike[0]}" if alike else ""
        raise ValueError(
            f"a law of nine numbers needs {LEAST} models or more, of several sizes, tokens and numbers of experts; "
            f"there are {len(found)}{more}"
        )
    table = _Table(found)
    best = table.fit(table.starts(), np.ones(len(found), bool))
    residuals = table.predict(best) - table.losses
    keys = [(point.active, point.experts, point.d_model) for point in found]
    models, left = sorted(set(keys)), np.zeros(len(found))
    for model in models:
        own = np.array([key == model for key in keys])
        other = table.fit([best], ~own)
        left[own] = table.predict(other)[own] - table.losses[own]
    span = {name: (min(values), max(values)) for name, values in spans.items()}
    fitted = Fitted(
        len(found),
        len(models),
        float(np.sqrt(np.mean(residuals**2))),
        float(np.abs(residuals).max()),
        float(np.sqrt(np.mean(left**2))),
        float(np.abs(left).max()),
        span["active parameters"],
        span["tokens"],
        span["experts"],
        data,
        tokenizer,
        measure,
    )
    return Law(**table.coefficients(best), fitted=fitted, anchors=_anchors(found))


def _anchors(found: Sequence[Point]) -> tuple[Anchor, ...]:
    """For every number of experts the largest model, after its longest run."""
    anchors = []
    for experts in sorted({point.experts for point in found}):
        own = max((p for p in found if p.experts == experts), key=lambda p: (p.active, p.tokens))
        anchors.append(Anchor(experts, own.d_model, own.learning_rate, own.batch_tokens, own.tokens))
    return tuple(anchors)


class _Table:
    """Points as arrays. The law's numbers are fitted around the middle of ln N and ln D, where they hardly depend on
    each other: (ln of the first term there, d there, alpha, g, the same of the second, ln c)."""

    def __init__(self, found: Sequence[Point]):
        self.losses = np.array([point.loss for point in found])
        self.e, n, d = (np.log([getattr(p, name) for p in found]) for name in ("experts", "active", "tokens"))
        self.middle = n.mean(), d.mean()
        self.n, self.d = n - self.middle[0], d - self.middle[1]

    def predict(self, numbers: Array) -> Array:
        """(points,) losses."""
        p, e = numbers, self.e
        size = np.exp(p[0] + p[1] * e + (p[2] + p[3] * e) * self.n)
        text = np.exp(p[4] + p[5] * e + (p[6] + p[7] * e) * self.d)
        result: Array = size + text + np.exp(p[8])
        return result

    def starts(self) -> list[Array]:
        """Numbers from which the descent begins: how much of the loss cannot be lowered, and how steep the rest is."""
        found = []
        for share, alpha, beta in itertools.product((0.2, 0.5, 0.8), (-0.15, -0.35, -0.6), (-0.15, -0.35, -0.6)):
            c = share * self.losses.min()
            half = np.log(max(1e-3, (self.losses.mean() - c) / 2))
            found.append(np.array([half, -0.05, alpha, 0.0, half, 0.02, beta, 0.0, np.log(c)]))
        return found

    def fit(self, starts: Sequence[Array], used: NDArray[np.bool_]) -> Array:
        """The numbers of the best descent."""
        least_squares = _scipy()
        logs = np.log(self.losses)

        def residuals(numbers: Array) -> Array:
            kept: Array = (np.log(self.predict(numbers)) - logs)[used]
            return kept

        low = np.array([-20.0, -3, -3, -1, -20, -3, -3, -1, -15])
        high = np.array([20.0, 3, 0, 1, 20, 3, 0, 1, np.log(self.losses.min())])
        how: dict[str, Any] = {"loss": "huber", "f_scale": ROBUST, "bounds": (low, high), "x_scale": "jac"}
        found = [
            least_squares(residuals, np.clip(start, low + 1e-9, high - 1e-9), max_nfev=2000, **how) for start in starts
        ]
        best: Array = min(found, key=lambda each: float(each.cost)).x
        return best

    def coefficients(self, numbers: Array) -> dict[str, float]:
        """The law's own numbers."""
        p, (n, d) = numbers, self.middle
        values = {
            "a": np.exp(p[0] - p[2] * n),
            "d": p[1] - p[3] * n,
            "alpha": p[2],
            "g": p[3],
            "b": np.exp(p[4] - p[6] * d),
            "w": p[5] - p[7] * d,
            "beta": p[6],
            "z": p[7],
            "c": np.exp(p[8]),
        }
        return {name: float(value) for name, value in values.items()}


def _scipy() -> Any:
    """`scipy.optimize.least_squares`; raises ValueError if scipy is not installed."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise ValueError(f"scipy cannot be used ({error}); to fit a law pip install 'moemamba[laws]'") from error
    return least_squares
