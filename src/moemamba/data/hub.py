"""Texts of a Hugging Face dataset, streamed: nothing is downloaded but what is read."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any

from ..host.files import FileError
from .config import HUB
from .records import whole_text


class HubTexts:
    """`hf:NAME`, `hf:NAME:CONFIG`, `hf:NAME:CONFIG:SPLIT`, `hf:NAME:CONFIG:SPLIT:DOCUMENTS`, such as
    `hf:allenai/c4:en:train:100000`: the "text" of each example, from the first on.

    Parts may be left empty: `hf:roneneldan/TinyStories::validation`. The split is "train" unless given; without a
    number of documents all are read. Null and empty texts do not count.

    Raises:
        ValueError: a name that is none; the package `datasets` is missing; the dataset cannot be had, or has no text.
    """

    def __init__(self, source: str):
        name, *rest = source.removeprefix(HUB).split(":")
        config, split, documents = (*rest, "", "", "")[:3]
        if not name or len(rest) > 3 or not (documents.isdecimal() or not documents):
            raise ValueError(
                f"{source!r} does not name a dataset; write hf:NAME:CONFIG:SPLIT:DOCUMENTS, of which NAME alone must "
                "be there, as in hf:allenai/c4:en:train:100000"
            )
        self.source, self.name, self.config, self.split = source, name, config or None, split or "train"
        self.documents = int(documents) if documents else None

    def __iter__(self) -> Iterator[str]:
        try:
            datasets: Any = import_module("datasets")
        except ImportError:
            raise ValueError(f"{self.source} needs the package datasets: pip install 'moemamba[data]'") from None
        try:
            examples = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # of many kinds: no network, no such dataset, configuration or split
            raise ValueError(f"{self.source} cannot be read: {error}") from error
        for number, example in self._whole(islice(examples, self.documents)):
            if not isinstance(example, dict) or "text" not in example:
                raise FileError(f'{self.source}, example {number}, has no string "text"; it has {", ".join(example)}')
            if text := whole_text(example["text"], f"{self.source}, example {number}"):
                yield text

    def _whole(self, examples: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The examples, numbered; what interrupts them is said with their source."""
        number = 0
        try:
            for example in examples:
                yield number, example
                number += 1
        except (OSError, MemoryError) as error:
            raise type(error)(f"{self.source} stopped before example {number}: {error}; try again") from error
        except Exception as error:  # of many kinds: a damaged file, fields that differ from what was promised
            raise FileError(f"{self.source} cannot be read from example {number}: {error}") from error
