"""A tokenizer as llama.cpp has it. It is refused where that would split text otherwise."""

import json
from typing import Any, NamedTuple

from ...text import ByteTokenizer, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""kinds of tokens, as gguf.TokenType numbers them"""
NO_MERGE = ["ĠĠ ĠĠ"]
"""of a vocabulary without merges, since an empty list is not written: of two spaces each, which nothing ever makes"""


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    end: int
    """the token that ends a text"""


def vocabulary(own: Tokenizer, size: int) -> Vocabulary:
    """Of `size` tokens; those that the tokenizer does not have are unused.

    Raises:
        ValueError: it is no byte-level BPE that splits text as GPT-2's does, which is what llama.cpp would do.
    """
    values = json.loads(own.to_json())
    if why := _refusal(values, isinstance(own, ByteTokenizer)):
        raise ValueError(
            f"llama.cpp would split text otherwise than the tokenizer of this model: {why}. It can do bytes, bpe-N of "
            "ours, and GPT-2's and GPT-NeoX's"
        )
    names = {number: name for name, number in values["model"]["vocab"].items()}
    added = {token["id"]: token for token in values["added_tokens"]}
    names |= {number: token["content"] for number, token in added.items()}
    kinds = {number: CONTROL if token["special"] else USER_DEFINED for number, token in added.items()}
    tokens = [names.get(number, f"[unused{number}]") for number in range(size)]
    types = [kinds.get(number, NORMAL if number in names else UNUSED) for number in range(size)]
    merges = [each if isinstance(each, str) else " ".join(each) for each in values["model"]["merges"]]
    return Vocabulary(tokens, types, merges or NO_MERGE, own.end_of_text)


def _refusal(values: dict[str, Any], plain_bytes: bool) -> str:
    """Why llama.cpp's GPT-2 would not do the same; empty if it would."""
    model, splits = values["model"], values.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("byte_fallback"):
        return "it is no byte-level BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "it marks the parts of words"
    if splits.get("type") != "ByteLevel" or splits.get("add_prefix_space"):
        return "it splits words by a rule of its own"
    if splits.get("use_regex") is False and not plain_bytes:
        return "it does not split words"
    if (values.get("normalizer") or {"type": "NFC"}).get("type") != "NFC":
        return "it changes the text before it splits it"
    return ""
