"""Every command where streams are closed, full or left, encodings lack characters, and there is no home."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and a shell"),
]

# Small tensors need neither threads nor compiled kernels; a user without a home is one that the system does not know.
START = (
    "import os, sys\n"
    "if os.environ.get('NO_HOME'):\n"
    "    import pwd\n"
    "    def unknown(uid): raise KeyError(uid)\n"
    "    pwd.getpwuid = unknown\n"
    "    os.environ.pop('HOME', None), os.environ.pop('XDG_CACHE_HOME', None)\n"
    "if room := os.environ.get('ROOM'):\n"
    "    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))\n"
    "sys.argv[0] = 'moemamba'\n"
    "from moemamba import cli\n"
    "if 'torch' in os.environ.get('NEEDS', 'torch'):\n"
    "    import torch; from moemamba import ops; torch.set_num_threads(1); ops.backend('reference')\n"
    "cli.main()\n"
)
MODEL = ["--model.n-blocks", "1", "--model.d-model", "16", "--model.experts.n-experts", "4"]
SHORT = ["--steps", "4", "--batch-size", "2", "--context", "32", "--eval-tokens", "256", "--log-every", "1"]
SMALL = "n_blocks=1,d_model=16"

# What is done to standard output, input, errors and the environment.
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ('2>"$ERR"', {}),
    "output closed": ('>&- 2>"$ERR"', {}),
    "input closed": ('<&- 2>"$ERR"', {}),
    "errors closed": ("2>&-", {}),
    "all closed": ("<&- >&- 2>&-", {}),
    "output full": ('>/dev/full 2>"$ERR"', {}),
    "errors full": ("2>/dev/full", {}),
    "output read-only": ('1</dev/null 2>"$ERR"', {}),
    "reader left": ('2>"$ERR" | true', {}),
    "ascii": ('2>"$ERR"', {"PYTHONIOENCODING": "ascii:strict"}),
    "cp1252": ('2>"$ERR"', {"PYTHONIOENCODING": "cp1252"}),
    "C": ('2>"$ERR"', {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    "no home": ('2>"$ERR"', {"NO_HOME": "1"}),
}
COMMANDS = ("help", "info", "doctor", "train", "prepare", "eval", "generate", "compare", "report")
LOST = {"output full", "output read-only"}  # a command that only prints has failed there
QUICK = {("info", place) for place in PLACES} | {("train", place) for place in ("reader left", "all closed", "ascii")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text, and a run and a comparison of it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("".join(f"{k} times {k} × is {k * k}\n" for k in range(3000)))
    for name, arguments in (("train", ["--run", "run"]), ("compare", compared("comparison"))):
        options = [*MODEL, *arguments] if name == "train" else arguments
        status, errors = call([name, *options, *SHORT, "--data", "text.txt"], "plain", folder)
        assert status == 0, errors
    return folder


def compared(out: str) -> list[str]:
    return [f"a=mamba-tiny,{SMALL}", f"b=mamba-tiny,{SMALL},d_state=4", "--seeds", "1", "--out", out]


def call(arguments: list[str], place: str, folder: Path, **more: str) -> tuple[int, str]:
    """Exit status and what was said on standard error."""
    redirect, environment = PLACES[place]
    errors = folder / f"errors-{os.getpid()}"
    errors.write_text("")
    needs = "torch" if arguments[0] in ("train", "compare", "eval", "generate", "prepare", "doctor") else ""
    own = {"ERR": str(errors), "NEEDS": needs, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    shell = f'("$@"; echo $? > "$ERR.status") {redirect}'
    subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", START, *arguments],
        cwd=folder,
        env={**os.environ, **own, **environment, **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    status = Path(f"{errors}.status")
    return int(status.read_text()), errors.read_text(errors="replace")


def arguments_of(command: str, made: Path, folder: Path) -> tuple[list[str], Path | None]:
    """A command line, and the file that it must leave."""
    data = ["--data", str(made / "text.txt")]
    match command:
        case "help":
            return ["--help"], None
        case "info":
            return ["info", "moe-mamba-tiny"], None
        case "doctor":
            return ["doctor"], None
        case "train":
            return ["train", *MODEL, *SHORT, *data, "--run", "run"], folder / "run/checkpoints/00000004/config.json"
        case "prepare":
            return ["prepare", str(made / "text.txt"), "--out", "tokens"], folder / "tokens/index.json"
        case "eval":
            return ["eval", str(made / "run"), *data, "--tokens", "64"], None
        case "generate":
            return ["generate", str(made / "run"), "--max-new-tokens", "8", "--seed", "1"], None
        case "compare":
            return ["compare", *compared("out"), *SHORT, *data], folder / "out/results.json"
        case _:
            return ["report", str(made / "comparison"), "--out", "page.html"], folder / "page.html"


def marked(command: str, place: str):
    return pytest.param(command, place, marks=() if (command, place) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(
    ("command", "place"), [marked(command, place) for command in COMMANDS for place in PLACES if place != "plain"]
)
def test_every_command_does_its_work_everywhere(command, place, made, tmp_path):
    arguments, leaves = arguments_of(command, made, tmp_path)
    status, errors = call(arguments, place, tmp_path)
    assert "Traceback" not in errors and "Exception ignored" not in errors
    if leaves is not None:
        assert status == 0 and leaves.exists()
    elif place in LOST:
        assert status == 2 and errors.startswith("moemamba: standard output cannot be written: ")
        assert errors.count("\n") == 1
    else:
        assert status == 0


def test_a_run_says_why_it_fell_silent(made, tmp_path):
    arguments, _ = arguments_of("train", made, tmp_path)
    assert call(arguments, "output full", tmp_path)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (note,) = [line for line in lines if line["kind"] == "note"]
    assert note["step"] == 1
    assert note["text"] == "progress is no longer shown (No space left on device); the run goes on"
    plain = [json.loads(line) for line in (made / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [
        line["loss"] for line in plain if line["kind"] == "train"
    ]


def test_files_that_cannot_grow_are_said_in_a_sentence(made, tmp_path):
    for number, room in enumerate((3000, 20_000, 60_000)):
        where = tmp_path / str(number)
        where.mkdir()
        arguments, _ = arguments_of("train", made, where)
        status, errors = call(arguments, "plain", where, ROOM=str(room))
        assert status == 2 and "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["train", pytest.param("compare", marks=pytest.mark.slow)])
def test_a_closed_terminal_saves_and_the_same_command_goes_on(number, command, made, tmp_path):
    """SIGHUP as a terminal that closes sends it: its streams fail from then on."""
    arguments, _ = arguments_of(command, made, tmp_path)
    arguments += ["--steps", "100000", "--save-every", "50000", "--eval-every", "50000"]
    run = tmp_path / ("run" if command == "train" else "out/a/seed-0")
    parent, child = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    wait_for_steps(run, process)
    os.close(parent)  # the terminal is gone: every write fails
    process.send_signal(number)
    assert process.wait(timeout=120) == (130 if number == signal.SIGINT else 75)
    saved = sorted((run / "checkpoints").iterdir())
    assert len(saved) == 1 and int(saved[0].name) > 0


def wait_for_steps(run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline, log = time.monotonic() + 120, run / "metrics.jsonl"
    while not (log.exists() and '"kind": "train"' in log.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)


def test_nohup_means_that_a_hangup_ends_nothing(made, tmp_path):
    arguments, leaves = arguments_of("train", made, tmp_path)
    arguments[arguments.index("--steps") + 1] = "60"
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", START, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.DEVNULL,
    )
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert leaves is not None and (tmp_path / "run/checkpoints/00000060").exists()


@pytest.mark.parametrize("command", ["info", "eval", "prepare", "compare", "generate"])
def test_only_train_works_in_several_processes(command, made, tmp_path):
    arguments, _ = arguments_of(command, made, tmp_path)
    status, errors = call(arguments, "plain", tmp_path, WORLD_SIZE="2", RANK="0", NEEDS="")
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith(f"moemamba: {command} works in one process, but 2 were started")
    assert call(arguments, "plain", tmp_path, WORLD_SIZE="2", RANK="1", NEEDS="") == (2, "")
