"""Steps whose loss is not finite: skipped by all processes together, counted, and their videos written down."""

import csv
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from clips.lists import VideoList
from utils import World

NAME = "bad_batches.csv"
COLUMNS = ["step", "rank", "loss", "path"]


class BadSteps:
    """Skips the optimiser's step where the loss is not finite on some process, and counts.

    Everything stays on the device; nothing waits for it. An optimiser that runs fused skips a step by itself
    (`found_inf`, as under a GradScaler); for the others one number is read in each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.bad = torch.zeros((), device=device)  # 1 when a batch of this step was bad
        self.last = self.bad  # 1 when the last step was skipped
        self.total, self.in_row, self.longest = (torch.zeros((), device=device) for _ in range(3))
        self.fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not self.fused:
            self.update = optimizer.step
            optimizer.step = self._update_if_good

    def watch(self, loss: Tensor) -> None:
        """Takes note of one batch's loss."""
        self.bad = torch.maximum(self.bad, (~loss.detach().isfinite()).float())

    def agree(self, norm: Tensor | None = None) -> None:
        """Before the optimiser's step: bad on one process is bad on all. `norm`: of the gradient, if it counts."""
        if norm is not None:
            self.bad = torch.maximum(self.bad, (~norm.isfinite()).float())
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MAX)
        if self.fused:
            self.optimizer.found_inf = self.bad

    def _update_if_good(self, *args, **settings):
        return None if self.bad.item() else self.update(*args, **settings)

    def count(self) -> None:
        """After the optimiser's step."""
        self.last, self.bad = self.bad, torch.zeros_like(self.bad)
        self.total = self.total + self.last
        self.in_row = (self.in_row + 1) * self.last
        self.longest = torch.maximum(self.longest, self.in_row)

    def read(self) -> tuple[int, int, int]:
        """Skipped in all; in a row until now; in the longest row since the last call. The same on all ranks."""
        total, in_row, longest = torch.stack([self.total, self.in_row, self.longest]).tolist()
        self.longest = self.in_row
        return int(total), int(in_row), int(longest)


class BadBatches:
    """The videos of the skipped steps, in bad_batches.csv: those of the batches whose loss is not finite.

    Where only the gradient was not, the step's batches of all ranks. `warn` is told when the file can't be
    written.
    """

    def __init__(self, *, output_dir: str, videos: VideoList, world: World, warn: Callable[[str], None]):
        self.file = Path(output_dir) / NAME if output_dir else None
        self.videos, self.world, self.warn = videos, world, warn
        self.steps: list[tuple[int, Tensor, list]] = []
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, index: Tensor) -> None:
        """Keeps one batch's loss and the numbers of its videos in mind."""
        self.batches.append((loss.detach(), index))

    def step_done(self, step: int, skipped: Tensor) -> None:
        self.steps.append((step, skipped, self.batches))
        self.batches = []

    def forget(self) -> None:
        self.steps = []

    def write(self) -> None:
        """Writes down what was skipped since `forget`; all ranks call it together."""
        mine = []
        for step, skipped, batches in self.steps:
            for loss, index in batches if skipped else []:
                paths = [self.videos[i].path for i in index.tolist()]
                mine += [(step, self.world.rank, loss.item(), path) for path in paths]
        parts = [mine]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
        rows = sorted(row for part in parts for row in part)
        guilty = [row for row in rows if not torch.tensor(row[2]).isfinite()]
        blamed = {row[0] for row in guilty}
        rows = guilty + [row for row in rows if row[0] not in blamed]
        if self.file and self.world.rank == 0:
            self._append(rows)

    def _append(self, rows: list[tuple]) -> None:
        try:
            with self.file.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows(([] if file.tell() else [COLUMNS]) + rows)
        except OSError as error:
            self.warn(f"{self.file} could not be written ({error}); the run goes on")
