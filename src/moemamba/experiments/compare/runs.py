"""Runs of a comparison carried out: one after another, or several at once in processes and on GPUs of their own."""

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from queue import SimpleQueue

import torch

from ...counting import count_parameters
from ...host.progress import Report
from ...host.stop import Interrupted, Stop
from ...host.terminal import say
from ...training.config import TrainConfig
from ...training.loop import prepare_text, train
from ...training.update import Diverged

_spawning = threading.Lock()


@dataclass(frozen=True)
class Task:
    """A run to begin, or to go on with."""

    config: TrainConfig
    resume: bool
    label: str
    """begins its lines of progress"""


def carry_out(tasks: Sequence[Task], jobs: int, silent: bool) -> None:
    """Train them all. A run that diverges says so in its metrics, and is no error here.

    Several at once are processes of their own, each with its share of the threads; where there are several GPUs and
    `device` names none of them, job k computes on GPU k modulo their number. A signal is passed on, so that every run
    saves.

    Raises:
        Interrupted: a signal came; the runs are saved.
        ValueError, OSError: what was asked for cannot be done; runs that had not begun do not.
        RuntimeError: a run failed, though the others were carried to their end.
    """
    if jobs == 1:
        for task in tasks:
            _train(task, Report(task.label, silent))
    elif tasks:
        prepare_text(tasks[0].config, Report(silent=silent))  # once, where all would do it at the same time
        _at_once(tasks, jobs, silent)


def _train(task: Task, report: Report) -> None:
    try:
        train(task.config, task.resume, report=report)
    except Diverged as diverged:
        report.warn(str(diverged).split(";")[0])


def _at_once(tasks: Sequence[Task], jobs: int, silent: bool) -> None:
    places: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for environment in environments(jobs, tasks[0].config.device):
        places.put(environment)
    living: set[BaseProcess] = set()

    def one(task: Task) -> None:
        environment = places.get()
        try:
            _in_process(task, silent, environment, living)
        finally:
            places.put(environment)

    with Stop() as signals, ThreadPoolExecutor(jobs) as threads:
        # Of a seed's models the largest first, so that the last run to end is a short one.
        order = sorted(tasks, key=lambda task: (task.config.seed, -count_parameters(task.config.model).total))
        left: set[Future[None]] = {threads.submit(one, task) for task in order}
        failed: list[BaseException] = []
        told = False
        try:
            while left:
                done, left = wait(left, timeout=0.2)
                failed += [error for future in done if not future.cancelled() and (error := future.exception())]
                if signals.number or any(isinstance(error, ValueError | OSError) for error in failed):
                    left = {future for future in left if not future.cancel()}
                if signals.number and not told:
                    _pass_on(living, signals.number)
                    told = True
        except BaseException:  # a second signal
            for future in left:
                future.cancel()
            _pass_on(living, signal.SIGTERM)
            raise
    if signals.number:
        raise Interrupted(f"stopped by {signals.name}", signals.number)
    if failed:
        raise failed[0]


def _pass_on(processes: set[BaseProcess], number: int) -> None:
    for process in list(processes):
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)


def environments(jobs: int, device: str) -> list[dict[str, str]]:
    """Environment variables of each job: its GPU, and its share of the cores for computing and for compiling."""
    cores = str(max(1, (os.cpu_count() or 1) // jobs))
    shared = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    shared["TORCHINDUCTOR_COMPILE_THREADS"] = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", cores)
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus < 2:
        return [shared] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
    return [shared | {"CUDA_VISIBLE_DEVICES": names[job % gpus]} for job in range(jobs)]


def _in_process(task: Task, silent: bool, environment: Mapping[str, str], living: set[BaseProcess]) -> None:
    """Train in a process of its own, and raise here what was raised there.

    A process serves one run: what a run leaves behind (compiled functions, reserved memory, a broken CUDA context)
    cannot reach the next.
    """
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(task, silent, theirs))
    with _spawning, _changed(environment), _deaf():  # a GPU must be chosen before anything asks CUDA for its devices
        process.start()
    theirs.close()
    living.add(process)
    try:
        error = ours.recv()
    except EOFError:
        process.join()
        status = process.exitcode
        raise RuntimeError(
            f"{task.label}: its process ended with status {status} and without a word; memory may have run out"
        ) from None
    finally:
        process.join()
        living.discard(process)
    if error is not None:
        raise error


def _child(task: Task, silent: bool, outcome: connection.Connection) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # else Ctrl-C would come from the terminal and from the parent: two, the second of which kills
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    error: BaseException | None = None
    try:
        _listen()
        _train(task, Report(task.label, silent, plain=True))
    except (ValueError, OSError, KeyboardInterrupt) as caught:
        error = caught
    except BaseException as caught:
        say(traceback.format_exc())
        error = RuntimeError(f"{task.label}: {type(caught).__name__}: {caught}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{task.label}: {error}")
    outcome.send(error)


@contextmanager
def _deaf() -> Iterator[None]:
    """A process that starts meanwhile hears Ctrl-C when it listens, and does not die of it amidst its imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else it is started meanwhile, and lets SIGINT through when it is
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen() -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _leave_with_parent() -> None:
    """Save and stop when the process that started this one is gone, however it went."""
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _changed(environment: Mapping[str, str]) -> Iterator[None]:
    """The environment with some variables set, for a process that starts meanwhile."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
