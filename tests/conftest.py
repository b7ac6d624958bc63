"""Variables that have to be set before torch and triton are imported; and what a file of tests has to leave as it was.

Workers of pytest-xdist share the cores out among them, and threads that wait for each other sleep: spinning, they would
keep a core from another worker. Without a GPU, Triton kernels run in Triton's interpreter.
"""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_for_numpy(tensor, scope):
        """Triton 3.6 calls int() on arrays of one element for loop bounds, which numpy 2.4 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_for_numpy


def _settings() -> dict[str, Any]:
    """What holds for the whole process, and so for tests that have nothing to do with each other."""
    return {
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "the collection of garbage": gc.isenabled(),
        "the current folder": os.getcwd(),
        "handlers of signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A file that changes a setting of the process and leaves it so makes others fail, or pass, by their order."""
    before = _settings()
    yield
    after = _settings()
    assert after == before, f"changed and not put back: {[name for name in after if after[name] != before[name]]}"
