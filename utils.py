"""What every room uses: errors for people, processes, seeds, sums over ranks, the device, files written whole."""

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

CSV_TEXT = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # of `open`: file names may be any bytes


class UserError(Exception):
    """Something a person can correct. Programs print the message as one line, without a traceback."""


class SettingError(UserError, ValueError):
    """A wrong setting or input file; the message names the flag or file and says what to change."""


class World(NamedTuple):
    """Where this process stands: its device, its rank among `size` processes."""

    device: torch.device
    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and prints."""
        return self.rank == 0


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto" (CUDA where available, else the CPU), "cuda", "cuda:1" or "cpu".

    Raises:
        SettingError: there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        count = torch.cuda.device_count()
        if name == "cpu" and count:  # else a job of many GPUs trains on the CPU unnoticed
            advice = "update the NVIDIA driver, install a torch built for it, or choose --device cpu"
            raise SettingError(f"--device auto: {count} GPUs that the installed torch can't use: {advice}")
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a device that is not there
        reason = str(error).splitlines()[0]
        raise SettingError(f"--device {name} can't be used ({reason}); use --device auto or cpu") from error
    # No tensor on CUDA here: it would take memory on the first GPU for every process of a job.
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count() * torch.cuda.is_available():
        raise SettingError(f"--device {name}: this machine has no such CUDA device; use --device auto or cpu")
    return device


def plain(value: object) -> str:
    """A setting as a person writes it: 5.0 -> "5"; all else as `str` does."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def counted(number: int, noun: str) -> str:
    """1 process, 2 processes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next allocation instead of returning it to the kernel.

    A training step on the CPU allocates the same tensors again and again; each time the kernel would map and clear
    their pages anew (ViT-B, 4 clips: 450,000 page faults, a tenth of a step). Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


@contextmanager
def whole_file(path: str | Path, mode: str = "wb", **settings) -> Iterator[IO]:
    """A file to write that appears under its name, flushed to disk, only once the block has ended well.

    Args:
        settings: of `open`; text is UTF-8 by default.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if "b" not in mode:
        settings = {"encoding": "utf-8", **settings}
    try:
        with temporary.open(mode, **settings) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name too survives a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def seed_all(*words: int) -> None:
    """Seeds torch (all devices), numpy and random from whole numbers such as (seed, step, rank).

    Called before every training step, it makes the step's masks and dropout a function of those numbers, so
    that a resumed run repeats them and ranks differ.
    """
    high, low = np.random.SeedSequence(words).generate_state(2).tolist()
    torch.manual_seed(high << 32 | low)
    np.random.seed(low)
    random.seed(low)


def compute_deterministically() -> None:
    """Makes torch take algorithms that repeat every bit, and raise an error where an operation has none.

    To be called before CUDA starts. The CPU repeats every bit anyway. On CUDA it is the backward pass of attention
    that does not by default; flash and memory-efficient attention have an algorithm that does, and torch leaves
    out cuDNN's, which has none.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses to use cuBLAS
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of one number over all ranks (every rank must call it)."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def gather_from_ranks(value) -> list:
    """`value` of every rank, in their order, on every rank (all ranks call it together)."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from_main(value, device: torch.device):
    """Rank 0's `value` on every rank (all ranks call it together)."""
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(values, device=device)
    return values[0]
