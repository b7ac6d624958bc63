"""Figures of a server in Prometheus' text format, under the names that vLLM has made common, with our prefix."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """What only grows, by labels."""

    def __init__(self) -> None:
        self.values: dict[Labels, float] = {}

    def add(self, value: float = 1, **labels: str) -> None:
        """Count."""
        key = tuple(sorted(labels.items()))
        self.values[key] = self.values.get(key, 0) + value

    def lines(self, name: str) -> Iterator[str]:
        """One line for each labels."""
        for labels, value in (self.values or {(): 0}).items():
            yield f"{name}{_labels(labels)} {value:g}" if value % 1 else f"{name}{_labels(labels)} {value:.0f}"


class Histogram:
    """How often values were how large."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def see(self, value: float) -> None:
        """A value."""
        self._counts[bisect_left(SECONDS, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Buckets, sum and count."""
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counted on the event loop."""

    def __init__(self) -> None:
        self.prompt_tokens, self.generation_tokens, self.success, self.refused = (Counter() for _ in range(4))
        self.first_token, self.between_tokens, self.whole = (Histogram() for _ in range(3))

    def text(self, gauges: Mapping[str, float], load: Iterable[tuple[str, list[float]]]) -> str:
        """The page that a scraper reads.

        Args:
            gauges: present values by name; those whose names end in _total only grow.
            load: of each router its name and the choices of prompts that fell on each expert.
        """
        lines: list[str] = []
        experts = Counter()
        for layer, values in load:
            for expert, value in enumerate(values):
                experts.add(value, layer=layer, expert=str(expert))
        counters = {
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "request_success_total": self.success,
            "requests_refused_total": self.refused,
            "prompt_expert_tokens_total": experts,
        }
        histograms = {
            "time_to_first_token_seconds": self.first_token,
            "inter_token_latency_seconds": self.between_tokens,
            "e2e_request_latency_seconds": self.whole,
        }
        for name, value in gauges.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE moemamba:{name} {kind}", f"moemamba:{name} {value:.10g}"]
        for name, counter in counters.items():
            lines += [f"# TYPE moemamba:{name} counter", *counter.lines(f"moemamba:{name}")]
        for name, histogram in histograms.items():
            lines += [f"# TYPE moemamba:{name} histogram", *histogram.lines(f"moemamba:{name}")]
        return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
