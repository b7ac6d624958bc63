"""Routers that went wrong, said aloud once: collapse onto an expert, certainty, and experts that died."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

DEAD_AFTER = 100  # steps without a token, or with fewer than one in 200,000
TAKES_ALL = 0.9  # of the tokens, by one expert
CERTAIN = 0.01  # entropy, as a share of the greatest possible

Alarm = dict[str, Any]


@dataclass
class Raised:
    """What of the alarms is saved with a checkpoint."""

    raised: dict[str, int] = field(default_factory=dict)
    """conditions that last, and of dead experts how many there were"""
    idle: dict[str, list[int]] = field(default_factory=dict)
    """of each router, how many steps every expert has had no token"""


class Alarms:
    """Watches the router lines of metrics.jsonl; an alarm is raised when a condition begins, not while it lasts.

    A condition that has ended (by a margin, so that it does not flicker) may raise its alarm again; dead experts raise
    another when they are twice as many.

    Args:
        top_k: of each router; with it, an expert's load is the share of tokens that visit it.
        state: what `state` was when the checkpoint was saved that the run goes on from.
    """

    def __init__(self, top_k: Sequence[int], state: Raised | None = None):
        state = state or Raised()
        self._top_k = top_k
        self._raised, self._idle = dict(state.raised), dict(state.idle)

    def state(self) -> Raised:
        """To save."""
        return Raised(self._raised, self._idle)

    def look(self, layers: Iterable[dict[str, Any]], steps: int) -> list[Alarm]:
        """New alarms: {"layer", "alarm", ...}; `layers` is that of a router line which covers so many steps."""
        return [
            alarm
            for layer, top_k in zip(layers, self._top_k, strict=True)
            for alarm in self._layer(layer, top_k, steps)
        ]

    def _layer(self, layer: dict[str, Any], top_k: int, steps: int) -> list[Alarm]:
        name, load = layer["name"], layer["load"]
        alarms: list[Alarm] = []
        fullest = max(range(len(load)), key=load.__getitem__)
        share = load[fullest] * top_k
        if len(load) > top_k and self._begins(f"{name} collapsed", share >= TAKES_ALL, share < TAKES_ALL - 0.1):
            alarms.append({"layer": name, "alarm": "collapsed", "expert": fullest, "share": round(share, 4)})
        entropy = layer["entropy"] / layer["max_entropy"] if layer["max_entropy"] else 1.0
        if self._begins(f"{name} certain", entropy <= CERTAIN, entropy > 2 * CERTAIN):
            alarms.append({"layer": name, "alarm": "certain", "entropy": layer["entropy"]})
        idle = self._idle.get(name, [])
        idle = idle if len(idle) == len(load) else [0] * len(load)
        idle = self._idle[name] = [0 if share else before + steps for share, before in zip(load, idle, strict=True)]
        dead = [expert for expert, since in enumerate(idle) if since >= DEAD_AFTER]
        key = f"{name} dead"
        if len(dead) >= 2 * self._raised.get(key, 0) and dead:
            self._raised[key] = len(dead)
            alarms.append({"layer": name, "alarm": "dead", "experts": dead})
        elif not dead:
            self._raised.pop(key, None)
        return alarms

    def _begins(self, key: str, now: bool, over: bool) -> bool:
        if now and key not in self._raised:
            self._raised[key] = 1
            return True
        if over:
            self._raised.pop(key, None)
        return False


def sentences(step: int, alarms: Sequence[Alarm]) -> list[str]:
    """What the terminal says: one line for each kind of alarm, however many layers raise it."""
    said = []
    for kind, what in (
        ("collapsed", "one expert takes nearly all tokens; raise balance_weight or bias_rate, or lower learning_rate"),
        ("certain", "routers choose with certainty (entropy near 0) and hardly learn; raise z_weight"),
        ("dead", f"experts had no token for {DEAD_AFTER} steps; raise balance_weight or bias_rate"),
    ):
        if found := [_where(alarm) for alarm in alarms if alarm["alarm"] == kind]:
            more = f" and {len(found) - 4} more layers" if len(found) > 4 else ""
            said.append(f"alarm at step {step:,}: {what}: {', '.join(found[:4])}{more}")
    return said


def _where(alarm: Alarm) -> str:
    match alarm["alarm"]:
        case "collapsed":
            return f"{alarm['layer']} (expert {alarm['expert']}, {alarm['share']:.0%})"
        case "certain":
            return f"{alarm['layer']} ({alarm['entropy']:.2g} nats)"
    experts = alarm["experts"]
    names = ", ".join(map(str, experts[:4])) + (", ..." if len(experts) > 4 else "")
    return f"{alarm['layer']} ({len(experts)} dead: {names})"
