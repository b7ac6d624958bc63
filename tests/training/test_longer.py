"""Beginning with weights that are there, going on longer, and branching: what is kept, what is new, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import load_file

from moemamba import ModelConfig, MoEMamba, TrainConfig, load, save, train
from moemamba.cli.train import read
from moemamba.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, MambaConfig, RoutedMambaConfig
from moemamba.host.progress import Report
from moemamba.letters import LETTERS
from moemamba.text import ByteTokenizer, train_bpe
from moemamba.training.run import origin
from moemamba.training.update.schedule import becomes, fall, learning_rate, warmup_steps

SILENT = Report(silent=True)
TINY = ModelConfig("ME", 1, 16, experts=ExpertsConfig(4, d_expert=16))


class Told(Report):
    """Remembers what is said."""

    def __init__(self):
        super().__init__(silent=True)
        self.said = []

    def note(self, text):
        self.said.append(text)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longer")
    (folder / "text.txt").write_text(Path(dataclasses.__file__).read_text())
    return TrainConfig(
        TINY,
        str(folder / "text.txt"),
        run=str(folder / "trunk"),
        steps=40,
        warmup=0.1,
        schedule="wsd",
        batch_size=2,
        context=16,
        log_every=1,
        eval_every=100,
        eval_tokens=64,
        save_every=10,
        keep=9,
    )


@pytest.fixture(scope="module")
def trunk(base):
    """A run under wsd whose plateau reaches to step 32: its folder."""
    train(base, report=SILENT)
    return Path(base.run)


@pytest.fixture
def config(base, tmp_path):
    return dataclasses.replace(base, run=str(tmp_path / "run"))


def lines(run, kind="train"):
    found = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def recorded(run):
    return json.loads((Path(run) / "train.json").read_text())


def assert_same(one, other):
    expected = other.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in one.state_dict().items())


def assert_same_course(one, other):
    """Two runs, bit for bit: weights, optimiser, and every loss and rate on the way.

    Not the states of torch's own generators, which training leaves alone: they are whatever they were before.
    """
    assert_same(load(one)[0], load(other)[0])
    first, last = (load_file(origin.checkpoints(Path(run))[-1] / "training.safetensors") for run in (one, other))
    assert all(torch.equal(value, last[name]) for name, value in first.items() if not name.startswith("random."))
    for mine, its in zip(lines(one), lines(other), strict=True):
        assert [mine[name] for name in ("step", "loss", "learning_rate", "grad_norm")] == [
            its[name] for name in ("step", "loss", "learning_rate", "grad_norm")
        ]


# Starting from weights


@pytest.mark.parametrize("place", ["run", "checkpoint", "saved"])
def test_start(place, trunk, config, tmp_path):
    folder = {"run": trunk, "checkpoint": trunk / "checkpoints" / "00000020", "saved": tmp_path / "saved"}[place]
    if place == "saved":
        save(folder, *load(trunk))
    config = dataclasses.replace(config, start=str(folder), schedule="cosine", steps=5)
    assert_same(train(config, stop=0, report=SILENT).model, load(folder)[0])
    train(config, resume=True, report=SILENT)
    assert lines(config.run)[0]["loss"] < lines(trunk)[0]["loss"] - 0.5
    assert [line["learning_rate"] for line in lines(config.run)] == [learning_rate(config, step) for step in range(5)]
    state = load_file(Path(config.run) / "checkpoints" / "00000005" / "training.safetensors")
    assert {value.item() for name, value in state.items() if name.startswith("step.")} == {5.0}


def test_start_is_kept_where_the_other_run_goes_on(trunk, config):
    other = Path(config.run).parent / "other"
    shutil.copytree(trunk, other)
    shutil.rmtree(other / "checkpoints" / "00000040")
    config = dataclasses.replace(config, start=str(other))
    train(config, stop=0, report=SILENT)
    assert recorded(config.run)["start"] == str(other / "checkpoints" / "00000030")
    shutil.copytree(trunk / "checkpoints" / "00000040", other / "checkpoints" / "00000040")
    assert_same(train(config, resume=True, stop=0, report=SILENT).model, load(other / "checkpoints" / "00000030")[0])
    with pytest.raises(ValueError, match=r"start is '.*trunk', but the run in .* began with '.*00000030'; resume with"):
        train(dataclasses.replace(config, start=str(trunk)), resume=True, report=SILENT)
    with pytest.raises(ValueError, match=r"start is None, but the run in"):
        train(dataclasses.replace(config, start=None), resume=True, report=SILENT)


def test_start_by_a_relative_name(trunk, config, monkeypatch):
    monkeypatch.chdir(trunk.parent)
    config = dataclasses.replace(config, start="trunk")
    train(config, stop=1, report=SILENT)
    assert recorded(config.run)["start"] == str(trunk / "checkpoints" / "00000040")
    train(config, resume=True, stop=2, report=SILENT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": TINY.replace(d_model=32)}, "d_model is 32, not 16"),
        ({"model": TINY.replace(pattern="MF")}, "pattern is 'MF', not 'ME'"),
        ({"model": TINY.replace(top_k=2, n_experts=8)}, "experts.n_experts is 8, not 4, experts.top_k is 2, not 1"),
        ({"tokenizer": "bpe-300"}, "it has 300 tokens, not 257"),
        ({"start": "/nowhere"}, "start is /nowhere, where there is no model"),
    ],
)
def test_start_refused(change, said, trunk, config):
    with pytest.raises(ValueError, match=said):
        train(dataclasses.replace(config, **{"start": str(trunk), **change}), report=SILENT)
    assert not (Path(config.run) / "train.json").exists()


OTHER = {"init": "paper", "capacity_factor": 0.5, "balance_weight": 0.1, "z_weight": 0.1, "bias_rate": 0.1}


def test_start_with_another_capacity(trunk, config):
    freer = TINY.replace(**OTHER)
    train(dataclasses.replace(config, start=str(trunk), model=freer), stop=1, report=SILENT)


def test_what_is_free_changes_no_function():
    """Each field that is marked so: the same weights give the same logits with another value of it."""
    kinds = (ModelConfig, *{type(getattr(TINY, part)) for letter in LETTERS.values() for part in letter.parts})
    free = {each.name for kind in kinds for each in dataclasses.fields(kind) if each.metadata.get("free")}
    assert free == {*OTHER, "vocab_size"}  # which is settled by the weights
    model, tokens = MoEMamba(TINY).eval(), torch.arange(30)[None]
    for name, value in OTHER.items():
        other = MoEMamba(TINY.replace(**{name: value})).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens).logits, other(tokens).logits), name


def test_a_tokenizer_of_the_same_size_is_another(tmp_path):
    one, other = (train_bpe([Path(module.__file__).read_text()], 300) for module in (json, shutil))
    save(tmp_path / "saved", MoEMamba(TINY.replace(vocab_size=300)), one)
    config = TrainConfig(TINY.replace(vocab_size=300), start=str(tmp_path / "saved"))
    origin.check_start(config, one)
    with pytest.raises(ValueError, match=r"it has as many tokens \(300\), but others"):
        origin.check_start(config, other)


def models():
    """Small configurations in all their variety."""
    few = some.integers(1, 3)
    experts = some.builds(ExpertsConfig, some.integers(2, 4), some.integers(1, 2), some.sampled_from([None, 8, 32]))
    return some.builds(
        ModelConfig,
        pattern=some.sampled_from(["M", "ME", "(ME)", "MF", "MA", "R", "ER"]),
        n_blocks=few,
        d_model=some.sampled_from([8, 16]),
        mamba=some.builds(MambaConfig, some.integers(2, 3), few, some.just(2.0), some.sampled_from([None, 1, 2])),
        experts=experts,
        routed=some.builds(RoutedMambaConfig, routing=some.sampled_from(["shared", "independent"]), experts=experts),
        attention=some.builds(AttentionConfig, some.sampled_from([None, 1, 2])),
        feedforward=some.builds(FeedForwardConfig, some.sampled_from([None, 8]), bias=some.booleans()),
        norm=some.sampled_from(["rmsnorm", "layernorm"]),
        tie_embeddings=some.booleans(),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(one=models(), other=models())
def test_what_may_start_has_the_same_tensors(one, other, tmp_path_factory):
    """Of any two models: accepted, they have the same tensors; with other tensors, refused."""
    folder = tmp_path_factory.mktemp("model")
    for mine, theirs in ((one, other), (one, one), (dataclasses.replace(one, n_blocks=4), one)):
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(theirs)))
        (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
        with torch.device("meta"):
            shapes = [{name: value.shape for name, value in MoEMamba(m).state_dict().items()} for m in (mine, theirs)]
        try:
            origin.check_start(TrainConfig(mine, start=str(folder)), ByteTokenizer())
            assert shapes[0] == shapes[1]
        except ValueError as error:
            assert mine != theirs and "is not that of start" in str(error)


# Going on longer


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_longer(schedule, config):
    config = dataclasses.replace(config, schedule=schedule, steps=20, save_every=7)
    train(config, report=SILENT)
    longer = dataclasses.replace(config, steps=40)
    told = Told()
    train(longer, resume=True, stop=30, report=told)
    (said,) = [line for line in told.said if line.startswith("schedule")]
    assert "40 steps in all, 20 before" in said and "step 21" in said
    (line,) = lines(config.run, "schedule")
    rate = learning_rate(longer, 20, warmup=2)
    assert line == {"kind": "schedule", "step": 20, "steps_before": 20, "steps": 40, "learning_rate": rate}
    assert recorded(config.run)["steps"] == 40 and recorded(config.run)["warmup"] == config.warmup
    train(read(["--run", config.run, "--resume"]).config, resume=True, report=SILENT)  # knows it by itself
    assert len(lines(config.run, "schedule")) == 1
    expected = [learning_rate(config, step) for step in range(20)]
    expected += [learning_rate(longer, step, warmup=2) for step in range(20, 40)]
    assert [line["learning_rate"] for line in lines(config.run)] == expected
    if schedule == "wsd":
        assert expected[20:32] == [config.learning_rate] * 12

    at_once = dataclasses.replace(config, run=config.run + "-at-once")
    train(at_once, report=SILENT)
    train(dataclasses.replace(at_once, steps=40), resume=True, report=SILENT)
    assert_same_course(config.run, at_once.run)
    with pytest.raises(ValueError, match=r"39.* has done 40|at step 40.* 39"):
        train(dataclasses.replace(config, steps=39), resume=True, report=SILENT)
    assert recorded(config.run)["steps"] == 40


def test_longer_asked_twice_before_anything_is_saved(config):
    config = dataclasses.replace(config, steps=4)
    train(config, report=SILENT)
    for _ in range(2):
        train(dataclasses.replace(config, steps=8), resume=True, stop=4, report=SILENT)
    assert len(lines(config.run, "schedule")) == 1


def test_a_checkpoint_of_an_older_version_keeps_its_warmup(config):
    train(dataclasses.replace(config, steps=20), report=SILENT)
    for file in Path(config.run).glob("checkpoints/*/training.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps({name: values[name] for name in values if name not in ("planned", "warmup")}))
    train(config, resume=True, report=SILENT)
    assert lines(config.run)[-1]["learning_rate"] == learning_rate(config, 39, warmup=2)
    assert json.loads((Path(config.run) / "checkpoints" / "00000040" / "training.json").read_text())["warmup"] == 2


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    some.sampled_from(["cosine", "linear", "wsd"]),
    some.integers(1, 500),
    some.integers(1, 500),
    some.floats(0, 0.5),
    some.floats(0, 1),
    some.data(),
)
def test_rates_of_longer_runs(schedule, steps, more, warmup, cooldown, data):
    """Whatever the steps: rates lie between nothing and the peak, the warm-up is never gone through again."""
    before = TrainConfig(steps=steps, schedule=schedule, warmup=warmup, cooldown=cooldown, learning_rate=1.0)
    now = dataclasses.replace(before, steps=steps + more)
    kept, step = warmup_steps(before), data.draw(some.integers(0, steps))
    rates = [learning_rate(now, each, kept) for each in range(step, steps + more)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    if step >= kept:
        assert rates == sorted(rates, reverse=True)
        assert rates[0] >= learning_rate(before, step, kept) - 1e-12
    if schedule == "wsd" and kept <= step <= fall(before, kept) <= fall(now, kept):
        assert rates[0] == 1.0
    assert f"the rate of step {step + 1:,} is {rates[0]:.3g}" in becomes(before, now, step, kept)


# Branching


def test_a_cooldown_is_a_run_that_had_these_steps_from_the_beginning(trunk, config):
    asked = read(["--branch", str(trunk / "checkpoints" / "00000020"), "--run", config.run, "--steps", "30"])
    assert asked.config.cooldown == pytest.approx(10 / 30)
    told = Told()
    train(asked.config, stop=25, report=told)
    assert any("30 steps in all, 40 before: the rate cools down from here on" in line for line in told.said)
    train(read(["--run", config.run, "--resume"]).config, resume=True, report=SILENT)
    straight = dataclasses.replace(config, run=config.run + "-straight", steps=30, warmup=4 / 30, cooldown=10 / 30)
    train(straight, report=SILENT)
    assert_same_course(config.run, straight.run)
    assert lines(config.run)[19]["learning_rate"] == config.learning_rate > lines(config.run)[20]["learning_rate"]
    assert recorded(config.run)["branch"] == str(trunk / "checkpoints" / "00000020")
    assert len(lines(trunk)) == 40 and recorded(trunk)["steps"] == 40  # untouched


def test_a_branch_that_was_killed_before_it_saved(trunk, config):
    config = dataclasses.replace(config, branch=str(trunk / "checkpoints" / "00000030"), steps=36, cooldown=6 / 36)
    train(config, report=SILENT)
    killed = dataclasses.replace(config, run=config.run + "-killed")
    train(killed, stop=30, report=SILENT)
    shutil.rmtree(Path(killed.run) / "checkpoints")  # not even the first checkpoint was there
    train(killed, resume="auto", report=SILENT)
    assert_same_course(config.run, killed.run)


def test_a_branch_of_the_newest_goes_on_as_the_run_itself(trunk, config):
    train(dataclasses.replace(config, run=config.run + "-a"), stop=10, report=SILENT)
    train(read(["--branch", config.run + "-a", "--run", config.run, "--cooldown", "0.2"]).config, report=SILENT)
    assert_same_course(config.run, trunk)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 20}, "steps is 20, but .*00000020 has done 20; give more"),
        ({"steps": 30, "cooldown": 0.9}, "begins before step 20, where the run branches: the rate would jump from"),
        ({"steps": 30, "cooldown": 0.1, "learning_rate": 0.1}, "learning_rate is 0.1, but the run in .* began with"),
        ({"steps": 30, "cooldown": 0.1, "data_seed": 3}, "data_seed is 3, but the run in .* began with 0"),
        ({"data": str(Path(shutil.__file__))}, "the training data is not that of branch"),
        ({"branch": "/nowhere"}, "branch is /nowhere, where there is no model"),
    ],
)
def test_branch_refused(change, said, trunk, config):
    branch = {"branch": str(trunk / "checkpoints" / "00000020")}
    with pytest.raises(ValueError, match=said):
        train(dataclasses.replace(config, **(branch | change)), report=SILENT)
    assert not (Path(config.run) / "train.json").exists()


def test_a_saved_model_has_no_branches(trunk, config, tmp_path):
    save(tmp_path / "saved", *load(trunk))
    with pytest.raises(ValueError, match=r"not in the directory of a run.* take the weights alone with start"):
        train(dataclasses.replace(config, branch=str(tmp_path / "saved")), report=SILENT)


def test_start_and_branch():
    with pytest.raises(ValueError, match="start takes weights alone, branch all of a checkpoint"):
        TrainConfig(start="a", branch="b")


# The command line


def test_options_of_a_start(trunk, tmp_path):
    asked = read(["--start", str(trunk), "--learning-rate", "0.001"]).config
    assert asked.model == dataclasses.replace(TINY, vocab_size=257) and asked.tokenizer == "bytes"
    assert asked.learning_rate == 0.001 and asked.schedule == "cosine" and asked.start == str(trunk)
    own = train_bpe(["the cat sat on the mat. " * 99], 262)
    save(tmp_path / "saved", MoEMamba(TINY.replace(vocab_size=own.vocab_size)), own)
    assert read(["--start", str(tmp_path / "saved")]).config.tokenizer == str(tmp_path / "saved")
    assert read(["mamba-tiny", "--start", str(trunk)]).config.model.pattern != "ME"
