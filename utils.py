"""Process set-up, seeding, and numbers shared between processes."""

import os
import random
import subprocess
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so


class World(NamedTuple):
    """Where this process stands: its device, its rank among `size` processes."""

    device: torch.device
    rank: int
    size: int


def start_world(
    device: str = "auto",
    dist_url: str = "env://",
    world_size: int = 1,
    *,
    local_rank: int = -1,
    itp: bool = False,
) -> World:
    """Joins the other processes of the job, if any: torchrun, SLURM, or one process alone.

    Args:
        device: "auto" takes CUDA where there is one, else the CPU; or "cuda", "cuda:1", "cpu".
        world_size: processes there should be; 1 leaves it to the launcher.
        local_rank: what torch.distributed.launch passes on the command line instead of the environment.
        itp: take the ranks from Open MPI's environment variables.

    Raises:
        ValueError: CUDA was asked for by name and there is none, or the launcher started another number of
            processes.
    """
    if itp:
        for theirs, ours in (("RANK", "RANK"), ("SIZE", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
            os.environ[ours] = os.environ[f"OMPI_COMM_WORLD_{theirs}"]
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA device; use --device cpu or auto")
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    found = init_distributed_device_so(device=device, dist_url=dist_url)
    if world_size not in (1, found["world_size"]):
        raise ValueError(
            f"--world_size {world_size}, but {found['world_size']} processes were started: use torchrun "
            "--nproc_per_node or srun, which tell the number by themselves"
        )
    return World(torch.device(found["device"]), found["global_rank"], found["world_size"])


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_JOB_NODELIST", "localhost")
    if "[" not in nodes:
        return nodes.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def stop_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_all(*words: int) -> None:
    """Seeds torch (all devices), numpy and random from whole numbers such as (seed, step, rank).

    Called before every training step, it makes the step's masks and dropout a function of those numbers, so
    that a resumed run repeats them and ranks differ.
    """
    high, low = np.random.SeedSequence(words).generate_state(2).tolist()
    torch.manual_seed(high << 32 | low)
    np.random.seed(low)
    random.seed(low)


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of one number over all ranks (every rank must call it)."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()
