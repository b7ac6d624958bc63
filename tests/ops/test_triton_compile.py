"""Every kernel of the Triton backend compiles for GPUs, and fits into their shared memory; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("capability", "shared_memory"), [(90, 227 << 10), (80, 99 << 10)], ids=["hopper", "ampere"])
def test_kernels_compile(capability, shared_memory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "tools" / "compile_triton.py"
    run = subprocess.run([sys.executable, script, str(capability)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    taken = json.loads(run.stdout)
    assert len(taken) >= 10
    assert {name: size for name, size in taken.items() if size > shared_memory} == {}
