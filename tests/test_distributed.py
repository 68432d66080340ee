"""Several processes: however they are started, and when one of them dies or hangs."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden import ROOT
from small_loop import TIMEOUT, small_loop
from test_run_pretraining import SMALL_RUN
from videos import write_list, write_videos

from runs.processes import first_slurm_host, start_world
from runs.watchdog import Fault, Peer, Sign, find_gone, find_hung

HOST = socket.gethostname()


# --- whom the watchdog names ------------------------------------------------------------------------------------


def peer(rank: int, *, state="running", position=(0, 5), heard=0.0, moved=0.0) -> Peer:
    """A rank that was heard of `heard` seconds ago and whose loop went on `moved` seconds ago, at time 1000."""
    one = Peer(rank)
    one.sign = Sign(f"node{rank}", 1, 1, position, f"batch {position[-1]}", state)
    one.heard, one.moved, one.changed = 1000 - heard, 1000 - moved, 1000 - moved
    return one


def gone(*peers: Peer) -> Fault | None:
    return find_gone(list(peers), timeout=60, now=1000)


def hung(*peers: Peer) -> Fault | None:
    return find_hung(list(peers), timeout=60, now=1000)


def test_nobody_is_named_while_all_go_on_or_are_done():
    peers = peer(0, heard=50, moved=50), peer(1, state="done", heard=500, moved=500)
    assert gone(*peers) is None and hung(*peers) is None


def test_a_silent_rank_is_named_with_its_host():
    ranks, reason = gone(peer(0, moved=70), peer(1, heard=61, moved=70))
    assert ranks == [1]
    assert reason.startswith("rank 1 on host node1 has sent no heartbeat for 61 s (last heartbeat: batch 5)")


def test_a_rank_that_stands_still_is_named_when_the_others_wait_for_it():
    waiting = [peer(r, position=(2, 0), moved=61) for r in (0, 1, 3)]
    late = peer(2, position=(1, 9), moved=62)
    assert hung(*waiting, late) == ([2], "rank 2 on host node2 has hung for 62 s (last heartbeat: batch 9)")
    assert hung(*waiting, peer(2, position=(2, 0), moved=61)).ranks == [0, 1, 3, 2]


def test_a_rank_behind_that_goes_on_is_waited_for():
    waiting = [peer(r, position=(2, 0), moved=90) for r in (0, 1)]
    assert hung(*waiting, peer(2, position=(1, 9), moved=2)) is None
    assert hung(*waiting, peer(2, position=(2, 0), moved=2)) is None


def test_a_failed_rank_ends_the_others_after_a_while():
    failed = "ValueError: no"
    assert gone(peer(0), peer(1, state=failed, moved=1)) is None
    assert gone(peer(0), peer(1, state=failed, moved=30)) == ([1], "rank 1 on host node1 failed: ValueError: no")


def test_a_rank_that_never_came_is_named():
    late = Peer(1)
    late.heard = 930
    assert gone(peer(0), late).reason.startswith("rank 1, which never joined the watch, has sent no heartbeat")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("a1,b2", "a1"),
        ("node[01-04,07],x9", "node01"),
        ("node[7,9-12].lab", "node7.lab"),
        ("rack[1-2]node[003-004],y", "rack1node003"),
    ],
)
def test_first_host_of_a_list_of_slurm(nodes, first):
    assert first_slurm_host(nodes) == first


# --- a small loop on two processes, started as srun does --------------------------------------------------------


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["utils"])
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_small_loop(forks, tmp_path: Path, trouble: str, victim: int = 1) -> tuple[list[int | None], str, float]:
    """Exit statuses (None: still there when the other had ended), stderr, and the seconds until one had ended."""
    log, port = tmp_path / "stderr", free_port()
    log.touch()
    tasks = [forks.Process(target=small_loop, args=(r, port, trouble, victim, str(log))) for r in (0, 1)]
    for task in tasks:
        task.start()
    began = time.monotonic()
    for rank, task in enumerate(tasks):
        if trouble != "freeze" or rank != victim:
            task.join(60)
    seconds = time.monotonic() - began
    statuses = [task.exitcode for task in tasks]
    for task in tasks:
        task.kill()
        task.join()
    return statuses, log.read_text(), seconds


def test_two_tasks_of_srun_end_well_though_one_ends_long_before_the_other(forks, tmp_path):
    statuses, stderr, seconds = run_small_loop(forks, tmp_path, "finish")
    assert statuses == [0, 0] and "rank" not in stderr
    assert seconds > 1.5 * TIMEOUT


def test_rank_0_keeps_its_store_until_the_others_have_left(forks, tmp_path):
    statuses, stderr, _ = run_small_loop(forks, tmp_path, "leave late")
    assert statuses == [0, 0] and "Broken pipe" not in stderr and "rank" not in stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_at_once(forks, tmp_path, victim):
    statuses, stderr, seconds = run_small_loop(forks, tmp_path, "die", victim)
    assert sorted(statuses) == [-signal.SIGKILL, 1]
    named = "is no longer reachable" if victim == 0 else r"is gone \(last heartbeat: batch \d\)"
    assert re.search(rf"rank {1 - victim} on host {HOST}: .*; rank {victim} on host {HOST} {named}", stderr), stderr
    assert seconds < 3 * TIMEOUT


def test_a_frozen_rank_is_named_in_time_also_when_it_holds_the_store(forks, tmp_path):
    statuses, stderr, seconds = run_small_loop(forks, tmp_path, "freeze", victim=0)
    assert statuses == [None, 1]
    assert f"rank 1 on host {HOST}: rank 0 on host {HOST} has sent no heartbeat for" in stderr
    assert f"the run ends (--dist_timeout {TIMEOUT:g})" in stderr
    assert TIMEOUT <= seconds < 3 * TIMEOUT


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_loop_hangs_is_named_in_time_and_shows_where(forks, tmp_path, victim):
    statuses, stderr, seconds = run_small_loop(forks, tmp_path, "hang", victim)
    assert statuses == [1, 1]
    assert re.search(
        rf"rank 0 on host {HOST}: rank {victim} on host {HOST} has hung for \d+ s \(last heartbeat: batch 9\); ", stderr
    )
    assert f"rank {1 - victim} on host {HOST} hangs" not in stderr
    assert re.search(rf'small_loop.py", line {line_of("time.sleep(60)")} in get_into', stderr)
    assert TIMEOUT <= seconds < 3 * TIMEOUT


def line_of(text: str) -> int:
    lines = (ROOT / "tests/small_loop.py").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip() == text)


def test_a_rank_that_fails_tells_its_name_and_error(forks, tmp_path):
    statuses, stderr, _ = run_small_loop(forks, tmp_path, "raise")
    assert statuses == [1, 1]
    assert f"rank 1 on host {HOST}: KeyError: 'a wrong name'\n" in stderr


def test_processes_that_do_not_meet_say_so(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=rf"rank 0 on host {HOST}: 2 processes did not meet at localhost:\d+ within"):
        start_world("cpu", dist_timeout=1.0)


# --- the program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """The program on 24 small videos: twelve steps an epoch with two ranks."""
    folder = tmp_path_factory.mktemp("data")
    names = write_videos(folder, range(20, 24), size=(40, 48))
    write_list(folder / "list.csv", *(f"{name} 0" for name in 6 * names))
    return [str(ROOT / "run_mae_pretraining.py"), *SMALL_RUN, "--batch_size", "1", "--data_path", f"{folder}/list.csv"]


class Started:
    """A command in a process group of its own, with its output going to a file."""

    def __init__(self, log: Path, command: list[str], **environment: str):
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end and self.process.poll() is None, self.output
            time.sleep(0.005)

    def rank(self, rank: int) -> int:
        """The process id of a rank that torchrun started."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        raise AssertionError(f"no rank {rank} in {self.output}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    """`start(name, command, **environment)`; whatever is left at the end of the test is killed."""
    started = []

    def start_one(name: str, command: list[str], **environment: str) -> Started:
        started.append(Started(tmp_path / f"{name}.log", command, **environment))
        return started[-1]

    yield start_one
    for one in started:
        one.end()


def torchrun(*flags: str, max_restarts: int = 0) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*run, f"--max_restarts={max_restarts}", *flags]


def last_weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint-1.pth", weights_only=True)["model"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks' processes in /proc")
def test_torchrun_continues_after_a_rank_was_killed_in_the_middle_of_an_epoch(flags, start, tmp_path):
    straight = start("straight", torchrun(*flags, "--output_dir", str(tmp_path / "straight")))
    killed = start("killed", torchrun(*flags, "--output_dir", str(tmp_path / "killed"), max_restarts=1))
    killed.wait_for("epoch 1  step 15/24")
    os.kill(killed.rank(1), signal.SIGKILL)
    assert straight.process.wait(120) == 0, straight.output
    assert killed.process.wait(120) == 0, killed.output
    assert "checkpoint-0.pth: 1 of 2 epochs are done" in killed.output
    last = r"(epoch \d, batch \d+|saving checkpoint-0\.pth)"  # heartbeats are sent by the clock, not at every step
    assert re.search(rf"rank 1 on host {HOST} is gone \(last heartbeat: {last}\)", killed.output), killed.output
    ours, theirs = last_weights(tmp_path / "killed"), last_weights(tmp_path / "straight")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_tasks_of_srun_end_when_one_freezes(flags, start):
    """Without torchrun's variables the program reads SLURM's."""
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    slurm["MASTER_PORT"] = str(free_port())
    command = [sys.executable, *flags, "--epochs", "500", "--dist_timeout", "6"]
    ranks = [start(f"rank {r}", command, **slurm, SLURM_PROCID=str(r), SLURM_LOCALID=str(r)) for r in (0, 1)]
    ranks[0].wait_for("epoch 0  step 5/")
    began = time.monotonic()
    os.kill(ranks[1].process.pid, signal.SIGSTOP)
    assert ranks[0].process.wait(60) == 1
    assert 6 <= time.monotonic() - began < 18
    assert "2 processes x 1 video " in ranks[0].output
    assert f"rank 1 on host {HOST} has sent no heartbeat for" in ranks[0].output
