"""The record of skipped steps: the videos of their batches, in bad_batches.csv."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from clips.lists import VideoList
from utils import CSV_TEXT, World, gather_from_ranks

NAME = "bad_batches.csv"
COLUMNS = ["step", "rank", "loss", "path"]


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
        self.steps = []

    def write(self) -> None:
        """Records the skipped steps since `forget`; all ranks call it together."""
        mine = []
        for step, skipped, batches in self.steps:
            for loss, index in batches if skipped else []:
                paths = [self.videos[i].path for i in index.tolist()]
                mine += [(step, self.world.rank, loss.item(), path) for path in paths]
        rows = sorted(row for part in gather_from_ranks(mine) for row in part)
        guilty = [row for row in rows if not math.isfinite(row[2])]
        blamed = {row[0] for row in guilty}
        rows = guilty + [row for row in rows if row[0] not in blamed]
        if self.file and self.world.is_main:
            self._append(rows)

    def _append(self, rows: list[tuple]) -> None:
        try:
            with self.file.open("a", **CSV_TEXT) as file:
                csv.writer(file).writerows(([] if file.tell() else [COLUMNS]) + rows)
        except OSError as error:
            self.warn(f"{self.file} could not be written ({error}); the run continues")
