"""The device that a name means, and how fast it multiplies."""

import time

import torch


def find_device(name: str) -> torch.device:
    """A device by name; "auto" is a GPU where there is one, else the CPU.

    Raises:
        ValueError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0].split('. ')[0]}); try cpu"
        ) from error
    return device


def product_speed(device: torch.device, seconds: float = 0.3) -> float:
    """Floating-point operations a second that large products reach: bfloat16 on a GPU, float32 on a CPU."""
    gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize(device)

    torch.mm(a, b)  # which loads what it needs
    wait()
    begun, done = time.perf_counter(), 0
    while not done or time.perf_counter() - begun < seconds:
        for _ in range(8):
            torch.mm(a, b)
        wait()
        done += 8
    return 2 * size**3 * done / (time.perf_counter() - begun)
