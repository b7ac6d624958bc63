"""The README of a model that is saved for others: what it is, costs and scored, and how to open it."""

import json
from pathlib import Path
from typing import Any

from ... import __version__
from ...config import ModelConfig, parse_pattern
from ...counting import count_parameters, flops_per_token, memory, size, state_bytes
from ...host.files import check_regular
from ...letters import LETTERS

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- moemamba
- mamba
- mixture-of-experts
---
"""
USE = """## Use

    pip install "moemamba[hf]"

With transformers:

    import moemamba.integrations.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")

Without the first line, give `trust_remote_code=True`. With moemamba alone:

    import moemamba

    model, tokenizer = moemamba.load("FOLDER")

On the command line: `moemamba generate FOLDER --prompt "..."`.
"""
FIGURES = {
    "loss": "cross-entropy, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
    "accuracy": "share of tokens held likeliest",
}
CONTEXT = 1024


def model_card(config: ModelConfig, run: Path | None = None, place: str = "FOLDER") -> str:
    """Markdown.

    Args:
        run: the directory of the training run; its last evaluation is shown.
        place: what opens the model.
    """
    count = count_parameters(config)
    layers = [
        [letters, ", and in parallel ".join(LETTERS[letter].describe(config) for letter in letters)]
        for letters in parse_pattern(config.pattern)
    ]
    facts = [
        ["pattern", f"{config.pattern} × {config.n_blocks}, d_model {config.d_model}"],
        ["parameters", f"{count.total:,}, without embedding and head"],
        ["active", f"{count.active:,} of them for each token"],
        ["embedding and head", f"{count.embedding:,}, for a vocabulary of {config.vocab_size:,}"],
        ["forward pass", f"{flops_per_token(config, CONTEXT) / 1e6:,.1f} MFLOP a token, at context {CONTEXT:,}"],
        ["weights", f"{size(memory(config).weights)} in float32"],
        ["state", f"{size(state_bytes(config, CONTEXT))} a sequence, after {CONTEXT:,} tokens"],
    ]
    parts = [
        HEAD,
        f"# {_name(config)}\n\nA language model trained with moemamba {__version__}, the reference implementation of",
        "MoE-Mamba (arXiv 2401.04081).\n",
        _table(["", "what it is"], facts),
        _table(["layer", "what"], layers),
        _quality(run),
        USE.replace("FOLDER", place),
    ]
    return "\n".join(part for part in parts if part)


def _name(config: ModelConfig) -> str:
    names = [letter.name for letter in config.letters]
    return " + ".join(names) + f", {count_parameters(config).active:,} active parameters"


def _quality(run: Path | None) -> str:
    found = None if run is None else last_evaluation(run)
    if not found:
        return ""
    rows = [[words, f"{found[name]:.4f}"] for name, words in FIGURES.items() if isinstance(found.get(name), float)]
    return f"## Held-out text, after step {found['step']:,}\n\n" + _table(["", "value"], rows)


def last_evaluation(run: Path) -> dict[str, Any]:
    """The last line about one in a run's metrics.jsonl; nothing if there is none."""
    file, found = run / "metrics.jsonl", {}
    if not file.exists():
        return {}
    check_regular(file)
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values.get("kind") == "evaluation" and isinstance(values.get("step"), int):
            found = values
    return found


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
