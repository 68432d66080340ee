"""Process set-up, seeding, meters and logging."""

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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


class Meters:
    """Running means of device scalars: adding costs no synchronisation, `read` costs one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, **values: Tensor) -> None:
        """Adds one step's 0-dimensional tensors; the names must be the same in every step."""
        self.names = list(values)
        step = torch.stack([v.detach().to(self.device, torch.float64).reshape(()) for v in values.values()])
        self.total = self.total + step
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means over the steps since the last `reset`, over all ranks (every rank must call it)."""
        if not self.count:
            return {}
        total = self.total / self.count
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return dict(zip(self.names, total.tolist(), strict=True))


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of one number over all ranks (every rank must call it)."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device for CUDA, else of this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def readable_time(seconds: float) -> str:
    """3725 -> "1:02:05"; days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    return f"{days} d " * bool(days) + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


class Console:
    """What a person sees of a run: a bar on a terminal, plain lines elsewhere, nothing off rank 0."""

    def __init__(self, *, total_steps: int, show: bool = True):
        self.total, self.show, self.bar = total_steps, show, None
        self.first, self.started = 0, time.monotonic()

    def start(self, first_step: int) -> None:
        """The clock starts, `first_step` steps being done already."""
        self.first, self.started = first_step, time.monotonic()
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def report(self, step: int, epoch: int, **values: str) -> None:
        """Shows the values of the last steps; `step` steps of the whole run are done."""
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}")
            self.bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in values.items()))
            return
        done = max(1, step - self.first)
        left = (time.monotonic() - self.started) / done * (self.total - step)
        text = "  ".join(f"{k} {v}" for k, v in values.items())
        self.say(f"epoch {epoch}  step {step}/{self.total}  {text}  left {readable_time(left)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.show:
            tqdm.write(text, file=sys.stderr if self.bar is not None else sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line on stderr from any rank: something a person should know of."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class RunLog:
    """log.txt (a JSON object an epoch) in `output_dir`, TensorBoard in `log_dir`; either may be ''."""

    def __init__(self, *, output_dir: str, log_dir: str, show: bool = True):
        self.file = Path(output_dir) / "log.txt" if output_dir and show else None
        self.writer = SummaryWriter(log_dir) if log_dir and show else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        """A picture (H,W,3) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def epoch(self, values: dict) -> None:
        if self.file is not None:
            with self.file.open("a") as f:
                f.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
