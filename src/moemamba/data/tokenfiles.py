"""Files of tokens that other programs wrote: their documents, and the text of each."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..host.files import FileError
from ..text import Tokenizer
from .documents import Documents
from .kinds import Kind
from .records import Records

LARGEST = 1 << 24  # tokens of a document; bounds memory where no document ends


def documents_of(documents: Documents, tokenizer: Tokenizer) -> Iterator[tuple[NDArray[Any], str]]:
    """The documents of files of tokens, without their end-of-text tokens; those that spell nothing are left out.

    Raises:
        FileError: naming the file: it ends inside a token, holds a token that the tokenizer does not have, or is
            uint32 by its content and uint16 by its name.
    """
    for records in documents.opened():
        for found in _cut(records, tokenizer):
            for ids, text in zip(found, tokenizer.decode_batch(found), strict=True):
                if text:
                    yield ids, text


def _cut(records: Records, tokenizer: Tokenizer) -> Iterator[list[NDArray[Any]]]:
    """The documents that end in each block, but empty ones."""
    rest = np.empty(0, np.uint32)
    for number, block in enumerate(records.tokens()):
        if number == 0:
            _check_width(records, block, tokenizer.vocab_size)
        if (largest := int(block.max())) >= tokenizer.vocab_size:
            raise FileError(
                f"{records.file} holds the token {largest}, but the tokenizer has {tokenizer.vocab_size}; name the "
                "tokenizer that wrote the file, and say by the name whether a token has two bytes (.u16.bin) or four "
                "(.u32.bin)"
            )
        *whole, rest = np.split(np.concatenate([rest, block]), _ends(rest, block, tokenizer.end_of_text))
        yield [ids for ids in (whole[0], *(ids[1:] for ids in whole[1:])) if len(ids)] if whole else []
        rest = rest[1:] if whole else rest
        if len(rest) > LARGEST:
            yield [rest]
            rest = rest[:0]
    if len(rest):
        yield [rest]


def _ends(rest: NDArray[Any], block: NDArray[Any], mark: int) -> NDArray[Any]:
    """Where documents end in what is left of the blocks before and a block; in the former none does."""
    return len(rest) + np.flatnonzero(block == mark)


def _check_width(records: Records, block: NDArray[Any], vocab_size: int) -> None:
    """Raise FileError for uint32 tokens under the name of uint16 ones: every other number is their upper half."""
    unsaid = records.kind is Kind.U16 and ".u16" not in records.file.name.lower()
    halves = unsaid and len(block) >= 4 and len(block) % 2 == 0 and (block[1::2] <= (vocab_size - 1) >> 16).all()
    if halves and block[0::2].any():
        raise FileError(
            f"{records.file} holds uint32 tokens, as it seems, but .bin stands for uint16; rename it to end in "
            ".u32.bin (or in .u16.bin, if they are uint16 all the same)"
        )
