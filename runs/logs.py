"""The log of a run: log.txt and TensorBoard."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from utils import whole_file


class RunLog:
    """log.txt (one JSON object per epoch) in `output_dir`, TensorBoard in `log_dir`; '' switches either off.

    A full or failing disk loses entries but does not end the run: `warn` is called once, until writing works again.
    """

    def __init__(
        self, *, output_dir: str, log_dir: str, show: bool = True, warn: Callable[[str], None] = warnings.warn
    ):
        self.output_dir = Path(output_dir) if output_dir and show else None
        self.log_dir = log_dir if show else ""
        self.writer: SummaryWriter | None = None
        self.warn, self.failing = warn, set()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write_events(partial(SummaryWriter.add_scalar, tag=name, scalar_value=value, global_step=step))

    def picture(self, epoch: int, picture: np.ndarray) -> None:
        """Writes a picture (H,W,3) uint8 to TensorBoard and to pictures/epoch-<epoch>.png."""
        self._write_events(lambda writer: writer.add_image("clips", picture, epoch + 1, dataformats="HWC"))
        if self.output_dir is not None:
            with self._unless_disk_fails(self.output_dir / "pictures"):
                (self.output_dir / "pictures").mkdir(exist_ok=True)
                with whole_file(self.output_dir / "pictures" / f"epoch-{epoch:04d}.png") as file:
                    Image.fromarray(picture).save(file, "png")

    def epoch(self, values: dict) -> None:
        if self.output_dir is not None:
            with self._unless_disk_fails(self.output_dir / "log.txt"), (self.output_dir / "log.txt").open("a") as f:
                f.write(json.dumps(values) + "\n")

    def _write_events(self, write: Callable[[SummaryWriter], None]) -> None:
        if not self.log_dir:
            return
        with self._unless_disk_fails(Path(self.log_dir)):
            writer, self.writer = self.writer or SummaryWriter(self.log_dir), None
            write(writer)
            self.writer = writer  # after a failure its thread has ended: the next entry opens a new one

    @contextmanager
    def _unless_disk_fails(self, what: Path) -> Iterator[None]:
        try:
            yield
            self.failing.discard(what)
        except OSError as error:
            if what not in self.failing:
                self.warn(f"{what} could not be written ({error}): entries are lost, training continues")
            self.failing.add(what)

    def close(self) -> None:
        if self.writer is not None:
            self._write_events(SummaryWriter.close)
            self.writer = None
