"""Work that cannot be interrupted, and a wait for it that can."""

import _thread
import os
import signal
import sys
import threading
import time

import pytest

from moemamba.host.stop import interruptible


def test_the_work_is_done_as_it_would_be():
    assert interruptible(list, range(5)) == [0, 1, 2, 3, 4]
    assert interruptible(lambda items: None, []) is None


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("late"), KeyboardInterrupt(), OSError(5, "no")])
@pytest.mark.parametrize("of", ["work", "items"])
def test_what_it_raises_comes_here(of, error):
    def items():
        yield 1
        if of == "items":
            raise error

    def work(handed):
        assert list(handed) == [1]
        raise error

    with pytest.raises(type(error)) as caught:
        interruptible(work, items())
    assert caught.value is error


def test_nobody_waits_after_an_interrupt():
    """Though the work neither ends nor runs a line of Python; and it gets no more items."""
    goes_on, ended, handed = threading.Event(), threading.Event(), []

    def items():
        for number in range(3):
            handed.append(number)
            yield number

    def work(found):
        try:
            next(found)
            _thread.interrupt_main()
            goes_on.wait(60)
            list(found)
        finally:
            ended.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interruptible(work, items())
        assert time.monotonic() - begun < 30
    finally:
        signal.signal(signal.SIGINT, before)
    goes_on.set()
    assert ended.wait(60) and handed == [0, 1]


WAITS = """
import os, sys, time
from moemamba.host.stop import Stop
if sys.argv[1:]:
    if child := os.fork():
        sys.exit(os.waitpid(child, 0)[1])
    os.setpgrp()
with Stop() as stop:
    print("ready", os.getpid(), "it is", flush=True)
    while not stop.number:
        time.sleep(0.01)
print("stopped by", stop.name, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
@pytest.mark.parametrize("beside", [False, True])
def test_a_person_is_told_what_to_wait_for(beside):
    """At once, in the terminal where Ctrl-C was pressed, by the process that it is for; others, who are passed it on,
    say nothing."""
    import pty

    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", WAITS, *["beside"] * beside])
    shown = b""
    while b"it is" not in shown:
        shown += os.read(terminal, 1000)
    if beside:
        os.kill(int(shown.split()[1]), signal.SIGINT)
    else:
        os.write(terminal, b"\x03")
    while b"stopped by SIGINT" not in shown:
        shown += os.read(terminal, 1000)
    os.waitpid(child, 0)
    os.close(terminal)
    assert (b"stopping after this step" in shown) != beside
