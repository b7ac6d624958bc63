"""`moemamba look`: what a model does with each token of a text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..host.files import expanded, read_text, replace
from .options import Place, Positional
from .terminal import line, parse, show, show_json

if TYPE_CHECKING:
    from ..inspection import Look as Seen

MOST = 1 << 16  # tokens of a text
OFTEN = 5  # tokens that are named for an expert


@dataclass(frozen=True)
class Look:
    """Show which experts each token of a text visits, and how sure the routers are."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    text: str | None = None
    """the text to look at"""
    file: Place | None = None
    """a file that holds it"""
    out: Place | None = None
    """write a page (.html) that draws it: a row for each router, coloured by expert"""
    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    json: bool = False
    """print one JSON object in place of the tables: for each token its experts and gates"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Look, arguments, "look")
    if (asked.text is None) == (asked.file is None):
        raise ValueError("there is no text to look at, or two of them; give --text or --file")
    text = asked.text if asked.file is None else read_text(expanded(asked.file), 1 << 24)
    import torch

    from ..checkpoint import load
    from ..inspection import look

    model, tokenizer = load(asked.run, asked.device)
    ids = tokenizer.encode(text or "")
    if not ids or len(ids) > MOST:
        raise ValueError(f"the text has {len(ids):,} tokens; give 1 to {MOST:,}")
    with torch.no_grad():
        seen = look(model, torch.tensor([ids], device=next(model.parameters()).device), selection=True)
    words = [tokenizer.decode([token]) for token in ids]
    if asked.out is not None:
        from ..experiments.page import routing_page

        replace(Path(expanded(asked.out)), routing_page(words, *_routing(seen), asked.run))
    if asked.json:
        show_json(_plain(words, ids, seen))
        return
    _tables(words, seen)
    if asked.out is not None:
        line(f"page: {asked.out}", apart=True)


def _routing(seen: "Seen") -> tuple[dict[str, list[list[int]]], dict[str, list[list[float]]]]:
    """Experts and gates of each router: a list a token."""
    experts = {name: choice[0].tolist() for name, choice in seen.experts.items()}
    return experts, {
        name: [[round(g, 4) for g in row] for row in gate[0].tolist()] for name, gate in seen.gates.items()
    }


def _plain(words: Sequence[str], ids: Sequence[int], seen: "Seen") -> dict[str, Any]:
    experts, gates = _routing(seen)
    steps = {name: [round(v, 5) for v in each.dt[0].mean(-1).tolist()] for name, each in seen.selection.items()}
    norms = [[round(v, 4) for v in each[0].float().norm(dim=-1).tolist()] for each in seen.hidden]
    return {"tokens": list(ids), "text": list(words), "experts": experts, "gates": gates, "dt": steps, "norm": norms}


def _tables(words: Sequence[str], seen: "Seen") -> None:
    experts, gates = _routing(seen)
    for name, choices in experts.items():
        visits = Counter(expert for row in choices for expert in row)
        rows = []
        for expert, count in sorted(visits.items()):
            mine = [
                (word, gate[row.index(expert)]) for word, row, gate in _of(words, choices, gates[name]) if expert in row
            ]
            often = ", ".join(f"{word!r} {number}" for word, number in Counter(w for w, _ in mine).most_common(OFTEN))
            mean = sum(gate for _, gate in mine) / len(mine)
            rows.append((f"{expert}", f"{count / sum(visits.values()):.1%}", f"{mean:.3f}", often))
        line(name, apart=True)
        show(rows, ("expert", "tokens", "gate", "most often"))
    if not experts:
        line("the model has no routers")
    if seen.selection:
        line("")
        steps = [
            (name, f"{s.dt.mean():.4f}", _most(words, s.dt[0].mean(-1).tolist())) for name, s in seen.selection.items()
        ]
        show(steps, ("Mamba layer", "mean step dt", "largest at"))


def _of(words: Sequence[str], *columns: Sequence[Any]) -> Any:
    return zip(words, *columns, strict=True)


def _most(words: Sequence[str], values: Sequence[float]) -> str:
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:OFTEN]
    return ", ".join(f"{words[place]!r} {values[place]:.3f}" for place in order)
