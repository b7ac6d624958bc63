"""The house keeps its order: imports go down its floors, files stay small, public names stay."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import moemamba

SOURCE = Path(moemamba.__file__).parent
# docs/design.md: a file may import from its own floor or from those below it.
FLOORS = [
    {"host", "reading"},
    {"letters"},
    {"config", "presets", "counting", "text"},
    {"device", "ops", "tensors"},
    {"layers"},
    {"state", "model", "initialisation"},
    {"checkpoint"},
    {"data", "distributed", "training", "inference", "integrations"},
    {"experiments"},
    {"cli", "__main__"},
]
PUBLIC = {
    "MoEMamba",
    "ModelConfig",
    "Output",
    "State",
    "TrainConfig",
    "count_parameters",
    "evaluate",
    "generate",
    "layers",
    "load",
    "ops",
    "preset",
    "presets",
    "save",
    "train",
}


def floor(module: str) -> int:
    """Of "moemamba.ops.reference": 1."""
    part = module.split(".")[1]
    floors = [number for number, parts in enumerate(FLOORS) if part in parts]
    assert floors, f"{module} has no floor; give it one in FLOORS and in docs/design.md"
    return floors[0]


def imports() -> dict[str, set[str]]:
    """The modules of the package that each one imports at any place but under TYPE_CHECKING."""
    files = {module_name(path): path for path in SOURCE.rglob("*.py")}
    return {name: imported(name, path, set(files)) for name, path in files.items()}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names} & known
            found |= inner if inner and (module == "moemamba" or len(inner) == len(node.names)) else {module}
    return (found & known) - {name, "moemamba"}


def test_imports_go_down():
    up = [
        f"{name} imports {other}"
        for name, others in imports().items()
        if name != "moemamba"
        for other in others
        if floor(other) > floor(name)
    ]
    assert not up


def test_inference_never_imports_training():
    graph = imports()
    assert not [n for n, others in graph.items() if "inference" in n and any("training" in o for o in others)]


def test_no_cycles():
    graph = {name: others for name, others in imports().items() if name != "moemamba"}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_files_stay_small():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    assert statistics.median(lines.values()) <= 150
    assert not {name: count for name, count in lines.items() if count > 400}


def test_no_drawers():
    assert not {path.stem for path in SOURCE.rglob("*.py")} & {"utils", "common", "helpers", "registry", "misc"}


def test_public_names():
    assert set(moemamba.__all__) == PUBLIC
    assert all(getattr(moemamba, name) is not None for name in PUBLIC)
    assert {"selective_scan", "causal_conv1d", "backend"} <= set(moemamba.ops.__all__)
    assert moemamba.layers.Mamba and moemamba.layers.MoE


def test_counting_needs_no_torch():
    program = (
        "import sys, moemamba as mm; print(mm.count_parameters(mm.preset('moe-mamba-100m')).total); "
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2439069696\n", "")
