"""What loads and starts CUDA C++ kernels, with a driver that only writes down what it is asked."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from moemamba.ops.kit import cuda as cuda_runtime


class Driver:
    """Of a GPU whose primary context is 7; the calling thread's context is `current`."""

    def __init__(self, current: int):
        self.current, self.calls = current, []

    def cuCtxGetCurrent(self, pointer):
        pointer._obj.value = self.current
        return 0

    def cuDevicePrimaryCtxRetain(self, pointer, device):
        pointer._obj.value = 7
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return 0

    def cuModuleLoadData(self, pointer, cubin):
        return 0 if self.current else 201  # CUDA_ERROR_INVALID_CONTEXT

    def cuGetErrorString(self, status, pointer):
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_char_p))[0] = b"invalid device context"
        return 0

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, self.current)) or 0


@pytest.fixture(params=[0, 3])
def driver(request, monkeypatch):
    driver = Driver(request.param)
    monkeypatch.setattr(cuda_runtime, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_runtime, "_compiled", lambda *_: b"")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cuda_runtime._context.cache_clear()
    return driver


def test_a_thread_without_a_context_gets_pytorchs(driver):
    """As autograd's, in which a kernel of ours may be the first thing that happens; another context is left alone."""
    expected = driver.current or 7
    module = cuda_runtime.Module("", {}, 0)
    assert driver.current == expected
    driver.current = 0 if expected == 7 else expected  # launched from another thread
    module.launch([("kernel", 1, 32, 0)], b"")
    assert driver.calls[-1] == ("cuLaunchKernel", expected)
