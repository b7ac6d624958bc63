"""Whatever is in a saved file, it is used or refused with a sentence: thousands of mutants of each kind of file."""

import copy
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moemamba import ModelConfig, MoEMamba, State, load
from moemamba.counting import require_memory
from moemamba.distributed import Processes
from moemamba.reading import read_config
from moemamba.training.run import RunDirectory, read_position, restore
from moemamba.training.run.restoring import examine
from moemamba.training.spread import require_fit
from moemamba.training.update import optimizer_of
from moemamba.training.update.guard import Guard
from moemamba.training.watch.alarms import Alarms
from moemamba.training.watch.metrics import Meter

FIRST = Path(__file__).parent / "fixtures" / "v0.1"
CHECKPOINT = FIRST / "run" / "checkpoints" / "00000008"
CONTENT = "feaf1aa8b1063bec74d36144"
LAYER = {"name": "layers.1.branches.0", "load": [1.0, 0.0], "entropy": 0.1, "max_entropy": 0.7}
ONE = Processes(torch.device("cpu"))
SEEDS = st.integers(0, 1 << 32)
BUDGET = {"deadline": None, "derandomize": True, "database": None}
BUDGET["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

NUMBERS = [-5, -1, 0, 1, 7, 30.5, 1e9, 1 << 31, 1 << 62, 1 << 64, 1 << 2000, 1e300, 1e-300, math.nan, math.inf]
OTHERS = [None, True, "", "x", "30", "\ud800", "<u2", [], {}, [[]], [1, "a"], {"step": None}, "~" * 5000, [-1, 2.5]]
HOW = ["put", "put", "put", "drop", "name"], ["flip", "flip", "put", "cut", "insert"]


def mutants(seed: int) -> Iterator[tuple[list, list, bool]]:
    """Twenty-five times: changes of a JSON tree, edits of bytes, and which of the two to make."""
    draw = random.Random(seed)
    for _ in range(25):
        changes = [
            (draw.getrandbits(20), draw.choice(HOW[0]), draw.choice(NUMBERS + OTHERS))
            for _ in range(draw.randint(1, 2))
        ]
        edits = [(draw.getrandbits(30), draw.choice(HOW[1]), draw.getrandbits(8)) for _ in range(draw.randint(1, 3))]
        yield changes, edits, draw.random() < 0.5


def mutant(text: bytes, change: list) -> bytes:
    """A JSON text with nodes anywhere in it replaced, dropped or renamed."""
    tree = {"root": json.loads(text)}
    for where, how, value in change:
        nodes = list(_nodes(tree))
        holder, key = nodes[where % len(nodes)]
        value = copy.deepcopy(value)
        if how == "put" or holder is tree:
            holder[key] = value
        elif how == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(value)[:50]] = holder.pop(key)
    return json.dumps(tree["root"]).encode()


def _nodes(tree):
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(inner, dict | list):
            yield from _nodes(inner)


def edited(text: bytes, edit: list, most: int | None = None) -> bytes:
    """Bytes with some flipped, put, inserted or cut off, within the first `most`."""
    for where, how, byte in edit:
        place = where % max(1, min(len(text), most or len(text)))
        before, after = text[:place], text[place + 1 :]
        middle = bytes([(text[place] ^ (1 << byte % 8)) if how == "flip" and text else byte])
        text = before if how == "cut" else before + middle + (text[place:] if how == "insert" else after)
    return text


def refused(use) -> None:
    """Call; it may refuse in one sentence, and nothing else may come."""
    try:
        use()
    except (ValueError, OSError) as error:
        said = str(error)
        assert type(error) not in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError) and len(said) > 20, (
            said
        )
        assert "\n" not in said and len(said) < 2000, said


def header(text: bytes) -> tuple[bytes, bytes]:
    """The JSON header of a safetensors file, and what follows it."""
    end = 8 + int.from_bytes(text[:8], "little")
    return text[8:end], text[end:]


def with_header(change: list, text: bytes) -> bytes:
    said, rest = header(text)
    said = mutant(said, change)
    return len(said).to_bytes(8, "little") + said + rest


def resume(run: RunDirectory) -> None:
    """What training does with a run before its first step."""
    config = run.config()
    require_fit(config, ONE)
    run.tokenizer()
    assert config.model.n_blocks * len(config.model.pattern) < 1000 or pytest.fail("built")
    model = MoEMamba(config.model)
    position = restore(run, model, optimizer_of(model, config), CONTENT, lambda said: None, ONE, config.steps)
    Guard(config, torch.device("cpu"), position.skips)
    Meter(config, model.router_names, position.seconds)
    Alarms([2], position.alarms)
    run.log("note", step=position.step, text="resumed")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, and nothing waits for the disk."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("fuzz") / "00000008"))


@pytest.fixture(scope="module")
def trained():
    """A model and its optimiser, as the run has them."""
    config = RunDirectory(FIRST / "run").config()
    model = MoEMamba(config.model)
    return model, optimizer_of(model, config)


@settings(max_examples=80, **BUDGET)
@given(SEEDS)
def test_configurations(folder, seed):
    """config.json and train.json, which hold whatever an editor leaves there."""
    for change, _, _ in mutants(seed):
        (folder / "config.json").write_bytes(mutant((CHECKPOINT / "config.json").read_bytes(), change))
        refused(lambda: require_memory(read_config(ModelConfig, folder / "config.json"), 1 << 34))
        (folder / "train.json").write_bytes(mutant((FIRST / "run" / "train.json").read_bytes(), change))
        refused(RunDirectory(folder).config)


@settings(max_examples=4, **BUDGET)
@given(SEEDS)
def test_models(tmp_path, seed):
    """As above, up to the model."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model", dirs_exist_ok=True))
    for change, _, _ in mutants(seed):
        (folder / "config.json").write_bytes(mutant((CHECKPOINT / "config.json").read_bytes(), change))
        refused(lambda: load(folder))


@settings(max_examples=80, **BUDGET)
@given(SEEDS)
def test_tensors(folder, trained, seed):
    for number, (change, edit, whole) in enumerate(mutants(seed)):
        name, other = ("model.safetensors", "training.safetensors")[:: 1 if number % 2 else -1]
        text = (CHECKPOINT / name).read_bytes()
        shutil.copyfile(CHECKPOINT / other, folder / other)
        (folder / name).write_bytes(
            with_header(change, text) if whole else edited(text, edit, 8 + len(header(text)[0]))
        )
        refused(lambda: examine(folder, *trained))


@settings(max_examples=80, **BUDGET)
@given(SEEDS)
def test_positions(folder, trained, seed):
    """training.json, up to what the training loop makes of it."""
    config = RunDirectory(FIRST / "run").config()

    def use():
        position = read_position(folder)
        Guard(config, torch.device("cpu"), position.skips).state()
        Meter(config, trained[0].router_names, position.seconds)
        Alarms([2], position.alarms).look([LAYER], 1)

    for change, _, _ in mutants(seed):
        (folder / "training.json").write_bytes(mutant((CHECKPOINT / "training.json").read_bytes(), change))
        refused(use)


@settings(max_examples=80, **BUDGET)
@given(SEEDS)
def test_metrics(tmp_path, seed):
    """metrics.jsonl never keeps a run from going on."""
    run = RunDirectory(tmp_path)
    for change, edit, _ in mutants(seed):
        lines = "".join(f"{json.dumps(value)}\n" for _, _, value in change).encode()
        run.log.file.write_bytes(edited((FIRST / "run" / "metrics.jsonl").read_bytes(), edit) + lines + b'{"step": 3')
        run.log.forget_after(8)
        for line in run.log.file.read_bytes().split(b"\n")[:-1]:
            assert json.loads(line)["step"] <= 8


@settings(max_examples=4, **BUDGET)
@given(SEEDS)
def test_whole_runs(tmp_path, seed):
    """A damaged file of a run: it goes on, from the checkpoint before if need be, or says why not."""
    for number, (change, edit, _) in enumerate(mutants(seed)):
        run = RunDirectory(shutil.copytree(FIRST / "run", tmp_path / "run"))
        name = ("training.json", "training.safetensors", "metrics.jsonl", "train.json")[number % 4]
        file = max(run.path.rglob(name))
        text = file.read_bytes()
        file.write_bytes(mutant(text, change) if name in ("training.json", "train.json") else edited(text, edit))
        refused(lambda run=run: resume(run))
        shutil.rmtree(run.path)


@settings(max_examples=80, **BUDGET)
@given(SEEDS)
def test_states(tmp_path, seed):
    text = (FIRST / "state.safetensors").read_bytes()
    file = tmp_path / "state.safetensors"
    for change, edit, whole in mutants(seed):
        file.write_bytes(with_header(change, text) if whole else edited(text, edit))
        refused(lambda: State.load(file))
