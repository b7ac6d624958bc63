"""What is seen of a run while it goes: measures, alarms of routers, speed, and programs that show it."""

from .alarms import Alarms, Raised, sentences
from .metrics import Measures, Meter, add, measures, router_stats
from .moment import Moment, Watch, Watcher
from .peak import peak_flops
from .trackers import Board, open_board, require_board

__all__ = [
    "Alarms",
    "Board",
    "Measures",
    "Meter",
    "Moment",
    "Raised",
    "Watch",
    "Watcher",
    "add",
    "measures",
    "open_board",
    "peak_flops",
    "require_board",
    "router_stats",
    "sentences",
]
