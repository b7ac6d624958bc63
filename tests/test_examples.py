"""The examples run, and learn what they are to learn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moemamba as mm

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words, folder, **environment):
    """Standard output of a program with examples in a folder of its own."""
    path = f"{Path(mm.__file__).parents[1]}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": f"{folder}"} | environment
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_examples_are_all_tried():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    tried = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert names == tried


def test_routers(tmp_path):
    said = run(str(EXAMPLES / "routers.py"), "30", folder=tmp_path)
    for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)", said):
        assert float(last) < float(first) - 1.5
    assert said.count("load of the first layer") == 3


@pytest.mark.slow
def test_classifier(tmp_path):
    said = run(str(EXAMPLES / "classifier.py"), "60", folder=tmp_path)
    assert int(re.search(r"(\d+)% of 300", said)[1]) > 75


@pytest.mark.slow
def test_sequences(tmp_path):
    said = run(str(EXAMPLES / "sequences.py"), str(tmp_path / "out"), "60", folder=tmp_path)
    dna, pictures, sounds = (float(each) for each in re.findall(r": ([\d.]+) nats", said))
    assert dna < 1.1 and pictures < 1.3 and sounds < 2.0, said  # a uniform guess: 1.6, 2.2 and 4.2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate(processes, tmp_path):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{processes}"]
    said = run(*launch, str(EXAMPLES / "accelerated.py"), "30", "model", folder=tmp_path, ACCELERATE_USE_CPU="true")
    found = re.search(r"(\d) processes: loss ([\d.]+) -> ([\d.]+)", said)
    assert int(found[1]) == processes and float(found[3]) < float(found[2]) - 1.5
    assert mm.load(tmp_path / "model")[0].config.vocab_size == 32


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_lightning(processes, tmp_path):
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    said = run(str(EXAMPLES / "lightning_module.py"), "30", f"{processes}", "model", folder=tmp_path)
    found = re.search(r"(\d) processes: loss ([\d.]+) after 30 steps", said)
    assert int(found[1]) == processes and float(found[2]) < 2.0
    assert mm.load(tmp_path / "model")[0].config.vocab_size == 32
