"""What is seen of a run while it goes: measures, alarms of routers, speed, TensorBoard."""

from .alarms import Alarms, Raised, sentences
from .metrics import Measures, Meter, add, measures, router_stats
from .moment import Moment, Watch, Watcher
from .peak import peak_flops
from .tensorboard import TensorBoard, require_tensorboard

__all__ = [
    "Alarms",
    "Measures",
    "Meter",
    "Moment",
    "Raised",
    "TensorBoard",
    "Watch",
    "Watcher",
    "add",
    "measures",
    "peak_flops",
    "require_tensorboard",
    "router_stats",
    "sentences",
]
