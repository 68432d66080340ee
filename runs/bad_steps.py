"""Steps with a non-finite loss: skipped on all processes together, counted, and their videos recorded."""

import csv
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from clips.lists import VideoList
from utils import World, gather_from_ranks

NAME = "bad_batches.csv"
COLUMNS = ["step", "rank", "loss", "path"]


class BadSteps:
    """Skips the optimiser's step where the loss of any process is not finite, and counts such steps.

    Everything stays on the device and nothing waits for it: a fused optimiser skips a step by itself when its
    attribute `found_inf` is set, as under a GradScaler. Other optimisers have no such switch, and whoever calls
    `optimizer.step` (GradScaler, DeepSpeed) knows nothing of bad steps; so their `step` is replaced by one that
    reads a number from the device and then steps or not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.bad = torch.zeros((), device=device)  # 1 if a batch of this step was bad
        self.last = self.bad  # 1 if the last step was skipped
        self.total, self.in_row, self.longest = (torch.zeros((), device=device) for _ in range(3))
        self.fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if not self.fused:
            self.optimizer_step = optimizer.step
            optimizer.step = self._step_if_good

    def watch(self, loss: Tensor) -> None:
        """Notes whether the loss of one batch is finite."""
        self.bad = torch.maximum(self.bad, (~loss.detach().isfinite()).float())

    def agree(self, norm: Tensor | None = None) -> None:
        """Before the optimiser's step: bad on one process is bad on all.

        Args:
            norm: gradient norm, where a non-finite one makes the step bad too.
        """
        if norm is not None:
            self.bad = torch.maximum(self.bad, (~norm.isfinite()).float())
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MAX)
        if self.fused:
            self.optimizer.found_inf = self.bad

    def _step_if_good(self, *args, **settings):
        return None if self.bad.item() else self.optimizer_step(*args, **settings)

    def count(self) -> None:
        """After the optimiser's step."""
        self.last, self.bad = self.bad, torch.zeros_like(self.bad)
        self.total = self.total + self.last
        self.in_row = (self.in_row + 1) * self.last
        self.longest = torch.maximum(self.longest, self.in_row)

    def read(self) -> tuple[int, int, int]:
        """Skipped steps: in all, in a row until now, in the longest row since the last call; equal on all ranks.

        Only this call waits for the device.
        """
        total, in_row, longest = torch.stack([self.total, self.in_row, self.longest]).tolist()
        self.longest = self.in_row
        return int(total), int(in_row), int(longest)


class BadBatches:
    """Records the videos of skipped steps in bad_batches.csv: those of the batches whose loss was not finite.

    Where only the gradient was not finite, these are the videos of all batches of the step.

    Args:
        output_dir: folder of the file; '' writes none.
        warn: called when the file can't be written.
    """

    def __init__(self, *, output_dir: str, videos: VideoList, world: World, warn: Callable[[str], None]):
        self.file = Path(output_dir) / NAME if output_dir else None
        self.videos, self.world, self.warn = videos, world, warn
        self.steps: list[tuple[int, Tensor, list]] = []
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, index: Tensor) -> None:
        """Remembers one batch: its loss and the numbers of its videos."""
        self.batches.append((loss.detach(), index))

    def close_step(self, step: int, skipped: Tensor) -> None:
        """Assigns the batches since the last call to optimiser step `step`; `skipped` is 1 if it was skipped."""
        self.steps.append((step, skipped, self.batches))
        self.batches = []

    def forget(self) -> None:
        """Drops the closed steps."""
        self.steps = []

    def write(self) -> None:
        """Records the skipped steps since `forget`; all ranks call it together."""
        mine = []
        for step, skipped, batches in self.steps:
            for loss, index in batches if skipped else []:
                paths = [self.videos[i].path for i in index.tolist()]
                mine += [(step, self.world.rank, loss.item(), path) for path in paths]
        rows = sorted(row for part in gather_from_ranks(mine) for row in part)
        guilty = [row for row in rows if not torch.tensor(row[2]).isfinite()]
        blamed = {row[0] for row in guilty}
        rows = guilty + [row for row in rows if row[0] not in blamed]
        if self.file and self.world.is_main:
            self._append(rows)

    def _append(self, rows: list[tuple]) -> None:
        try:
            with self.file.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows(([] if file.tell() else [COLUMNS]) + rows)
        except OSError as error:
            self.warn(f"{self.file} could not be written ({error}); the run goes on")
