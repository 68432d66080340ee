"""Joining and leaving the other processes of a job, under torchrun, srun or alone."""

import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from runs import watchdog
from utils import SettingError, World, choose_device

LEAVE_TOGETHER = 10.0  # seconds that rank 0, which commonly holds the store, waits for the others to leave


class Meeting(NamedTuple):
    """What the processes of a distributed run share beside the process group."""

    store: dist.Store
    no_time_limit: dist.ProcessGroup  # for `wait_for_all`


_meeting: list[Meeting] = []  # at most one


def start_world(
    device: str = "auto",
    dist_url: str = "env://",
    world_size: int = 1,
    *,
    local_rank: int = -1,
    itp: bool = False,
    dist_timeout: float = 600.0,
) -> World:
    """Joins the other processes of the job, if any, as started by torchrun, srun or Open MPI.

    Args:
        device: "auto" takes CUDA where there is one, else the CPU; or "cuda", "cuda:1", "cpu".
        dist_url: where the processes meet; "env://" is at MASTER_ADDR and MASTER_PORT.
        world_size: expected number of processes; 1 leaves it to the launcher.
        local_rank: what torch.distributed.launch passes on the command line instead of the environment.
        itp: take the ranks from Open MPI's environment variables.
        dist_timeout: seconds in which the processes must meet, and after which one that is dead or hangs ends
            the run (`watchdog`).

    Raises:
        SettingError: there is no such device, the launcher started another number of processes, or they did not
            meet in time.
    """
    if dist_timeout <= 0:
        raise SettingError(f"--dist_timeout {dist_timeout} must be positive (seconds)")
    if itp and "OMPI_COMM_WORLD_RANK" not in os.environ:
        raise SettingError("--dist_on_itp: no variables of Open MPI are set; start with mpirun or drop the flag")
    if itp:
        for theirs, ours in (("RANK", "RANK"), ("SIZE", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
            os.environ[ours] = os.environ[f"OMPI_COMM_WORLD_{theirs}"]
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    device = choose_device(device)
    if "WORLD_SIZE" not in os.environ:
        _read_slurm()
    names = {"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 1}
    local_rank, rank, size = (int(os.environ.get(name, alone)) for name, alone in names.items())
    if world_size not in (1, size):
        raise SettingError(
            f"--world_size {world_size}, but {size} processes were started: leave the flag out and start them "
            "with torchrun --nproc_per_node or srun, which set the number"
        )
    device = _own_device(device, local_rank) if size > 1 else device
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and DeepSpeed take the current device for this process's own
    if size > 1:
        _join(device, dist_url, rank, size, dist_timeout)
    return World(device, rank, size)


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    """The device of this process among those of its machine; srun may show each task its own GPU only."""
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise SettingError(f"process {local_rank} of this machine has no GPU of its own: torch sees only {count}")
    return torch.device("cuda", local_rank if count > 1 else 0)


def _join(device: torch.device, dist_url: str, rank: int, size: int, dist_timeout: float) -> None:
    """Meets the other processes and forms the process group."""
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    timeout = timedelta(seconds=dist_timeout)
    try:
        store, rank, size = next(rendezvous(dist_url, rank, size, timeout=timeout))
        store = unused_part(store, rank, size, dist_timeout)
        # The watchdog reports more than a collective that times out, so its limit is the shorter one.
        watchdog.watch(store, rank=rank, size=size, timeout=dist_timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=1.5 * timeout, device_id=bound
        )
        _meeting.append(Meeting(store, dist.new_group(backend="gloo", timeout=timedelta(days=30))))
    except dist.DistBackendError as error:
        raise SettingError(
            f"rank {rank} on host {socket.gethostname()}: {backend} could not connect {device} with the others' "
            f"({str(error).splitlines()[0]}): NCCL_DEBUG=INFO tells more; see NCCL_SOCKET_IFNAME in docs/cluster.md"
        ) from error
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}" if "env" in dist_url else dist_url
        raise SettingError(
            f"rank {rank} on host {socket.gethostname()}: {size} processes did not meet at {where} within "
            f"--dist_timeout {dist_timeout:g} seconds: {str(error).splitlines()[0]}"
        ) from error


def unused_part(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """A part of the store that no earlier process has written to, the same for all ranks.

    torchrun keeps one store over its restarts (and counts these differently on each machine), so addresses of
    dead processes would be taken for those of their successors. So rank 0 draws a name and sends it to every rank
    that asks with a random word, until all have confirmed it.

    Raises:
        torch.distributed.DistStoreError: not all ranks came within `timeout` seconds.
    """
    end = time.monotonic() + timeout

    def read(key: str) -> list[str]:
        return store.get(key).decode().split() if store.check([key]) else []

    def wait_until(done: Callable[[], bool]) -> None:
        while not done():
            if time.monotonic() > end:
                raise dist.DistStoreError("not all processes came")
            time.sleep(0.02)

    def answer_all() -> bool:
        for r in list(missing):
            for word in read(f"ask/{r}"):
                store.set(f"answer/{r}", f"{word} {name}")
            if read(f"got/{r}") == [name]:
                missing.remove(r)
        return not missing

    if rank == 0:
        name, missing = uuid.uuid4().hex, list(range(1, size))
        wait_until(answer_all)
    else:
        word = uuid.uuid4().hex
        store.set(f"ask/{rank}", word)
        wait_until(lambda: read(f"answer/{rank}")[:1] == [word])
        name = read(f"answer/{rank}")[1]
        store.set(f"got/{rank}", name)
    return dist.PrefixStore(name, store)


def _read_slurm() -> None:
    """The meeting point and the ranks of a step of srun, as torchrun gives them.

    Outside a step, in the job's script, the number of tasks is that of steps to come.
    """
    if "SLURM_STEP_ID" not in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1:
        return
    job, step = int(os.environ.get("SLURM_JOB_ID", 0)), int(os.environ["SLURM_STEP_ID"])
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "localhost")
    os.environ.setdefault("MASTER_ADDR", first_slurm_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(20000 + (job + 1000 * step) % 20000))
    for theirs, ours in (("PROCID", "RANK"), ("NTASKS", "WORLD_SIZE"), ("LOCALID", "LOCAL_RANK")):
        os.environ[ours] = os.environ[f"SLURM_{theirs}"]


def first_slurm_host(nodes: str) -> str:
    """The first host of SLURM's short form of a list: "node[01-04,07],x9" -> "node01"."""
    first = re.match(r"([^\[,]|\[[^\]]*\])*", nodes)[0]  # up to the first comma outside brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def stop_world() -> None:
    """Leaves the process group, if there is one. To be called in a `finally`.

    An exception on its way makes this rank and its host be named, and the other ranks leave too. A `SystemExit`
    with a number is a good end: rank 0 then leaves last, within `LEAVE_TOGETHER` seconds.
    """
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit):
        error = (error.__cause__ or error) if isinstance(error.code, str) else None
    watchdog.unwatch(error)
    store = _meeting.pop().store if _meeting else None
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        if store is not None and error is None:
            _leave_together(store, rank, size)


def _leave_together(store: dist.Store, rank: int, size: int) -> None:
    """Rank 0 waits for the others, whose connections to the store would break and say so."""
    with suppress(RuntimeError):  # some take longer, or the store is gone
        if rank:
            store.set(f"left/{rank}", "")
        else:
            store.wait([f"left/{r}" for r in range(1, size)], timedelta(seconds=LEAVE_TOGETHER))


def wait_for_all(where: str) -> None:
    """Waits for the other ranks, as long as their watchdogs run: after loops of different lengths.

    Every rank must call it. `where` is for the watchdog.
    """
    if not _meeting:
        return
    work = dist.barrier(group=_meeting[0].no_time_limit, async_op=True)
    while not work.is_completed():
        watchdog.tick(f"{where}, waiting for the others")
        time.sleep(0.05)
    work.wait()
