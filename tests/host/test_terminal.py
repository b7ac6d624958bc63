"""What is shown: no text commands the terminal, and no stream that fails ends the work that it shows."""

import io
import os
import sys
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moemamba.cli.mistakes import answer, sentence
from moemamba.cli.terminal import show
from moemamba.host.files import keep_recent
from moemamba.host.progress import Report
from moemamba.host.terminal import Display, say, visible

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
ANY = st.text(st.characters(), max_size=40) | st.text(st.characters(categories=["Cc", "Cs"]), max_size=10)
ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8", "utf-16", "shift_jis", "cp437"]


def controls(text: str, allowed: str = "") -> list[str]:
    return [letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in allowed]


def terminal(encoding: str) -> io.TextIOWrapper:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    return Terminal(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


@PROPERTY
@given(ANY)
@example("\x1b]0;title\x07\x1b[31m\x9b1mx\r\x7f\n\t")
def test_visible_text_commands_nothing_and_keeps_the_rest(text):
    assert not controls(visible(text), "\n\t")
    assert not controls(visible(text, line=True))
    kept = [letter for letter in text if not controls(letter) and not "\udc80" <= letter <= "\udcff"]
    shown = iter(visible(text, line=True))
    assert all(letter in shown for letter in kept)  # in order
    plain = "".join(kept)
    assert visible(plain) == plain


@PROPERTY
@given(ANY, st.sampled_from(ENCODINGS), st.booleans())
def test_whatever_is_shown_reaches_every_encoding(text, encoding, is_terminal):
    stream = terminal(encoding) if is_terminal else io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    before, sys.stdout = sys.stdout, stream
    try:
        report = Report(label=text)
        report.note(text)
        report.warn(text)
        report.begin(text, 2)
        report.update(1, text)
        report.end()
        show([(text, "−0.0244 (−0.0271 … −0.0218)"), ("Mamba", "× 3")], (text, "b"))
        stream.flush()
        written = stream.buffer.getvalue().decode(encoding)
        print(text, file=Display(stream), end="")
        assert report.lost() is None
    finally:
        sys.stdout = before
    if not is_terminal:
        assert not controls(written, "\n")


@PROPERTY
@given(ANY)
def test_errors_are_one_line(text):
    for error in (ValueError(text), OSError(2, text), OSError(2, "No such file", text), ArithmeticError(text)):
        assert not controls(sentence(error)) and sentence(error)
        assert answer(error) is not None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("x\ny"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("unable to mmap 1 bytes: Cannot allocate memory (12)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 8]"),
    ],
)
def test_memory_is_named_however_it_is_said(error):
    status, said = answer(error)
    assert status == 1 and said.startswith("memory ran out (") and "\n" not in said


def test_what_is_no_mistake_of_the_caller_stays_an_error_of_the_program():
    assert answer(RuntimeError("shapes differ")) is None and answer(KeyError("x")) is None


class Failing(io.StringIO):
    """A stream that fails after so many characters."""

    def __init__(self, room: int, error: Exception):
        super().__init__()
        self.room, self.error = room, error

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.room:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), OSError(5, "EIO")])
@pytest.mark.parametrize("room", [0, 8, 30])
def test_work_goes_on_when_its_display_is_gone(monkeypatch, error, room):
    monkeypatch.setattr(sys, "stdout", Failing(room, error))
    report = Report("name")
    for step in range(5):
        report.note(f"step {step}")
    assert report.lost() == error.strerror
    assert report.lost() is None  # said once


def test_a_closed_stream_is_silence(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        report = Report()
        report.note("x")
        say("y")
        assert report.lost()


def test_needed_output_that_is_lost_is_an_error():
    with pytest.raises(BrokenPipeError):
        Display(Failing(0, BrokenPipeError(32, "Broken pipe")), needed=True).write("x")
    with pytest.raises(OSError, match="standard output cannot be written: full"):
        Display(Failing(0, OSError(28, "full")), needed=True).write("x")


def test_a_slow_reader_loses_text_and_no_more():
    shown = Display(Failing(0, BlockingIOError(11, "would block")))
    shown.write("x")
    assert shown.lost is None


def test_time_left_does_not_count_what_came_before_the_first_step(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("moemamba.host.progress.QUIET", 0.0)
    report = Report()
    report.begin("training", 100)
    for step, at in ((10, 90.0), (20, 100.0), (30, 110.0)):  # 80 s of compilation, then a step a second
        now[0] = at
        report.update(step, f"step {step}")
    assert capsys.readouterr().out.splitlines() == ["step 10", "step 20, 0:01:20 left", "step 30, 0:01:10 left"]


def test_a_cache_keeps_what_was_used_last_and_only_what_is_its_own(tmp_path):
    days = 86_400
    for age in range(2, 8):
        folder = tmp_path / f"kernels-{age:016x}"
        folder.mkdir()
        (folder / "x").touch()
        os.utime(folder, (time.time() - age * days,) * 2)
    (tmp_path / "kernels-mine").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (tmp_path / f"kernels-{9:016x}").symlink_to(tmp_path / "elsewhere")
    keep_recent(tmp_path, r"kernels-[0-9a-f]{16}", 4)
    left = sorted(path.name for path in tmp_path.iterdir())
    kept = [f"kernels-{age:016x}" for age in (2, 3, 4, 5)]
    assert left == sorted([*kept, f"kernels-{9:016x}", "kernels-mine", "elsewhere"])
    assert (tmp_path / "elsewhere" / "precious").exists()
    keep_recent(tmp_path / "nowhere", ".*", 0)
