"""What a device could compute at most."""

import re

import torch

# bfloat16 with float32 sums, dense, in TFLOP/s; from the makers' data sheets. The first name that fits counts.
BFLOAT16_TFLOPS = (
    ("B200", 2250.0),  # NVIDIA DGX B200 data sheet: 36 PFLOP/s FP16/BF16 with sparsity, of eight
    ("H200", 989.4),  # NVIDIA H200 data sheet
    ("GH200", 989.4),  # NVIDIA GH200 data sheet
    ("H100 PCIe", 756.0),  # NVIDIA H100 data sheet, as the next two
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("A100", 312.0),  # NVIDIA A100 data sheet
    ("L40S", 362.0),  # NVIDIA L40S data sheet
    ("L4", 121.0),  # NVIDIA L4 data sheet
    ("MI300X", 1307.4),  # AMD MI300X data sheet
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a device in bfloat16; None for other types, for CPUs and for devices not in the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    known = (tflops for part, tflops in BFLOAT16_TFLOPS if re.search(rf"\b{part}\b", name))
    tflops = next(known, None)
    return None if tflops is None else tflops * 1e12
