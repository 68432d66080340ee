"""Signals that ask a run to stop, and how its processes agree on the step to stop after."""

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

SAVED = 75  # EX_TEMPFAIL of sysexits.h: rerun the same command; scripts/slurm.sh requeues the job on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TWICE_AT_ONCE = 2.0  # seconds; the terminal sends Ctrl-C to all processes, then torchrun forwards it again


class Stopped(Exception):
    """The run was asked to stop; the message says whether its state is saved, `status` is the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def speaks_for_all() -> bool:
    """Whether this is rank 0: launchers send a signal to all ranks, which would all say the same."""
    return not dist.is_initialized() or dist.get_rank() == 0


class StopSignals:
    """Inside `with`, SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) only set `status`; a second one ends the process.

    `status` is 0, and after a signal the exit status: `SAVED`, or 130 after Ctrl-C, as in a shell.
    """

    def __init__(self):
        self.status, self.received_at, self.handlers_before = 0, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self.handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if self.status and under_torchrun and time.monotonic() - self.received_at < TWICE_AT_ONCE:
            return
        if self.status:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.status = 130 if number == signal.SIGINT else SAVED
        self.received_at = time.monotonic()
        if speaks_for_all():
            text = f"{signal.Signals(number).name}: finishing the step and saving; a second signal leaves at once\n"
            with suppress(OSError):  # stderr is closed
                os.write(2, text.encode())
        if not under_torchrun:  # so that the second one works even where Python hangs in a library
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)


class Votes:
    """The element-wise maximum of all processes' numbers, one call late so that no process waits for another.

    The messages travel between CPUs over gloo, beside the gradients, and don't touch the devices. All processes
    call it equally often. A single process gets its own numbers back at once.
    """

    def __init__(self, *, timeout: float):
        self.group = self.pending = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def __call__(self, *numbers: int) -> list[int]:
        """Returns the outcome of the call before this one (zeros in the first); votes for the next."""
        if self.group is None:
            return list(numbers)
        outcome = self._outcome() or [0] * len(numbers)
        ballot = torch.tensor(numbers)
        self.pending = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return outcome

    def now(self, *numbers: int) -> list[int]:
        """Returns the outcome of this call and the one before it; waits for all processes."""
        before = self(*numbers)
        return before if self.group is None else [max(pair) for pair in zip(before, self._outcome(), strict=True)]

    def _outcome(self) -> list[int] | None:
        if self.pending is None:
            return None
        (ballot, work), self.pending = self.pending, None
        work.wait()
        return ballot.tolist()

    def close(self) -> None:
        """Drops the group; to be called before the process group is destroyed."""
        self.group = self.pending = None
