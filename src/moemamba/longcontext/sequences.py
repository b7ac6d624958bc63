"""Long sequences of a text: within documents that are long enough, or across them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.batches import Tokens


class Sequences(NamedTuple):
    """Where sequences of one length begin."""

    starts: NDArray[np.int64]
    """(n,)"""
    groups: NDArray[np.int64]
    """(n,) the document of each; across documents each is a group of its own"""


def sequences(tokens: Tokens, length: int, most: int | None = None, across: bool = False) -> Sequences:
    """Sequences of `length` tokens and the one that follows, which do not overlap.

    Args:
        most: so many at most: first one of each document, then a second of each, so that documents differ.
        across: take the text as it lies, whatever documents it is of; the sequences are spread evenly over it.
    Raises:
        ValueError: there is none, with the length that there is.
    """
    if across:
        count = (len(tokens.ids) - 1) // length
        if not count:
            raise ValueError(
                f"the text has {len(tokens.ids):,} tokens, but a sequence needs {length + 1:,}; {_SHORTER}"
            )
        kept = min(count, most or count)
        return Sequences(np.arange(kept) * count // kept * length, np.arange(kept))
    ends = np.asarray(tokens.ends)
    begins = np.concatenate([[0], ends[:-1]])
    counts = np.maximum(0, (ends - begins - 1) // length)
    if not counts.any():
        longest = int((ends - begins).max())
        raise ValueError(
            f"no document has the {length + 1:,} tokens of a sequence, the longest {longest:,}; {_SHORTER}, or read "
            "across documents (--across-documents)"
        )
    document = np.repeat(np.arange(len(ends)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((document, place))[:most]
    return Sequences(begins[document[order]] + place[order] * length, document[order])


_SHORTER = "give a longer text or a smaller context"
