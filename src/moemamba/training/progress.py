"""The former name of `moemamba.host.progress`, which warns; it goes with the next release."""

import warnings
from typing import Any

from ..host import progress


def __getattr__(name: str) -> Any:
    value = getattr(progress, name)
    said = f"moemamba.training.progress is moemamba.host.progress: import {name} from there"
    warnings.warn(said, DeprecationWarning, stacklevel=2)
    return value
