"""Runs tasks on many files in processes of which any may crash or hang, and reports the files that failed."""

import csv
import multiprocessing
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from utils import CSV_TEXT


class Failure(NamedTuple):
    """A task that failed, crashed its process or took too long."""

    reason: str


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    workers: int,
    timeout: float,
    max_tasks: int = 0,
    unit: str = "video",
) -> Iterator[tuple[int, Any]]:
    """Yields (number, function(tasks[number])) as tasks are completed by `workers` processes, with a progress bar.

    A task that raises an exception, crashes its process or takes longer than `timeout` seconds yields a Failure;
    the process is replaced. Closing the iterator ends all processes. `function` is one at the top of a module.

    Args:
        timeout: in seconds.
        max_tasks: number of tasks after which a process is replaced; 0 for any number.
        unit: what the progress bar calls a task.

    Raises:
        BrokenProcessPool: processes die as soon as they start.
    """
    context = multiprocessing.get_context("forkserver")  # workers fork from a process that has no threads
    context.set_forkserver_preload(["av", "torch"])  # imported once, not by every worker
    pool = ProcessPool(max(1, min(workers, len(tasks))), max_tasks=max_tasks, context=context)
    waiting, running = enumerate(tasks), {}
    seconds = 1 if sys.stderr.isatty() else 60
    bar = tqdm(total=len(tasks), unit=unit, mininterval=seconds, smoothing=0.05, disable=not tasks)
    try:
        while True:
            for number, task in islice(waiting, 2 * workers - len(running)):  # one more each, so that none waits
                running[pool.schedule(function, (task,), timeout=timeout)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), _outcome(future, timeout)
                bar.update()
    finally:
        bar.close()
        pool.stop()
        pool.join()


def _outcome(future: Future, timeout: float) -> Any:
    try:
        return future.result()
    except TimeoutError:
        return Failure(f"not done after {timeout:g} s")
    except ProcessExpired as error:
        code = error.exitcode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return Failure(f"the process that worked on it crashed ({how})")
    except BrokenProcessPool:
        raise
    except Exception as error:  # a bug: one file's failure shouldn't end a run of days
        traceback.print_exception(error)
        return Failure(f"{type(error).__name__}: {error}")


@contextmanager
def failure_file(path: Path, columns: str) -> Iterator[Callable[[Iterable], Any]]:
    """Opens a CSV file and gives the function that writes a row to it at once."""
    with path.open("w", buffering=1, **CSV_TEXT) as file:
        write = csv.writer(file).writerow
        write(columns.split(","))
        yield write


def summarise(failures: Sequence[tuple[str, str]], path: Path) -> None:
    """Prints the ten most frequent reasons of (file, reason), with their counts and an example each."""
    examples = {}
    for where, reason in failures:
        examples.setdefault(re.sub(r"[0-9.]+", "#", reason), []).append((where, reason))
    for alike in sorted(examples.values(), key=len, reverse=True)[:10]:
        where, reason = alike[0]
        print(f"  {len(alike)} x {reason} ({where})")
    if failures:
        print(f"  all of them: {path}")
