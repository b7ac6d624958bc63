"""A text as the routers of a model see it: every token in the colour of its expert, on a page of its own."""

from collections.abc import Mapping, Sequence

from .escaping import html
from .html import document

STYLE = (
    "<style>.text{font:0.95rem/2 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}"
    ".text span{border-radius:3px;padding:0.1em 0;color:var(--ink)}</style>"
)

Choices = Mapping[str, Sequence[Sequence[int]]]
Gates = Mapping[str, Sequence[Sequence[float]]]


def routing_page(words: Sequence[str], experts: Choices, gates: Gates, run: str) -> str:
    """The page: a section for each router, the text in it.

    Args:
        words: of each token.
        experts, gates: by router, a list for each token; the first expert of a token colours it, more strongly the
            larger its gate.
    """
    parts = [
        f"<header><h1>{html(run)}</h1><p>Each token has the colour of its first expert, stronger where the router is "
        "surer; the pointer shows all of its experts with their gates.</p></header>",
        STYLE,
    ]
    for name, choices in experts.items():
        most = 1 + max(max(row) for row in choices)
        spans = [_span(*each, most) for each in zip(words, choices, gates[name], strict=True)]
        parts.append(f"<section><h2>{html(name)}</h2><div class='text'>{''.join(spans)}</div></section>")
    if not experts:
        parts.append("<p>The model has no routers.</p>")
    return document(f"moemamba: {run}", "".join(parts))


def _span(word: str, experts: Sequence[int], gates: Sequence[float], most: int) -> str:
    said = ", ".join(f"expert {expert}: {gate:.3f}" for expert, gate in zip(experts, gates, strict=True))
    hue, strength = 360 * experts[0] / most, 15 + 60 * min(1.0, gates[0])
    colour = f"hsl({hue:.0f} 75% 50% / {strength:.0f}%)"
    return f"<span style='background:{colour}' title='{html(said)}'>{html(word)}</span>"
