"""Text to token ids and back, whole or as it comes. No torch here."""

from .loading import load_tokenizer, tokenizer_config, train_bpe
from .numbers import numbers
from .stream import StreamDecoder, UntilText
from .tokenizer import END_OF_TEXT, ByteTokenizer, NoTokenizer, Tokenizer, TrainedTokenizer

__all__ = [
    "END_OF_TEXT",
    "ByteTokenizer",
    "NoTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "TrainedTokenizer",
    "UntilText",
    "load_tokenizer",
    "numbers",
    "tokenizer_config",
    "train_bpe",
]
