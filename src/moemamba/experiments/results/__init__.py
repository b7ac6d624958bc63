"""The figures of a comparison, computed from its runs. No torch, no words of a page, no drawing."""

from .claims import Claim
from .comparison import Comparison, read_results
from .history import Curve, History, crossing, read_history, smoothed, smoothing, speed_up
from .record import RunResult, thinned
from .reproduction import Reproduction, Tuning
from .row import Row, paired, summarise
from .spread import Spread
from .stored import Status, check_name
from .tested import Test, error_of_difference

__all__ = [
    "Claim",
    "Comparison",
    "Curve",
    "History",
    "Reproduction",
    "Row",
    "RunResult",
    "Spread",
    "Status",
    "Test",
    "Tuning",
    "check_name",
    "crossing",
    "error_of_difference",
    "paired",
    "read_history",
    "read_results",
    "smoothed",
    "smoothing",
    "speed_up",
    "summarise",
    "thinned",
]
