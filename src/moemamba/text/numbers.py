"""A tokenizer for what is no text: ids, written as decimal numbers with spaces between them."""

import tokenizers
from tokenizers import models, pre_tokenizers

from .tokenizer import END_OF_TEXT, Tokenizer, TrainedTokenizer


def numbers(vocab_size: int, end: int | None = None) -> Tokenizer:
    """`encode("3 0 2") == [3, 0, 2]`, and back.

    Args:
        vocab_size: ids are 0 to vocab_size - 1.
        end: the one of them that ends a document; one more, vocab_size, if None.
    Raises:
        ValueError: there are no ids, or `end` is none of them.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be 1 or more")
    if end is not None and not 0 <= end < vocab_size:
        raise ValueError(f"end is {end}; it must be one of the ids, which are 0 to {vocab_size - 1}")
    mark = vocab_size if end is None else end
    vocabulary = {str(number): number for number in range(vocab_size) if number != mark} | {END_OF_TEXT: mark}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([END_OF_TEXT])
    return TrainedTokenizer(inner)
