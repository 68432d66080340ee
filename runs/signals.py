"""Leaving in good order: signals that ask a run to stop, and how its processes agree on the step to stop after."""

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

SAVED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again; scripts/slurm.sh requeues
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TWICE_AT_ONCE = 2.0  # seconds; torchrun passes on a Ctrl-C that the terminal has given to everyone already


class Stopped(Exception):
    """The run was asked to stop, and the message says what became of its state. `status`: to exit with."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class StopSignals:
    """Within its `with`, SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) only set `status`; a second one ends the process.

    status: 0, or once a signal has come the one to exit with: `SAVED`, or 130 after Ctrl-C, as in a shell.
    """

    def __init__(self):
        self.status, self.came, self.before = 0, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if self.status and under_torchrun and time.monotonic() - self.came < TWICE_AT_ONCE:
            return
        if self.status:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.status = 130 if number == signal.SIGINT else SAVED
        self.came = time.monotonic()
        name = signal.Signals(number).name
        with suppress(OSError):  # nobody listens any more
            os.write(2, f"{name}: finishing the step and saving; a second signal leaves at once\n".encode())
        if not under_torchrun:  # so that the second one works even where Python hangs in a library
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)


class Votes:
    """The largest of every process's numbers, told to all, one call late so that nobody waits for anybody.

    The messages go between the hosts' processors, beside those of the training, and don't touch the devices.
    All processes call it equally often. A single process gets its own numbers back at once.
    """

    def __init__(self, *, timeout: float):
        self.group = self.pending = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def __call__(self, *numbers: int) -> list[int]:
        """The outcome of the call before this one (zeros in the first), and a vote for the next."""
        if self.group is None:
            return list(numbers)
        outcome = self._outcome() or [0] * len(numbers)
        ballot = torch.tensor(numbers)
        self.pending = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return outcome

    def now(self, *numbers: int) -> list[int]:
        """The outcome of this call and of the one before it; it waits for all processes."""
        before = self(*numbers)
        return before if self.group is None else [max(pair) for pair in zip(before, self._outcome(), strict=True)]

    def _outcome(self) -> list[int] | None:
        if self.pending is None:
            return None
        (ballot, work), self.pending = self.pending, None
        work.wait()
        return ballot.tolist()

    def close(self) -> None:
        """Lets go of the group; call it before the process group is destroyed."""
        self.group = self.pending = None
