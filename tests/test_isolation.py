"""Reading in a child process: calls behave as without one, and hangs, crashes and signals do no harm."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import ROOT

from clips import isolation
from clips.isolation import ChildTraceback, Isolated
from clips.video_index import VideoError

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")


def act(path, *args):
    """What the tests run in the child."""
    if path == "pid":
        return os.getpid()
    if path == "hang":
        time.sleep(100)
    if path == "hang, holding Python's lock":
        ctypes.PyDLL(None).sleep(100)
    if path == "signal":
        os.kill(os.getpid(), args[0])
    if path == "exit":
        os._exit(3)
    if path == "raise":
        raise args[0]
    return args


@pytest.fixture
def isolated():
    made = Isolated(act, 30)
    yield made
    made.stop()


def state(pid):
    """The letter that /proc gives a process (Z: dead, but not waited for), None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def group(pgid):
    """The processes of a group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == pgid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def soon(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# --- calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(24, dtype=torch.uint8).view(2, 3, 4).transpose(0, 2),
        torch.rand(5, dtype=torch.float64),
        torch.tensor(7),
        torch.empty(0, 3),
        torch.ones(2000, dtype=torch.uint8),
    ],
    ids=["transposed", "float64", "scalar", "empty", "larger than the shared memory"],
)
def test_a_tensor_comes_back_as_it_is(value, monkeypatch):
    monkeypatch.setattr(isolation, "SHARED_BYTES", 1000)
    isolated = Isolated(lambda path: value, 30)
    first, second = isolated("a"), isolated("b")
    isolated.stop()
    assert first.dtype == value.dtype and first.shape == value.shape and torch.equal(first, value)
    assert torch.equal(second, value) and (not value.numel() or first.data_ptr() != second.data_ptr())


def test_a_generator_is_handed_over_as_it_stands(isolated):
    rng = np.random.default_rng([1, 2, 3])
    rng.random(5)
    _, theirs = isolated("a", "b", rng), isolated("a", rng)[0]
    assert theirs.random() == rng.random()


def test_one_child_serves_all_calls_and_is_another_process(isolated):
    pids = {isolated("pid") for _ in range(5)}
    assert len(pids) == 1 and os.getpid() not in pids


@pytest.mark.parametrize("timeout", [0, None])
def test_without_a_timeout_there_is_no_child(timeout):
    assert Isolated(act, timeout)("pid") == os.getpid()


def test_what_the_function_raises_is_raised_with_the_childs_traceback(isolated):
    with pytest.raises(VideoError) as raised:
        isolated("raise", VideoError("a.mp4", "is empty"))
    assert (raised.value.path, raised.value.reason) == ("a.mp4", "is empty")
    with pytest.raises(MemoryError, match="too much"):
        isolated("raise", MemoryError("too much"))
    with pytest.raises(ZeroDivisionError) as raised:
        isolated("raise", ZeroDivisionError("a bug"))
    assert isinstance(raised.value.__cause__, ChildTraceback)
    assert "in act\n    raise args[0]" in str(raised.value.__cause__)
    assert isolated("still there") == ()


def test_an_exception_that_cannot_be_sent_is_told_in_words():
    class Local(Exception):
        pass

    def fail(path):
        raise Local("of this test")

    isolated = Isolated(fail, 30)
    with pytest.raises(RuntimeError, match="Local: of this test"):
        isolated("a")
    isolated.stop()


# --- hangs and crashes --------------------------------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("path", ["hang", "hang, holding Python's lock"])
def test_a_call_that_takes_too_long_is_ended_and_its_child_replaced(isolated, path):
    before = isolated("pid")
    isolated.timeout = 0.3
    began = time.monotonic()
    with pytest.raises(VideoError, match=r"took longer than 0\.3 s \(--decode_timeout\)") as raised:
        isolated(path)
    assert time.monotonic() - began < 10 and raised.value.path == path
    assert state(before) is None  # dead and waited for
    isolated.timeout = 30
    assert isolated("pid") != before and isolated("a", 1) == (1,)


@needs_proc
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("signal", signal.SIGSEGV), r"the decoder crashed \(signal SIGSEGV\)"),
        (("signal", signal.SIGABRT), r"the decoder crashed \(signal SIGABRT\)"),
        (("signal", signal.SIGKILL), r"the decoder crashed \(signal SIGKILL, out of memory\?\)"),
        (("exit",), r"the decoder ended its process \(exit status 3\)"),
    ],
)
def test_a_crash_is_an_unreadable_video(isolated, call, reason):
    before = isolated("pid")
    with pytest.raises(VideoError, match=reason):
        isolated(*call)
    assert state(before) is None and isolated("a", 1) == (1,)


def test_a_child_that_died_between_two_calls_is_no_videos_fault(isolated):
    before = isolated("pid")
    os.kill(before, signal.SIGKILL)
    assert soon(isolated._child.connection.poll)
    assert isolated("pid") != before


def test_the_signals_of_a_launcher_do_not_reach_the_child(isolated):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert isolated("signal", number) == (number,)


def test_an_answer_that_nobody_waits_for_belongs_to_no_later_call(isolated):
    """Ctrl-C in the middle of a call, where the training process itself loads the data."""
    isolated("a")

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        isolated("hang")
    signal.signal(signal.SIGALRM, handler)
    assert isolated("fresh", 2) == (2,)


# --- copies and ends ----------------------------------------------------------------------------------------


def test_a_pickled_copy_starts_a_child_of_its_own(isolated):
    pid = isolated("pid")
    copy = pickle.loads(pickle.dumps(isolated))
    assert copy("pid") not in (pid, os.getpid())
    copy.stop()
    assert isolated("pid") == pid


def test_a_forked_process_leaves_its_parents_child_alone(isolated):
    """As a DataLoader's worker does; its copy of the pipe is closed, so that the child sees its parent end."""
    pid, end = isolated("pid"), isolated._child.connection.fileno()
    forked = os.fork()
    if forked == 0:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)
        other = isolated("pid")
        isolated.stop()
        os._exit(0 if other not in (pid, os.getppid()) else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert isolated("pid") == pid


@needs_proc
def test_the_child_ends_with_the_object(isolated):
    made = Isolated(act, 30)
    pid = made("pid")
    del made
    assert state(pid) is None


PROGRAM = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset, _utils
from clips.isolation import Isolated, outlive_signals

class Videos(Dataset):
    def __init__(self):
        self.load = Isolated(self.read, 60)
    def read(self, index):
        time.sleep(1000 if sys.argv[1] == "hang" and index > 1 else 0.05)
        return torch.tensor(index)
    def __getitem__(self, index):
        return self.load(index)
    def __len__(self):
        return 40

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
_utils.MP_STATUS_CHECK_INTERVAL = 0.5
for batch in DataLoader(Videos(), num_workers=2, worker_init_fn=outlive_signals):
    print(batch.item(), flush=True)
    if sys.argv[1] == "hang":
        time.sleep(1)
        break
"""


@pytest.fixture
def program():
    """program(mode): PROGRAM, started as a group of processes of its own, after its first batch."""
    started = []

    def start(mode):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, mode]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        assert started[0].stdout.readline() == "0\n"
        return started[0]

    yield start
    for running in started:
        for pid in group(running.pid):
            os.kill(pid, signal.SIGKILL)
        running.communicate()


@needs_proc
def test_a_signal_to_all_processes_of_a_run_ends_none_but_the_one_that_handles_it(program):
    run = program("go on")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(run.pid, number)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and out.split() == [str(k) for k in range(1, 40)]
    assert soon(lambda: not group(run.pid))


@needs_proc
@pytest.mark.parametrize("mode", ["go on", "hang"])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they end after their batch")
def test_a_run_that_is_killed_leaves_no_process_behind(program, mode):
    run = program(mode)
    assert soon(lambda: len(group(run.pid)) == 5)  # itself, two workers, two children
    run.kill()
    assert soon(lambda: not group(run.pid))


@needs_proc
def test_a_run_that_ends_does_not_wait_for_a_video_that_hangs(program):
    run = program("hang")
    run.communicate(timeout=120)
    assert run.returncode == 0
    assert soon(lambda: not group(run.pid))
