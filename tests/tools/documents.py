"""Documents to test with: as tokens, as texts, as files."""

import itertools

import numpy as np

from moemamba.data.batches import Tokens
from moemamba.text import ByteTokenizer

BYTES = ByteTokenizer()


def fake_tokens(lengths):
    """Documents of the given lengths, end mark included; every id is its place, modulo 256."""
    ends = np.cumsum(lengths)
    ids = (np.arange(ends[-1]) % 256).astype(np.uint16)
    ids[ends - 1] = 256
    return Tokens(ids, ends.astype(np.int64), int(ends[-1]) - len(lengths))


def texts_of(tokens):
    ends = [0, *tokens.ends.tolist()]
    assert all(tokens.ids[end - 1] == BYTES.end_of_text for end in ends[1:])
    return [BYTES.decode(tokens.ids[first : last - 1]) for first, last in itertools.pairwise(ends)]


def write_folder(folder, count=200):
    folder.mkdir()
    texts = [f"document {k}: {'x' * (k % 7)}é" for k in range(count)]
    for k, text in enumerate(texts):
        (folder / f"{k:04d}.txt").write_text(text, encoding="utf-8")
    return texts
