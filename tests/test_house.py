"""The house keeps its order, which docs/design.md explains: what may import what, how long files are, what is public.

Everything goes by path, so that no file hides behind another of its name.
"""

import ast
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import moemamba

SOURCE = Path(moemamba.__file__).parent
ROOT = Path(__file__).parent.parent
WRITTEN = {".py", ".cu", ".css", ".html", ".js"}  # by people: the limits of length are for these

# The rooms that need no torch, in order: each imports from those before it.
GROUND = ("host", "reading", "marks", "letters", "config", "counting", "presets", "text", "tokenizer")
# The rooms above, in order: what else than the ground each may import, of which every room stands before it.
ROOMS = {
    "device": "",
    "tensors": "",
    "ops": "",
    "layers": "ops",
    "state": "layers tensors",
    "initialisation": "layers",
    "model": "initialisation layers ops state",
    "checkpoint": "device layers model tensors",
    "data": "",
    "distributed": "device initialisation layers model",
    "training": "checkpoint data device distributed initialisation layers model ops state tensors",
    "inference": "device layers model ops state",
    "inspection": "layers model ops state",
    "serving": "inference model state tensors",
    "longcontext": "data layers model state training",
    "experiments": "data device distributed training",
    "finetuning": "checkpoint data device distributed layers model ops training",
    "integrations": "checkpoint inference layers model ops state tensors training",
    "cli": (
        "checkpoint data device distributed experiments finetuning inference inspection integrations layers "
        "longcontext model ops serving training"
    ),
    "__main__": "cli",
}
# Folders of a room in order: each sees those before it.
STACKS = {"moemamba.experiments": ("results", "page", "compare", "law", "paper")}
FOLDER = 15  # files in a folder
PEERS = {"cli": 30, "letters": 25, "layers": 25}  # those of files of one kind
DRAWERS = {"utils", "util", "common", "helpers", "registry", "misc", "shared", "base", "core", "tools"}
PUBLIC = {
    "AttentionConfig",
    "ByteTokenizer",
    "CheckpointError",
    "Corpus",
    "Diverged",
    "Evaluation",
    "ExpertsConfig",
    "FeedForwardConfig",
    "Interrupted",
    "Look",
    "MambaConfig",
    "MoEMamba",
    "ModelConfig",
    "Moment",
    "Output",
    "Report",
    "RoutedMambaConfig",
    "RouterStats",
    "State",
    "Tokenizer",
    "Tokens",
    "TrainConfig",
    "TrainResult",
    "count_parameters",
    "evaluate",
    "generate",
    "layers",
    "load",
    "look",
    "make_optimizer",
    "ops",
    "prepare",
    "preset",
    "presets",
    "save",
    "train",
}


class Import(NamedTuple):
    """A name that one module of the package takes from another."""

    by: str
    module: str
    name: str | None
    """None: the module itself"""
    at_once: bool
    """when `by` is imported, not when a function of it is called"""

    def __str__(self):
        return f"{self.by} imports {self.module}" + (f":{self.name}" if self.name else "")


@cache
def modules() -> dict[str, Path]:
    """Every module of the package: "moemamba.ops.scan" is the face of its folder."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def statements(module: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements of a module but for those under TYPE_CHECKING, and whether each runs at once."""
    found = []

    def walk(node, at_once):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, at_once))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                walk(child, at_once)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                walk(child, at_once and not inside)

    walk(parsed(module), True)
    return found


def origin(module: str, node: ast.ImportFrom) -> str:
    """The full name of what stands behind `from`."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


@cache
def imports() -> list[Import]:
    """All imports within the package."""
    found = []
    for by in modules():
        for node, at_once in statements(by):
            if isinstance(node, ast.Import):
                found += [Import(by, alias.name, None, at_once) for alias in node.names if alias.name in modules()]
                continue
            module = origin(by, node)
            for alias in node.names:
                if f"{module}.{alias.name}" in modules():
                    found.append(Import(by, f"{module}.{alias.name}", None, at_once))
                elif module in modules():
                    found.append(Import(by, module, alias.name, at_once))
    return [each for each in found if each.module not in (each.by, "moemamba")]


def room(module: str) -> str:
    """Of "moemamba.ops.scan.cpu": "ops"; of the package's face: ""."""
    return f"{module}.".split(".")[1]


def family(module: str) -> str:
    """The folder that a module is in; a file that lies beside rooms is a family of its own."""
    if modules()[module].name == "__init__.py":
        return module
    folder = module.rpartition(".")[0]
    return module if folder == "moemamba" else folder


def op_family(module: str) -> str | None:
    """Of "moemamba.ops.scan.cpu": "scan"; None outside ops, and for what stands there by itself or is in the kit."""
    parts = module.split(".")
    in_folder = len(parts) > 2 and parts[1] == "ops" and modules()[".".join(parts[:3])].name == "__init__.py"
    return parts[2] if in_folder and parts[2] != "kit" else None


def written() -> dict[str, int]:
    """Lines of every file that people wrote, by its path in the package."""
    paths = [path for path in sorted(SOURCE.rglob("*")) if path.suffix in WRITTEN]
    return {f"{path.relative_to(SOURCE)}": len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


def test_every_room_is_known():
    rooms = {room(module) for module in modules()} - {""}
    assert rooms <= {*GROUND, *ROOMS}, "give each a line in GROUND or ROOMS and in docs/design.md"


def test_rooms_stand_on_those_before_them():
    order = list(ROOMS)
    assert not [(name, under) for name in order for under in ROOMS[name].split() if under not in order]
    up = [(name, under) for name in order for under in ROOMS[name].split() if order.index(under) >= order.index(name)]
    assert not up


def test_imports_go_down():
    def allowed(by: str, other: str) -> bool:
        if by in GROUND:
            return other in GROUND[: GROUND.index(by)]
        return other in GROUND or other in ROOMS.get(by, "").split()

    across = [each for each in imports() if room(each.by) not in ("", room(each.module))]
    assert not [f"{each}" for each in across if not allowed(room(each.by), room(each.module))]


@pytest.mark.parametrize(("folder", "order"), STACKS.items())
def test_folders_stand_on_those_before_them(folder, order):
    inner = [each for each in imports() if each.by.startswith(f"{folder}.") and each.module.startswith(f"{folder}.")]
    places = [[order.index(name.split(".")[2]) for name in (each.by, each.module)] for each in inner]
    assert not [f"{each}" for each, (by, other) in zip(inner, places, strict=True) if other > by]


def test_no_circle():
    graph = {module: set() for module in modules() if module != "moemamba"}
    for each in imports():
        if each.by in graph:
            graph[each.by].add(each.module)
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_no_private_name_leaves_its_family():
    def private(name: str | None) -> bool:
        return bool(name) and name.startswith("_") and not name.startswith("__")

    taken = [
        f"{each}"
        for each in imports()
        if family(each.by) != family(each.module) and (private(each.name) or private(each.module.rpartition(".")[2]))
    ]
    for by in modules():
        foreign = {}  # names here that stand for modules of other families
        for node, _ in statements(by):
            if isinstance(node, ast.ImportFrom):
                module = origin(by, node)
                foreign |= {a.asname or a.name: f"{module}.{a.name}" for a in node.names}
        foreign = {name: m for name, m in foreign.items() if m in modules() and family(m) != family(by)}
        for node in ast.walk(parsed(by)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in foreign:
                taken += [f"{by} uses {foreign[node.value.id]}.{node.attr}"] if private(node.attr) else []
    assert not taken


def test_families_of_ops_meet_at_their_faces():
    """And at their references, which are made of each other; kernels of one family are nobody else's."""
    inner = [each for each in imports() if op_family(each.module) and each.module.count(".") > 2]
    met = [each for each in inner if op_family(each.by) != op_family(each.module)]
    assert not [f"{each}" for each in met if (each.by + each.module).count(".reference") != 2]


def test_choosing_knows_no_family():
    assert not [f"{each}" for each in imports() if each.by == "moemamba.ops.choice" and op_family(each.module)]


def test_files_stay_short():
    lines = written()
    assert not {path: count for path, count in lines.items() if count > 400}
    assert statistics.median(lines.values()) <= 120


def test_folders_stay_small():
    folders = {path.parent for path in SOURCE.rglob("*") if "__pycache__" not in path.parts and path.is_file()}
    counts = {}
    for folder in folders:
        name = f"{folder.relative_to(SOURCE)}"
        counts[name] = sum(path.is_file() for path in folder.iterdir()), PEERS.get(name, FOLDER)
    assert not {name: count for name, (count, most) in counts.items() if count > most}


def test_no_drawers():
    paths = [path.relative_to(SOURCE) for path in SOURCE.rglob("*")]
    assert not [f"{path}" for path in paths if path.stem in DRAWERS]


def test_letters_are_told_apart_in_their_room_alone():
    """No `match` on letters elsewhere, and no `case _` that swallows one that is forgotten."""
    found = []
    for module in modules():
        for node in ast.walk(parsed(module)):
            if not isinstance(node, ast.Match):
                continue
            cases = [ast.unparse(case.pattern) for case in node.cases]
            if room(module) != "letters" and set(cases) & {f"'{letter}'" for letter in "MEFAR"}:
                found.append(f"{module}:{node.lineno} matches letters")
            if cases[-1] == "_" and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node.cases[-1])):
                found.append(f"{module}:{node.lineno} has a silent case _")
    assert not found


def test_public_names():
    assert set(moemamba.__all__) == PUBLIC
    assert all(getattr(moemamba, name) is not None for name in PUBLIC)
    assert {"selective_scan", "causal_conv1d", "backend"} <= set(moemamba.ops.__all__)
    assert "grouped_linear" not in moemamba.ops.__all__
    assert moemamba.layers.Mamba and moemamba.layers.MoE


def test_one_version():
    assert f"\nversion: {moemamba.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_ground_imports_no_torch():
    """Nor does the command line, nor the options that it shows, before a function is called that needs it."""
    heavy = {"torch", "triton", "numba"}
    direct = {}
    for module in modules():
        names = set()
        for node, at_once in statements(module):
            if at_once:
                is_from = isinstance(node, ast.ImportFrom)
                full = [origin(module, node)] if is_from else [alias.name for alias in node.names]
                names |= {name.split(".")[0] for name in full}
        direct[module] = names & heavy
    reached = {module: set() for module in modules()}
    for each in imports():
        if each.at_once:
            parts = each.module.split(".")  # the faces above a module are imported with it
            reached[each.by] |= {".".join(parts[: n + 1]) for n in range(1, len(parts))}

    def heavily(module: str, seen: set[str]) -> str | None:
        if module in seen:
            return None
        seen.add(module)
        if direct[module]:
            return module
        return next(filter(None, (heavily(other, seen) for other in sorted(reached[module]))), None)

    light = [m for m in modules() if room(m) in (*GROUND, "cli", "__main__") or re.search(r"\.config$", m)]
    loads = {module: heavily(module, set()) for module in light}
    assert not {module: through for module, through in loads.items() if through}


@pytest.mark.parametrize(
    "program",
    [
        "import moemamba as mm; assert mm.count_parameters(mm.preset('moe-mamba-100m')).total == 2439069696",
        "run('--help')",
        "run('train', '--help-all')",
        "run('info', 'moe-mamba-tiny')",
    ],
)
def test_answers_without_torch(program):
    answer = (
        "import sys\n"
        "def run(*words):\n"
        "    from moemamba.cli import main\n"
        "    sys.argv = ['moemamba', *words]\n"
        "    try: main()\n"
        "    except SystemExit as left: assert not left.code, left.code\n"
        f"{program}\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", answer], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.md")])


@pytest.mark.parametrize("path", documents(), ids=lambda path: f"{path.relative_to(ROOT)}")
def test_documents_have_short_lines(path):
    """Rows of tables apart, which cannot be broken."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert not [number for number, line in lines if len(line) > 120 and not line.startswith("|")]


FILE = re.compile(r"`((?:src/moemamba/|tests/|benchmarks/|docs/)?[\w./-]*\w\.(?:py|cu|css|md|json|toml|html|yml))`")
HISTORY = {"CHANGELOG.md", "docs/log.md"}  # what they speak of may be gone


@pytest.mark.parametrize(
    "path", [p for p in documents() if f"{p.relative_to(ROOT)}" not in HISTORY], ids=lambda p: f"{p.relative_to(ROOT)}"
)
def test_documents_name_files_that_exist(path):
    """A path with a folder lies in the repository or, shortened, in the package."""
    named = [name for name in FILE.findall(path.read_text(encoding="utf-8")) if "/" in name]
    named = [name for name in named if not re.search(r"\bx\b", name)]  # the one that a reader is going to add
    places = (ROOT, SOURCE, path.parent)
    run = {"checkpoints", "runs", "gpt2"}  # files of the reader
    missing = [n for n in named if n.split("/")[0] not in run and not any((place / n).exists() for place in places)]
    assert not missing
