"""Whatever is in a saved file, it is used or refused with a sentence: thousands of mutants of each kind of file."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moemamba import ModelConfig, MoEMamba, State, load
from moemamba.counting import require_memory
from moemamba.reading import read_config
from moemamba.training.alarms import Alarms
from moemamba.training.guard import Guard
from moemamba.training.metrics import Meter
from moemamba.training.optim import make_optimizer
from moemamba.training.parallel import require_fit
from moemamba.training.processes import Processes
from moemamba.training.run import Run, read_position
from moemamba.training.saving import examine

FIRST = Path(__file__).parent / "fixtures" / "v0.1"
CHECKPOINT = FIRST / "run" / "checkpoints" / "00000008"
CONTENT = "feaf1aa8b1063bec74d36144"
LAYER = {"name": "layers.1.branches.0", "load": [1.0, 0.0], "entropy": 0.1, "max_entropy": 0.7}
ONE = Processes(torch.device("cpu"))
BUDGET = {"deadline": None, "derandomize": True, "database": None}
BUDGET["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

numbers = st.sampled_from([-5, -1, 0, 1, 7, 30.5, 1e9, 1 << 31, 1 << 62, 1 << 64, 1 << 2000, 1e300, 1e-300])
others = st.sampled_from(
    [None, True, "", "x", "30", "\ud800", "<u2", [], {}, [[]], [1, "a"], {"step": None}, "~" * 5000]
)
strange = st.sampled_from([float("nan"), float("inf"), float("-inf")])
values = (
    numbers | others | strange | st.recursive(numbers | others, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
)
changes = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.sampled_from(["put", "put", "put", "drop", "name"]), values),
    min_size=1,
    max_size=2,
)
edits = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.sampled_from(["flip", "flip", "put", "cut", "insert"]), st.integers(0, 255)),
    min_size=1,
    max_size=3,
)


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


def resume(run: Run) -> None:
    """What training does with a run before its first step."""
    config = run.config()
    require_fit(config, ONE)
    run.tokenizer()
    assert config.model.n_blocks * len(config.model.pattern) < 1000 or pytest.fail("built")
    model = MoEMamba(config.model)
    position = run.restore(model, make_optimizer(model, config), CONTENT, lambda said: None, ONE, config.steps)
    Guard(config, torch.device("cpu"), position.skips)
    Meter(config, model.router_names, position.seconds)
    Alarms([2], position.alarms)
    run.log("note", step=position.step, text="resumed")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, and nothing waits for the disk."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(CHECKPOINT, tmp_path_factory.mktemp("fuzz") / "00000008"))


@pytest.fixture(scope="module")
def trained():
    """A model and its optimiser, as the run has them."""
    config = Run(FIRST / "run").config()
    model = MoEMamba(config.model)
    return model, make_optimizer(model, config)


@settings(max_examples=2000, **BUDGET)
@given(changes)
def test_configurations(folder, change):
    """config.json and train.json, which hold whatever an editor leaves there."""
    (folder / "config.json").write_bytes(mutant((CHECKPOINT / "config.json").read_bytes(), change))
    refused(lambda: require_memory(read_config(ModelConfig, folder / "config.json"), 1 << 34))
    (folder / "train.json").write_bytes(mutant((FIRST / "run" / "train.json").read_bytes(), change))
    refused(Run(folder).config)


@settings(max_examples=100, **BUDGET)
@given(changes)
def test_models(tmp_path, change):
    """As above, up to the model."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "model", dirs_exist_ok=True))
    (folder / "config.json").write_bytes(mutant((CHECKPOINT / "config.json").read_bytes(), change))
    refused(lambda: load(folder))


@settings(max_examples=2000, **BUDGET)
@given(changes, edits, st.booleans(), st.sampled_from(["model.safetensors", "training.safetensors"]))
def test_tensors(folder, trained, change, edit, whole, name):
    text = (CHECKPOINT / name).read_bytes()
    for file in ("model.safetensors", "training.safetensors"):
        shutil.copyfile(CHECKPOINT / file, folder / file)
    (folder / name).write_bytes(with_header(change, text) if whole else edited(text, edit, 8 + len(header(text)[0])))
    refused(lambda: examine(folder, *trained))


@settings(max_examples=2000, **BUDGET)
@given(changes)
def test_positions(folder, trained, change):
    """training.json, up to what the training loop makes of it."""
    (folder / "training.json").write_bytes(mutant((CHECKPOINT / "training.json").read_bytes(), change))
    config = Run(FIRST / "run").config()

    def use():
        position = read_position(folder)
        Guard(config, torch.device("cpu"), position.skips).state()
        Meter(config, trained[0].router_names, position.seconds)
        Alarms([2], position.alarms).look([LAYER], 1)

    refused(use)


@settings(max_examples=2000, **BUDGET)
@given(edits, st.lists(values, max_size=3))
def test_metrics(tmp_path, edit, lines):
    """metrics.jsonl never keeps a run from going on."""
    run = Run(tmp_path)
    text = edited((FIRST / "run" / "metrics.jsonl").read_bytes(), edit)
    run.metrics.write_bytes(text + "".join(f"{json.dumps(line)}\n" for line in lines).encode() + b'{"step": 3')
    run._forget_after(8)
    for line in run.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        assert json.loads(line)["step"] <= 8


@settings(max_examples=40, **BUDGET)
@given(changes, edits, st.sampled_from(["training.json", "training.safetensors", "metrics.jsonl", "train.json"]))
def test_whole_runs(tmp_path, change, edit, name):
    """A damaged file of a run: it goes on, from the checkpoint before if need be, or says why not."""
    run = Run(shutil.copytree(FIRST / "run", tmp_path / "run"))
    file = next(iter(sorted(run.path.rglob(name), reverse=True)))
    text = file.read_bytes()
    file.write_bytes(mutant(text, change) if name in ("training.json", "train.json") else edited(text, edit))
    refused(lambda: resume(run))
    shutil.rmtree(run.path)


@settings(max_examples=2000, **BUDGET)
@given(changes, edits, st.booleans())
def test_states(tmp_path, change, edit, whole):
    text = (FIRST / "state.safetensors").read_bytes()
    file = tmp_path / "state.safetensors"
    file.write_bytes(with_header(change, text) if whole else edited(text, edit))
    refused(lambda: State.load(file))
