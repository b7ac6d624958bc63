"""What a run reads. No torch here, so that the command line answers at once."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from ..host.files import expanded

HUB = "hf:"  # how the name of a dataset of the Hugging Face hub begins

NO_TEST = "none"  # where a text to test on is named

Sampling = Literal["windows", "documents"]


@dataclass(frozen=True)
class DataConfig:
    """Texts, their tokenizer, and how rows are read from them; `TrainConfig` says what each means.

    Raises:
        ValueError: a value that cannot work, named with what would.
    """

    data: str | tuple[str, ...] | None = None
    validation: str | None = None
    tokenizer: str = "bytes"
    sampling: Sampling = "windows"
    reset_state: bool = False
    seed: int = 0
    """of the order"""
    context: int = 256
    """tokens in a row"""
    cache: str = "tokens"
    """folder of prepared texts where the package's own cache cannot be written"""
    test: str | None = NO_TEST
    lanes: int | None = None
    """rows of a batch that read on from batch to batch; None where rows have nothing to do with each other"""

    def __post_init__(self) -> None:
        if self.sampling == "documents" and self.reset_state:
            raise ValueError(
                'reset_state goes with sampling = "windows" alone: the paper\'s sampling carries state from one '
                "document to the next; leave one of them out"
            )
        if self.lanes and (self.sampling == "documents" or len(weighted(self.data)) > 1):
            what = 'sampling = "documents" draws' if self.sampling == "documents" else "several texts are mixed from"
            raise ValueError(
                f"carry_state needs rows that read on in one text, but {what} rows that do not; leave it out"
            )
        weighted(self.data)
        texts = (("validation", self.validation, "text"), ("test", self.test, "text"))
        for name, value, what in (*texts, ("tokenizer", self.tokenizer, "tokenizer")):
            if value is not None and not value.strip():  # an unset variable of a shell, seldom what is meant
                raise ValueError(f"{name} is {value!r}, which names no {what}; name one, or leave it out")


def at_home(value: Any) -> Any:
    """Paths as text, in which a leading `~`, behind a weight too, is the home folder; everything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(map(at_home, value))
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or "~" not in value:
        return value
    weight, path = re.fullmatch(r"([-+.\d][^:/]*:)?(.*)", value, re.DOTALL).groups("")  # type: ignore[union-attr]
    return f"{weight}{expanded(path)}" if path.startswith("~") else value


def weighted(data: str | tuple[str, ...] | None) -> tuple[tuple[str | None, float | None], ...]:
    """The corpora of `DataConfig.data` and their weights, all of them None if none is given.

    `("0.7:books/", "0.3:hf:allenai/c4:en")` -> `(("books/", 0.7), ("hf:allenai/c4:en", 0.3))`. A weight is what stands
    before the first colon if it begins like a number, which neither a drive (`C:`) nor a hub (`hf:`) does; a file whose
    name does is written `./1:2.txt`.

    Raises:
        ValueError: a weight that is none, some corpora with a weight and some without, or no corpus.
    """
    found: list[tuple[str | None, float | None]] = []
    for text in (data,) if data is None or isinstance(data, str) else data:
        if text is not None and not text.strip():
            raise ValueError(f"data is {text!r}, which names no text; name one, or . for the current folder")
        number, colon, source = (text or "").partition(":")
        if not (colon and re.match(r"[-+]?\.?\d", number)):
            found.append((text, None))
            continue
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (0 < weight < math.inf and source.strip()):
            raise ValueError(
                f"data is {text!r}, whose weight is {number}; write a number above 0, a colon and a text, as in "
                f"0.7:books/ (or ./{text} if that is a file's name)"
            )
        found.append((source, weight))
    if not found:
        raise ValueError("data names no text; give one, or None for Python's standard library")
    without = [source for source, weight in found if weight is None]
    if 0 < len(without) < len(found):
        raise ValueError(f"data gives no weight to {without[0]}, but to others; give every text one, or none at all")
    return tuple(found)


def absolute_source(text: str, weights: bool = True) -> str:
    """What a text stands for in the current folder, its weight in front; a dataset of the hub is the same anywhere."""
    source = weighted(text)[0][0] or text if weights else text
    if source.startswith(HUB):
        return text
    return text.removesuffix(source) + os.path.abspath(expanded(source))
