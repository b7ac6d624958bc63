"""Variables that have to be set before torch and triton are imported.

Workers of pytest-xdist share the cores out among them, and threads that wait for each other sleep: spinning, they would
keep a core from another worker. Without a GPU, Triton kernels run in Triton's interpreter.
"""

import importlib.util
import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
