"""Options: read as they are declared, refused in a sentence, explained each by itself."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moemamba
from moemamba import ModelConfig, TrainConfig, cli, load, preset
from moemamba.cli.compare import Compare
from moemamba.cli.options import Option, options
from moemamba.cli.train import Train, read
from moemamba.device import find_device
from moemamba.marks import changeable, marks
from moemamba.training.spread import check_used


def kind(command: str) -> type:
    """The dataclass of a command has its name."""
    return getattr(import_module(f"moemamba.cli.{command}"), command.capitalize())


def everything() -> list[Option]:
    return [option for command in cli.COMMANDS for option in options(kind(command))]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line as `main` does: (status, output, errors)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemamba", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as left:
            status = int(left.code or 0)
        return status, *capsys.readouterr()

    return call


# Reading

TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=8).filter(
    lambda text: text[0] not in "-~" and text != "None" and "/" not in text and ":" not in text
)
VALUES = {
    "steps": st.integers(1, 10**9),
    "learning_rate": st.floats(1e-9, 10),
    "warmup": st.floats(0, 1),
    "optimizer": st.sampled_from(["adamw", "muon"]),
    "spike_factor": st.none() | st.floats(1.5, 100),
    "compile": st.booleans(),
    "tensorboard": st.booleans(),
    "run": TEXT,
    "tokenizer": TEXT,
    "data": st.none() | TEXT | st.lists(TEXT, min_size=2, max_size=3).map(tuple),
    "seed": st.integers(0, 2**62),
}
MODEL_VALUES = {
    "d_model": st.integers(1, 4096),
    "final_norm": st.booleans(),
    "norm": st.sampled_from(["rmsnorm", "layernorm"]),
}


def written(prefix: str, values: dict[str, object], data: st.DataObject) -> list[str]:
    """A command line for values, in any of the ways that one may write it."""
    words: list[str] = []
    for name, value in values.items():
        shown = name.replace("_", data.draw(st.sampled_from("-_")))
        if isinstance(value, bool):
            words.append(f"--{prefix}{shown}" if value else f"--{prefix}no-{shown}")
        elif isinstance(value, tuple):
            words += [f"--{prefix}{shown}", *value]
        elif data.draw(st.booleans()):
            words.append(f"--{prefix}{shown}={value}")
        else:
            words += [f"--{prefix}{shown}", str(value)]
    return words


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.fixed_dictionaries({}, optional=VALUES),
    st.fixed_dictionaries({}, optional=MODEL_VALUES),
    st.booleans(),
    st.data(),
)
def test_what_is_written_is_read(values, model, resume, data):
    words = written("", values, data) + written("model.", model, data) + (["--auto-resume"] if resume else [])
    default = TrainConfig()
    wanted = dataclasses.replace(default, **values, model=default.model.replace(**model))
    found = read(words)
    if "--auto-resume" not in words:
        assert found == Train(wanted)
    else:
        assert found.config == wanted and found.auto_resume


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*(option.name for option in options(Train)), "x", "-1", "", "--", "None", "1e3"])))
def test_no_words_end_in_anything_but_a_sentence(words):
    try:
        read(["--steps", "3", *words])
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--steps", "1e3"], "--steps is '1e3'; expected a whole number, such as 1000"),
        (["train", "--learning-rate", "fast"], "--learning-rate is 'fast'; expected a number, such as 0.5"),
        (["train", "--optimizer", "sgd"], "--optimizer is 'sgd'; choose one of adamw, muon"),
        (["train", "--stepz", "3"], "there is no option --stepz; did you mean --steps?"),
        (["train", "--d-model", "3"], "there is no option --d-model; did you mean --model.d-model?"),
        (["train", "--n-experts=3"], "did you mean --model.experts.n-experts or --model.routed.experts.n-experts?"),
        (["train", "--steps"], "--steps needs a value: a whole number, such as 1000"),
        (["train", "--run", "--resume"], "--run needs a value: TEXT (write --run=--resume if it is '--resume')"),
        (["train", "--resume=yes"], "--resume takes no value; write --resume, or --no-resume"),
        (["train", "--steps", "3", "mamba-tiny"], "'mamba-tiny' belongs to no option"),
        (["train", "text.txt"], "text.txt is no configuration; a text to train on goes to --data text.txt"),
        (["train", "words"], "words is no configuration; a text to train on goes to --data words"),
        (
            ["train", "moe-mamba-tinny"],
            "there is no preset, run or file 'moe-mamba-tinny'; did you mean moe-mamba-tiny?",
        ),
        (["train", "nested.json"], "nested.json.experts: top_k is 257, more than n_experts = 4"),
        (["train", "--learning-rate", "inf"], "learning_rate is inf; expected a finite number"),
        (["train", "--start", ""], "start is '', which names no model; name one, or leave it out"),
        (["train", "--branch="], "branch is '', which names no run; name one, or leave it out"),
        (["train", "--tokenizer", ""], "tokenizer is '', which names no tokenizer; name one, or leave it out"),
        (["compare", "mamba-tiny", "moe-mamba-tiny", "--out", ""], "--out is '', which names nothing; name a path"),
        (["prepare", "text.txt", "--out", " "], "--out is ' ', which names nothing; name a path"),
        (["report", ""], "RUNS is '', which names nothing"),
        (["generate", ""], "RUN is '', which names nothing; name a path, or . for the current folder"),
        (["generate"], "RUN is missing: a run directory or a checkpoint; see moemamba generate --help"),
        (
            ["info", "runs/none"],
            "there is no model at runs/none; name a run directory, a checkpoint, a config.json or a",
        ),
        (["info", "nothing"], "there is no preset, run or file 'nothing'; moemamba --help lists them"),
        (["report", "runs/none"], "there is no comparison at runs/none; name the folder of one, or its results.json"),
        (["generate", "run", "more"], "'more' belongs to no option; moemamba generate --help lists them"),
        (["info", "mamba-tiny", "--context", "x\x1b[31m"], "--context is 'x\\x1b[31m'; expected a whole number"),
        (["info", "\x1b[31mx\n"], "there is no preset, run or file '\\x1b[31mx\\n'"),
        (["--completion", "csh"], "there is no completion for 'csh'; choose one of bash, zsh, fish"),
        (["train", "--data", "text.txt", "--expert-parallel", "2"], "expert_parallel is 2, which means nothing in one"),
        (["train", "--data", "text.txt", "--shard", "parameters"], "shard is parameters, which means nothing in one"),
        (["train", "--data", "text.txt", "--max-skips", "3"], 'max_skips is 3, which only on_failure = "skip" heeds'),
        (["train", "--data", "text.txt", "--cooldown", "0.5"], 'cooldown is 0.5, which only schedule = "wsd" has'),
        (
            ["train", "mamba-tiny", "--model.experts.n-experts", "16"],
            "experts.n_experts would change nothing: no letter",
        ),
        (
            ["train", "--model.attention.n-heads", "2"],
            "attention.n_heads would change nothing: no letter of the pattern",
        ),
        (["train", "--model.routed.routing", "independent"], "routed.routing would change nothing: no letter of the"),
        (
            ["train", "--model.pattern", "R", "--model.routed.experts.d-expert", "8"],
            'with routing = "independent" R would',
        ),
        (["train", "--data", "text.txt", "--device", "meta"], "device 'meta' cannot be used (it holds no numbers)"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(call, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "words"):
        Path(name).write_text("Once upon a time.\n" * 100)
    Path("nested.json").write_text('{"experts": {"n_experts": 4, "top_k": 257}}')
    status, output, errors = call(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("moemamba: ") and said in errors
    assert errors.count("\n") == 1 and "\x1b" not in errors


def test_sharing_out_is_used_by_several_processes_and_kept_by_runs_that_go_on():
    check_used(TrainConfig(expert_parallel=2, shard="parameters"), 2)
    check_used(TrainConfig(), 1)
    with pytest.raises(ValueError, match="expert_parallel"):
        check_used(TrainConfig(expert_parallel=2), 1)


# Help


@pytest.mark.parametrize("option", everything(), ids=lambda option: f"{option.owner.__name__}-{option.name}")
def test_every_option_is_explained_by_itself(option):
    about = explanation(option)
    assert len(about) > 10, option.name
    assert not re.match(r"(and|or|of|as of|it|that|the highest|share of it)\b", about), about


def explanation(option: Option) -> str:
    from moemamba.marks import texts

    return texts(option.owner)[option.path[-1]]


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_begins_with_what_matters_and_has_all(call, command):
    status, first, errors = call(command, "--help")
    assert (status, errors) == (0, "")
    every = call(command, "--help-all")[1]
    known = list(options(kind(command)))
    assert all(option.name in every or option.off in every for option in known)
    shown = len(re.findall(r"^  --", first, re.M))
    assert shown <= 24
    assert shown < 24 or command == "train"
    hidden = len([o for o in known if not o.positional]) - shown
    assert (f"{hidden} more options" if hidden else "") in first and ("more options" in first) == bool(hidden)
    assert max(map(len, first.splitlines())) <= 110


def test_every_option_of_training_has_its_marks():
    found = marks(TrainConfig)
    assert list(found) == [field.name for field in dataclasses.fields(TrainConfig)]
    assert all(each.group for each in found.values())
    shared = {option.name for option in options(Compare)}
    lacking = {o.path[1] for o in options(Train) if o.path[0] == "config" and o.name not in shared}
    assert {name for name, each in found.items() if each.of_one_run} == lacking
    known = {".".join(option.path[2:]) for option in options(Train) if option.path[:2] == ("config", "model")}
    assert set(found["model"].shows) <= known
    assert (
        changeable(TrainConfig, "always")
        < changeable(TrainConfig, "on resume")
        < changeable(TrainConfig, "on a branch")
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(call, shell, tmp_path):
    status, script, _ = call("--completion", shell)
    assert status == 0
    assert all(word in script for word in (*cli.COMMANDS, "moe-mamba-tiny", "learning-rate", "max-new-tokens"))
    if shell == "bash" and shutil.which("bash"):
        asks = "COMP_WORDS=(moemamba train --learn); COMP_CWORD=2; _moemamba; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", f"{script}\n{asks}"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["--learning-rate"]


def test_results_for_programs(call):
    found = json.loads(call("info", "moe-mamba-25m", "--json")[1])
    assert (found["parameters"], found["active"]) == (542_228_480, 26_329_088)
    assert found["bytes"]["weights"] == 4 * (found["parameters"] + found["embedding"])
    found = json.loads(call("doctor", "--json")[1])
    assert {"versions", "ops", "backends"} == set(found) and found["versions"]["moemamba"] == moemamba.__version__


# The home folder


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch, call):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(run="~/x", data=("0.5:~/a", "0.5:~/b"), validation="~/v", tokenizer="~/t")
    assert (config.run, config.data) == (f"{tmp_path}/x", (f"0.5:{tmp_path}/a", f"0.5:{tmp_path}/b"))
    assert (config.validation, config.tokenizer) == (f"{tmp_path}/v", f"{tmp_path}/t")
    assert TrainConfig(run=tmp_path / "r", data=tmp_path).data == str(tmp_path)
    assert TrainConfig(data="./1:~2.txt").data == "./1:~2.txt"
    assert read(["--run=~/x"]).config.run == f"{tmp_path}/x"
    for asked in (["generate", "~/nowhere", "--prompt", "x"], ["eval", "~/nowhere"], ["report", "~/nowhere"]):
        status, _, errors = call(*asked)
        assert status == 2 and f"{tmp_path}/nowhere" in errors
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"n_blocks": 3}')
    assert "× 3" in call("info", "~/model")[1]
    with pytest.raises(ValueError, match=r"there is no model at .*nowhere"):
        load("~/nowhere")
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs HOME")
def test_prompts_keep_their_tilde(monkeypatch, tmp_path):
    from moemamba.cli.generate import Generate
    from moemamba.cli.terminal import parse

    monkeypatch.setenv("HOME", str(tmp_path))
    asked = parse(Generate, ["~/run", "--prompt", "~/x"], "generate")
    assert (asked.run, asked.prompt) == (f"{tmp_path}/run", "~/x")


def test_devices_without_numbers_are_refused():
    with pytest.raises(ValueError, match="cannot be used"):
        find_device("meta")


def test_presets_are_what_they_were():
    assert preset("moe-mamba-tiny") == ModelConfig("ME", 4, 128)
