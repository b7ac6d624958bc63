"""A letter is two files and three lines: "S", added to a copy of the package, is a letter like the others.

`tools/letter_s` holds the two files, and in `works.py` what is done with them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moemamba

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
LETTER = HERE / "tools" / "letter_s"
LINES = [  # the file, the line that it has, and what is added behind that
    ("letters/__init__.py", "from .routed_mamba import", "from .smoothing import Smoothing, SmoothingConfig"),
    ("letters/__init__.py", "LETTERS: dict", '    "S": Smoothing(),'),
    ("layers/__init__.py", "from .routed_mamba import", "from .smoothing import Smoothing"),
    ("layers/__init__.py", "LAYERS: dict", '    "S": Smoothing,'),
    ("config.py", "from .reading import", "from .letters import SmoothingConfig"),
    ("config.py", "    feedforward: FeedForwardConfig", "    smoothing: SmoothingConfig = SmoothingConfig()"),
]


ONLY_S = """
import sys, pytest

class OnlyS:
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("name") == "S"]

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", sys.argv[1]], plugins=[OnlyS()]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package with the letter; the environment in which it is what Python imports."""
    root = tmp_path_factory.mktemp("package")
    copy = root / "moemamba"
    shutil.copytree(Path(moemamba.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder, name in (("letters", "letter"), ("layers", "layer")):
        shutil.copy(LETTER / f"{name}.py", copy / folder / "smoothing.py")
    for file, behind, line in LINES:
        lines = (copy / file).read_text(encoding="utf-8").splitlines()
        (at,) = [number for number, text in enumerate(lines) if text.startswith(behind)]
        lines.insert(at + 1, line)
        (copy / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root, os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{HERE / 'tools'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def python(package, *arguments):
    root, environment = package
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_counted_trained_saved_sharded_and_decoded(package, tmp_path):
    python(package, LETTER / "works.py", tmp_path)


def test_info_tells_of_it_without_torch(package):
    program = (
        "import json, sys, moemamba as mm; from moemamba.reading import to_dict; "
        "print(json.dumps(to_dict(mm.ModelConfig('MS', 2, 16).replace(d_smooth=12)))); "
        "assert 'torch' not in sys.modules"
    )
    (package[0] / "config.json").write_text(python(package, "-c", program), encoding="utf-8")
    assert "smoothing: 12 channels" in python(package, "-m", "moemamba", "info", "config.json")
    count = json.loads(python(package, "-m", "moemamba", "info", "config.json", "--json"))
    assert count["config"]["smoothing"] == {"d_smooth": 12}


def test_the_laws_hold_for_it(package):
    """`test_laws` takes its letters from `LETTERS`."""
    said = python(package, "-c", ONLY_S, HERE / "test_laws.py")
    passed = int(said.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 8, said
