"""Memory that nothing has written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that no kernel has written is NaN, or a place that is far outside."""
    with torch.device("cpu"):  # torch notes once, at the first such line, which functions make tensors: not these
        torch.empty(0)

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            tensor = make(*args, **kwargs)
            with torch.no_grad():  # the reference's checkpointing makes an empty leaf
                if tensor.is_floating_point():
                    return tensor.fill_(float("nan"))
                return tensor.fill_(2**30) if tensor.element_size() >= 4 else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
