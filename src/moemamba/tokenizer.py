"""The former name of `moemamba.text`, which warns; it goes with the next release."""

import warnings
from typing import Any

from . import text


def __getattr__(name: str) -> Any:
    value = getattr(text, name)
    warnings.warn(f"moemamba.tokenizer is moemamba.text: import {name} from there", DeprecationWarning, stacklevel=2)
    return value
