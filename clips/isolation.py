"""Reading a video in a process of its own, since decoders may hang or crash on a broken file.

    load = Isolated(function, timeout=60)
    clips = load(path, seed)  # function(path, seed) in a child process

The child is forked at the first call and lives as long as its parent: a call costs two short messages and a copy
of the result through shared memory. It is forked by hand, not by multiprocessing or concurrent.futures, because
- a worker of torch's DataLoader is daemonic, and multiprocessing lets no daemonic process have children;
- their pools pickle results into a pipe, whereas a decoded clip of megabytes is shared here;
- a crash or a hang must cost one video, whereas it breaks or blocks a pool.
"""

import ctypes
import mmap
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from clips.video_index import VideoError

SHARED_BYTES = 64 << 20  # larger results come through the pipe; pages take up memory only once written to
OUTLIVED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a launcher sends these to all processes of a job
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Isolated:
    """Calls `function(path, *args)` in a child process that may hang or crash without harm to this one.

    A call returns what the function returns, or raises what it raises, with the child's traceback as the cause. A
    child that takes too long is killed; after that, or after a crash, the next call starts another.

    The child sees the function as it was at the first call. All calls must come from one thread that lives on: on
    Linux the child dies with it. A copy of this object, pickled or forked, starts a child of its own.

    Args:
        timeout: seconds that a call may take; 0 or None calls the function here, without a child.

    Raises:
        VideoError: (a call) the child took too long or crashed.
    """

    def __init__(self, function: Callable, timeout: float | None):
        self.function, self.timeout = function, timeout
        self._child: _Child | None = None
        _instances.add(self)

    def __call__(self, path: str, *args):
        if not self.timeout:
            return self.function(path, *args)
        if self._child is not None and self._child.connection.poll():  # it died between two calls
            self.stop()
        if self._child is None:
            self._child = _Child(self.function)
        try:
            value, error = self._child.call((path, *args), self.timeout)
        except TimeoutError:
            self.stop()
            raise VideoError(path, f"decoding took longer than {self.timeout:g} s (--decode_timeout)") from None
        except ConnectionError:
            raise VideoError(path, self.stop(kill=False)) from None
        except BaseException:  # Ctrl-C: the answer that is still to come belongs to no later call
            self.stop()
            raise
        if error is not None:
            raise error
        return value

    def stop(self, *, kill: bool = True) -> str:
        """Ends the child, if there is one; returns a phrase that says how it ended."""
        child, self._child = self._child, None
        return child.end(kill) if child is not None else ""

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_child": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _instances.add(self)


class ChildTraceback(Exception):
    """The traceback of an exception in the child, as the cause of the same exception here."""

    def __str__(self):
        return f"in the child process:\n{self.args[0]}"


_instances: "weakref.WeakSet[Isolated]" = weakref.WeakSet()
_unreaped: set[int] = set()  # killed, but still busy in the kernel, as when a file server does not answer


class _Child:
    """A running child: its process, the pipe to it, and the memory shared with it."""

    def __init__(self, function: Callable):
        for pid in list(_unreaped):
            _reap(pid, patience=0)
        self.memory = mmap.mmap(-1, SHARED_BYTES)
        self.connection, theirs = Pipe()
        with warnings.catch_warnings():
            # Python 3.12 and later warn that other threads may hold locks; the child only decodes and takes none.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            _serve(function, theirs, self.memory)
        theirs.close()
        # atexit does not run at the end of a worker process; multiprocessing's finalizers do
        self.end_at_exit = Finalize(self, _end, args=(self.pid, self.connection, True), exitpriority=10)

    def call(self, args: tuple, timeout: float) -> tuple[object, Exception | None]:
        """Returns the function's result and None, or None and what it raised.

        Raises:
            TimeoutError, ConnectionError: the child took too long, or died.
        """
        try:
            self.connection.send_bytes(pickle.dumps(args))
            if not self.connection.poll(timeout):
                raise TimeoutError
            kind, value = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            raise ConnectionResetError from None
        if kind == "raised":
            error, text = value
            error.__cause__ = ChildTraceback(text)
            return None, error
        return (_view(self.memory, *value).clone() if kind == "shared" else value), None

    def end(self, kill: bool) -> str:
        self.end_at_exit.cancel()
        return _end(self.pid, self.connection, kill)


def _end(pid: int, connection: Connection, kill: bool) -> str:
    """Ends a child, by force unless it has ended already; returns a phrase that says how it ended."""
    connection.close()
    if kill:
        os.kill(pid, signal.SIGKILL)
    status = _reap(pid)
    if status is None:
        return "the decoder crashed, and its process does not end"
    if not os.WIFSIGNALED(status):
        return f"the decoder ended its process (exit status {os.WEXITSTATUS(status)})"
    name = signal.Signals(os.WTERMSIG(status)).name
    return f"the decoder crashed (signal {name}{', out of memory?' if name == 'SIGKILL' else ''})"


def _reap(pid: int, patience: float = 2.0) -> int | None:
    """Returns the exit status of a child, or None if it has not ended within `patience` seconds."""
    _unreaped.add(pid)
    deadline = time.monotonic() + patience
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _unreaped.discard(pid)
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def _forget_inherited() -> None:
    """Runs in every forked process, since the children of its parent are not its own."""
    _unreaped.clear()
    for isolated in list(_instances):
        if isolated._child is not None:
            isolated._child.end_at_exit.cancel()
            isolated._child.connection.close()
            isolated._child = None


os.register_at_fork(after_in_child=_forget_inherited)


def _view(memory: mmap.mmap, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns the tensor at the beginning of the shared memory."""
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel()).view(shape)


def _serve(function: Callable, connection: Connection, memory: mmap.mmap) -> None:
    """Answers calls until the parent ends; does not return."""
    try:
        die_with_parent()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN if number in OUTLIVED else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        torch.set_num_threads(1)
        while True:
            args = pickle.loads(connection.recv_bytes())
            connection.send_bytes(_answer(function, args, memory))
    except (EOFError, ConnectionError):  # the parent has ended
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)  # without the exit handlers that the parent has registered


def _answer(function: Callable, args: tuple, memory: mmap.mmap) -> bytes:
    """Calls the function; returns a message with the result or the exception."""
    try:
        value = function(*args)
        if isinstance(value, Tensor) and 0 < value.nbytes <= len(memory):
            _view(memory, value.shape, value.dtype).copy_(value)
            return pickle.dumps(("shared", (value.shape, value.dtype)))
        return pickle.dumps(("value", value))
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(message := pickle.dumps(("raised", (error, text))))
            return message
        except Exception:  # the exception can't be pickled; its name and message can
            return pickle.dumps(("raised", (RuntimeError(f"{type(error).__name__}: {error}"), text)))


def die_with_parent() -> None:
    """Has this process killed as soon as the thread that started it ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_signals(_worker: int = 0) -> None:
    """Keeps a DataLoader's worker alive when a signal is sent to the whole job (a `worker_init_fn`).

    So the training process can finish its step and save on Ctrl-C, SIGTERM and SLURM's SIGUSR1. The worker ends
    with that process, or when that process sends it a SIGTERM.
    """
    die_with_parent()
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an ignored signal is never delivered
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_on_sigterm_of_parent, daemon=True).start()


def _end_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
