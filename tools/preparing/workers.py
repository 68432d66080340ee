"""Work on many files in processes of which any may crash or hang without ending the others.

    for number, outcome in run_tasks(check_video, paths, workers=8, timeout=60):
        if isinstance(outcome, Failure): ...

A pool of the standard library ends, or waits for ever, with the first process that dies; and a decoder may die.
"""

import csv
import math
import multiprocessing
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple


class Failure(NamedTuple):
    """A task that crashed its process, or took too long."""

    reason: str


def serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """What a worker does: say that it's ready, then answer tasks until the other end is closed.

    Signals to the whole group are the main process's to answer, which ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(None)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(function(task))


class Worker:
    """One process: whether it is ready for a task, the number of the one it is at, and when its time is up."""

    def __init__(self, context, function: Callable[[Any], Any]):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.started, self.number, self.deadline = False, None, math.inf

    def give(self, number: int, task: Any, timeout: float) -> None:
        self.number, self.deadline = number, time.monotonic() + timeout
        with suppress(BrokenPipeError):  # dead: `answer` will tell
            self.pipe.send(task)

    def answer(self) -> Any:
        """What the process sent; a Failure where it is dead."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return Failure(f"the process that worked on it crashed ({self.end()})")
        self.started = True
        return answer

    def end(self) -> str:
        """End the process, whatever it is at; says how it ended."""
        if self.pipe.poll():  # dead by itself: its pipe has ended, its exit status may take a moment
            self.process.join(1)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], *, workers: int, timeout: float
) -> Iterator[tuple[int, Any]]:
    """Yields (number, function(tasks[number])), in the order in which they get done, from `workers` processes.

    A task during which its process dies, or that takes longer than `timeout` seconds, yields a Failure; the
    process is replaced. All processes are ended when the iterator is closed.

    function: one at the top of a module. If it raises, that is a crash, with the traceback on stderr.

    Raises RuntimeError where processes die before they are ready.
    """
    context = multiprocessing.get_context("forkserver")  # workers fork from a process that has no threads
    context.set_forkserver_preload(["av", "torch"])  # imported once, not by every worker
    waiting, unfinished, crew = deque(enumerate(tasks)), len(tasks), []
    try:
        while unfinished:
            crew += [Worker(context, function) for _ in range(min(workers, unfinished) - len(crew))]
            for worker in crew:
                if worker.started and worker.number is None and waiting:
                    worker.give(*waiting.popleft(), timeout)
            for worker, outcome in hear(crew, timeout):
                number, worker.number, worker.deadline = worker.number, None, math.inf
                if isinstance(outcome, Failure):
                    crew.remove(worker)
                if not worker.started:
                    raise RuntimeError(f"worker processes can't be started: {outcome.reason}")
                if number is not None:
                    unfinished -= 1
                    yield number, outcome
    finally:
        for worker in crew:
            worker.end()


def hear(crew: list[Worker], timeout: float) -> list[tuple[Worker, Any]]:
    """Waits until some worker has something to say, is dead or out of time; returns those and their answers."""
    first = min(worker.deadline for worker in crew)
    ready = wait([worker.pipe for worker in crew], None if first == math.inf else max(0, first - time.monotonic()))
    heard = [(worker, worker.answer()) for worker in crew if worker.pipe in ready]
    for worker in crew:
        if worker.pipe not in ready and time.monotonic() > worker.deadline:
            worker.end()
            heard.append((worker, Failure(f"not done after {timeout:g} s")))
    return heard


# --- what failed --------------------------------------------------------------------------------------------


class BadFile:
    """A CSV file that has each row as soon as it's known."""

    def __init__(self, path: Path, columns: str):
        self.path = path
        self.file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self.add(*columns.split(","))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, *row) -> None:
        csv.writer(self.file).writerow(row)
        self.file.flush()


def summarise(bad: Sequence[tuple[str, str]], path: Path) -> None:
    """Print the reasons, the most frequent first, with their counts and an example each."""
    examples = {}
    for where, reason in bad:
        examples.setdefault(re.sub(r"[0-9.]+", "#", reason), []).append((where, reason))
    for alike in sorted(examples.values(), key=len, reverse=True)[:10]:
        where, reason = alike[0]
        print(f"  {len(alike)} x {reason} ({where})")
    if bad:
        print(f"  all of them: {path}")
