"""What is seen of a run while it goes: measures, alarms of routers, speed, TensorBoard."""

from .alarms import Alarms, Raised, sentences
from .metrics import Measures, Meter, add, measures, router_stats
from .peak import peak_flops
from .tensorboard import TensorBoard, require_tensorboard

__all__ = [
    "Alarms",
    "Measures",
    "Meter",
    "Raised",
    "TensorBoard",
    "add",
    "measures",
    "peak_flops",
    "require_tensorboard",
    "router_stats",
    "sentences",
]
