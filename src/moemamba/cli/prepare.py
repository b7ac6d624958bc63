"""`moemamba prepare`: text tokenised into a folder, for runs to come."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.config import DataConfig
from ..host.files import expanded
from .options import Place, Positional
from .terminal import line, parse, show


@dataclass(frozen=True)
class Prepare:
    """Tokenise a text into a folder that `moemamba train --data FOLDER` opens at once."""

    data: Positional[Place]
    """the text, as --data of `moemamba train` takes it: a file, a folder, a dataset of the hub, a .bin file"""
    out: Place = "tokens"
    """the folder, which must not exist yet; it appears when it is complete"""
    tokenizer: Place = "bytes"
    """"bytes", "bpe-8192" (trained on the text), or the path of a tokenizer.json; it is put into the folder, and runs
    take it from there"""
    held_out: float = 0.05
    """share of the documents to keep for validation, chosen by the hash of their content"""


def main(arguments: Sequence[str]) -> None:
    asked = parse(Prepare, arguments, "prepare")
    if not 0 <= asked.held_out < 1:
        raise ValueError(f"held_out is {asked.held_out}; it must be 0 or more and less than 1")
    from ..data.corpora import find_tokenizer, remarks, tokenising
    from ..data.documents import Documents
    from ..data.preparation import write_tokens
    from ..data.prepared import is_prepared
    from ..host.progress import Report

    out = expanded(asked.out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder (--out), or remove it")
    if is_prepared(asked.data):
        raise ValueError(
            f"{asked.data} is prepared already; train on it with: moemamba train --data {shlex.quote(asked.data)}"
        )
    documents = Documents(asked.data)
    tokenizer = find_tokenizer(DataConfig(asked.data, tokenizer=asked.tokenizer))
    began = time.monotonic()
    with tokenising(Report()) as progress:
        corpus = write_tokens(out, documents, tokenizer, asked.held_out, progress)
    seconds = time.monotonic() - began
    parts = [("training", corpus.train), ("held out", corpus.validation)]
    rows = [(name, f"{len(t.ends):,}", f"{len(t.ids):,}", f"{t.bytes / 1e6:,.1f}") for name, t in parts]
    show(rows, (asked.data, "documents", "tokens", "MB"))
    for note in remarks(corpus):
        print(note)
    speed = sum(t.bytes for _, t in parts) / 1e6 / seconds
    line(f"{speed:,.1f} MB/s. Train on it with: moemamba train --data {shlex.quote(asked.out)}")
