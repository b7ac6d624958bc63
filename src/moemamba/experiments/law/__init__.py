"""A scaling law fitted to comparisons, and what it plans. No torch here."""

from .fitting import fit
from .law import Anchor, Fitted, Law, read_law, write_law
from .planning import Plan, plans
from .points import Point, points

__all__ = ["Anchor", "Fitted", "Law", "Plan", "Point", "fit", "plans", "points", "read_law", "write_law"]
