"""The command line: what it prints, what it answers to mistakes, and its exit status."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moemamba import TrainConfig, cli, ops
from moemamba.cli.terminal import line
from moemamba.cli.train import Train, read

TINY = ["--model.pattern", "ME", "--model.n-blocks", "1", "--model.d-model", "16", "--model.experts.n-experts", "4"]
SHORT = ["--steps", "4", "--batch-size", "2", "--context", "32", "--eval-tokens", "256", "--log-every", "2"]
# As `small_work` below has it.
ALONE = "import torch; from moemamba import cli, ops; torch.set_num_threads(1); ops.backend('reference'); cli.main()"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(3000)))
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def small_work():
    """Tensors are tiny: threads would only wait for each other, kernels for their compilation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.backend("reference"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(text, small_work, tmp_path_factory):
    """A finished run."""
    path = str(tmp_path_factory.mktemp("runs") / "run")
    cli.run(["train", *TINY, *SHORT, "--data", text, "--run", path])
    return path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line as `main` does: (status, output, errors)."""

    def call(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moemamba", *arguments])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            cli.main()
        except SystemExit as left:
            status = int(left.code or 0)
        return status, *capsys.readouterr()

    return call


def test_overview_and_version(call):
    status, output, _ = call()
    assert status == 0
    assert all(name in output for name in (*cli.COMMANDS, "moe-mamba-tiny"))
    assert call("--version")[1].strip() == "0.1.0"


def test_text_is_prepared_once_and_trained_on(call, text, tmp_path):
    """The folder brings its tokenizer; it is complete or absent, and never written over."""
    out, run = str(tmp_path / "tokens"), str(tmp_path / "run")
    status, output, _ = call("prepare", text, "--tokenizer", "bpe-300", "--held-out", "0.1", "--out", out)
    assert status == 0 and f"MB/s. Train on it with: moemamba train --data {out}" in output
    train, held = (
        json.loads((tmp_path / "tokens" / "index.json").read_text())[part] for part in ("train", "validation")
    )
    assert f"{train['documents']:,}" in output and f"{held['tokens']:,}" in output and held["documents"] > 3
    assert train["bytes"] + held["bytes"] == Path(text).stat().st_size
    assert call("train", *TINY, *SHORT, "--data", out, "--run", run)[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["vocab_size"] == 300
    assert "prepared with another tokenizer" in call("train", "--data", out, "--tokenizer", "bpe-290")[2]
    status, _, errors = call("prepare", text, "--out", out)
    assert status == 2 and f"{out} exists already; choose another folder (--out)" in errors
    assert f"{out} is prepared already" in call("prepare", out, "--out", str(tmp_path / "again"))[2]
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{}\n')
    assert call("prepare", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "bad"))[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "run", "tokens"]


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(call, command):
    status, output, _ = call(command, "--help")
    assert status == 0
    assert f"moemamba {command}" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["train", "mamba-tinny"],
        ["train", "--stepz", "3"],
        ["train", "--model.d-model", "-1"],
        ["compare", "mamba-tiny", "mamba-tinny"],
        ["generate", "run", "--temperature", "-1"],
        ["info", "moe-mamba-100m"],
    ],
)
def test_help_and_mistakes_need_no_torch(arguments):
    program = (
        "import sys; sys.argv[0] = 'moemamba'\nfrom moemamba.cli import main\ntry: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "False"
    assert done.returncode == (0 if arguments[-1] in ("--help", "moe-mamba-100m") else 2)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "moemamba: there is no command 'trian'; did you mean train?"),
        (["frobnicate"], "moemamba: there is no command 'frobnicate'; the commands are train, prepare"),
        (["info", "mamba-tinny"], "moemamba: there is no preset, run or file 'mamba-tinny'; did you mean mamba-tiny?"),
        (["compare", "mamba-tiny"], "moemamba: a comparison needs two models or more"),
        (["eval", "nowhere"], "moemamba: there is no model at nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "moemamba: there is no model at nowhere"),
        (["train", "--data", "nowhere.txt", "--run", "unused"], "moemamba: "),
        (["info", "."], "moemamba: . has no config.json"),
        (["train", "broken.json"], "moemamba: broken.json is not JSON ("),
        (["train", "list.json"], "moemamba: list.json must be a JSON object"),
    ],
)
def test_mistakes_get_one_sentence(call, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    status, _, errors = call(*arguments)
    assert status == 2
    assert errors.startswith(sentence)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--tokens", "0"], "tokens is 0; it must be greater than 0"),
        (["eval", "--context", "0"], "context is 0; it must be greater than 0"),
        (["eval", "--batch-size", "0"], "batch_size is 0; it must be greater than 0"),
        (["info", "--context", "-5"], "context is -5; it must be greater than 0"),
        (["generate", "--prompt", "x", "--seed", str(1 << 64)], "expected a number below 2^63"),
        (["generate", "--prompt", "x\udcff"], "the prompt is not UTF-8 text"),
    ],
)
def test_numbers_out_of_range_and_text_that_is_none(call, run, arguments, said):
    status, output, errors = call(arguments[0], run, *arguments[1:])
    assert (status, output) == (2, "")
    assert said in errors


def test_memory_that_runs_out_is_said_in_a_sentence(call, run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")

    monkeypatch.setattr("moemamba.training.evaluate.evaluate", full)
    status, _, errors = call("eval", run)
    assert status == 1 and errors.count("\n") == 1
    assert errors.startswith("moemamba: memory ran out (CUDA out of memory. Tried to allocate 20.00 GiB.)")


def test_debug_shows_where(call, monkeypatch):
    with pytest.raises(ValueError, match="no preset"):
        call("info", "mamba-tinny", "--debug")
    monkeypatch.setenv("MOEMAMBA_DEBUG", "1")
    with pytest.raises(ValueError, match="no preset"):
        call("info", "mamba-tinny")


def test_unknown_option_suggests(call):
    status, _, errors = call("train", "--stepz", "3")
    assert status == 2
    assert "--steps" in errors


def test_train_writes_a_run(run):
    files = {path.name for path in Path(run).iterdir()}
    assert {"config.json", "train.json", "tokenizer.json", "metrics.jsonl", "checkpoints"} <= files
    config = json.loads((Path(run) / "train.json").read_text())
    assert (config["model"]["d_model"], config["steps"]) == (16, 4)


def test_train_again_needs_resume(call, run, text):
    status, _, errors = call("train", *TINY, *SHORT, "--data", text, "--run", run)
    assert status == 2
    assert "--resume" in errors


def test_resume_remembers_the_options(call, run):
    status, output, _ = call("train", "--run", run, "--resume")
    assert status == 0
    assert "step 4" in output
    assert "step 4 is saved" in output and "nothing was left to do" in output


def test_preset_comes_first_then_options():
    asked = read(["mamba-tiny", "--model.d-model", "32", "--steps", "7"])
    assert (asked.config.model.pattern, asked.config.model.d_model, asked.config.model.n_blocks) == ("M", 32, 8)
    assert (asked.config.steps, asked.config.run, asked.resume) == (7, "runs/mamba-tiny", False)
    assert read([]) == Train(TrainConfig(), False)


def test_loss_that_diverges_fails(call, text, tmp_path):
    options = ["--learning-rate", "1e30", "--clip", "1e30", "--steps", "40", "--warmup", "0"]
    status, _, errors = call("train", *TINY, *SHORT, *options, "--data", text, "--run", str(tmp_path / "run"))
    assert status == 1
    assert "learning_rate" in errors
    assert errors.count("\n") == 1


def test_generate_is_repeatable_and_streams(call, run):
    first = call("generate", run, "--prompt", "7 times", "--max-new-tokens", "12", "--seed", "1")
    again = call("generate", run, "--prompt", "-", "--max-new-tokens", "12", "--seed", "1", stdin="7 times")
    assert first[0] == 0
    assert first[1].startswith("7 times")
    assert len(first[1]) > len("7 times")
    assert first == again


def test_generate_from_nothing(call, run):
    status, output, _ = call("generate", run, "--max-new-tokens", "5", "--temperature", "0", stdin="")
    assert status == 0
    assert output


def test_eval(call, run, text):
    status, output, _ = call("eval", run, "--tokens", "128")
    assert status == 0
    assert all(word in output for word in ("loss", "perplexity", "bits per byte"))
    assert re.search(r"^text +128 +tokens of ", output, re.MULTILINE)
    status, output, _ = call("eval", run, "--data", text, "--context", "16", "--tokens", "64")
    assert re.search(r"^text +64 +tokens of ", output, re.MULTILINE)


def test_info_of_preset_run_and_file(call, run):
    _, output, _ = call("info", "moe-mamba-25m")
    assert all(word in output for word in ("542,228,480", "26,329,088", "42 × 1536 relu, top-1"))
    whole, alone = ([*filter(None, call("info", place)[1].splitlines())] for place in (run, f"{run}/config.json"))
    assert [line for line in whole if not line.startswith("on disk")] == alone  # which has no weights
    assert "R" in call("info", "inner-moe-mamba-25m")[1]


def test_help_of_a_command_in_two_ways(call):
    assert call("help", "look") == call("look", "--help")
    assert call("help") == call("--help-all") == call()


def test_empty_lines_are_printed_and_not_shown(capsys):
    line("written\nto x", apart=True)
    assert capsys.readouterr().out == "\nwritten\\nto x\n"
    commands = Path(cli.__file__).parent.glob("*.py")
    assert not [path.name for path in commands if re.search(r'line\(f?"\\n', path.read_text())]


def test_doctor(call):
    status, output, _ = call("doctor")
    assert status == 0
    assert all(word in output for word in ("torch", "python", "selective_scan"))
    assert output.count("the triton backend runs on CUDA tensors") <= 1  # a reason is said once


def test_doctor_says_what_slows_a_model_down(call, tmp_path):
    (tmp_path / "config.json").write_text('{"pattern": "ME", "n_blocks": 2, "mamba": {"proj_bias": true}}')
    output = call("doctor", str(tmp_path))[1]
    assert output.count("proj_bias = True: the kernel of a step adds no biases") == 2
    found = json.loads(call("doctor", str(tmp_path), "--json")[1])["layers"]
    assert list(found) == ["layers.0.branches.0", "layers.2.branches.0"]
    assert "know every option of the layers of mamba-tiny" in call("doctor", "mamba-tiny")[1]
    assert json.loads(call("doctor", "mamba-tiny", "--json")[1])["layers"] == {}


def test_interrupted_training_says_how_to_go_on(text, tmp_path):
    where = tmp_path / "run"
    options = ["--steps", "100000", "--save-every", "2", "--data", text, "--run", str(where)]
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, "train", *TINY, *SHORT[2:], *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(where.glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert f"Go on with: moemamba train --run {where} --resume" in errors
    assert "is saved" in errors
    assert "Traceback" not in errors


def test_a_leading_dash_dash_is_not_a_command(capsys):
    """`torchrun -m moemamba -- train`: some versions of Python hand the mark on."""
    cli.run(["--", "--version"])
    assert capsys.readouterr().out.strip()
