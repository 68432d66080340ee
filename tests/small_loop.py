"""A loop of collectives that a test runs on two processes, and the trouble that one of them may get into."""

import os
import signal
import time

import torch
import torch.distributed as dist

from runs import watchdog
from runs.processes import start_world, stop_world

TIMEOUT = 4.0


def get_into(trouble: str) -> None:
    if trouble == "hang":
        time.sleep(60)
    elif trouble == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif trouble == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif trouble == "raise":
        raise KeyError("a wrong name")


def small_loop(rank: int, port: int, trouble: str, victim: int, log: str) -> None:
    """Twenty collectives in two seconds as a task of srun; `victim` gets into `trouble` in the middle.

    Args:
        trouble: as in `get_into`; or "finish", where the other rank goes on alone for another 1.5 timeouts; "leave
            late", where the victim is idle for half a timeout after the last collective; or "".
        log: file that takes what goes to stderr.
    """
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    os.environ |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    torch.set_num_threads(1)
    world = start_world("cpu", dist_timeout=TIMEOUT)
    try:
        for index in range(20):
            if index == 10 and world.rank == victim:
                if trouble == "finish":
                    return
                get_into(trouble)
            watchdog.tick(f"batch {index}", index)
            time.sleep(0.15 * TIMEOUT if trouble == "finish" and index >= 10 else 0.1)
            if trouble != "finish" or index < 10:
                dist.all_reduce(torch.ones(1))
        if trouble == "leave late" and world.rank == victim:
            time.sleep(0.5 * TIMEOUT)
    finally:
        stop_world()
