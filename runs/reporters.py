"""Where a run's numbers and pictures are shown: the table of --report_to."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from utils import SettingError, whole_file

WANDB_ID = "wandb_run_id.txt"


class TensorBoard:
    """Event files in `folder`, which appear with the first entry; '' writes none."""

    failures = (OSError,)  # what a verb may raise where an entry is lost

    def __init__(self, folder: str):
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def __str__(self) -> str:
        return self.folder

    def settings(self, values: dict) -> None:
        rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
        self._write(lambda writer: writer.add_text("settings", f"| flag | value |\n|---|---|\n{rows}"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture (H,W,3) uint8."""
        self._write(lambda writer: writer.add_image(name, picture, step, dataformats="HWC"))

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        if self.folder:
            writer, self.writer = self.writer or SummaryWriter(self.folder), None
            write(writer)
            self.writer = writer  # after a failure its thread has ended: the next entry opens a new one

    def close(self) -> None:
        if self.writer is not None:
            self._write(SummaryWriter.close)
            self.writer = None


class WeightsAndBiases:
    """A run of Weights & Biases; project, name and mode are those of its environment variables.

    Its id is kept in `folder`, so that a resumed run goes on with the same curves. `resumes` is whether to look for it.
    '' keeps nothing.

    Raises:
        SettingError: the run can't be opened.
    """

    failures = (Exception,)  # a service that shows curves ends no training, whatever it raises

    def __init__(self, folder: str, *, resumes: bool):
        self.wandb = import_wandb()
        kept = Path(folder) / WANDB_ID
        known = kept.read_text().strip() if folder and resumes and kept.is_file() else None
        name = os.environ.get("WANDB_NAME") or Path(folder).resolve().name if folder else None
        try:
            self.run = self.wandb.init(id=known, resume="allow", dir=folder or None, name=name)
        except (self.wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            raise SettingError(
                f"--report_to wandb: {reason}: run `wandb login`, set WANDB_MODE=offline, or leave out wandb"
            ) from error
        if folder and self.run.id != known:
            with whole_file(kept, "w") as file:
                file.write(self.run.id + "\n")
        self.run.define_metric("*", step_metric="step")  # its own step can't go back to that of a checkpoint

    def __str__(self) -> str:
        return "Weights & Biases"

    def settings(self, values: dict) -> None:
        self.run.config.update(values, allow_val_change=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture (H,W,3) uint8."""
        self.run.log({"step": step, name: self.wandb.Image(picture)})

    def close(self) -> None:
        self.run.finish()
        self.wandb.teardown()  # waits until all of it is written


REPORTERS = ("tensorboard", "wandb")
Reporter = TensorBoard | WeightsAndBiases


def import_wandb() -> ModuleType:
    """The package wandb, which the requirements leave out.

    Raises:
        SettingError: it is not installed.
    """
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise SettingError(f"--report_to wandb: {error}: install it with `pip install wandb`") from error
    if not hasattr(wandb, "init"):  # the folder ./wandb, which it writes its runs to, imports as an empty package
        raise SettingError("--report_to wandb: no module named 'wandb': install it with `pip install wandb`")
    return wandb


def open_reporters(names: list[str], *, log_dir: str, output_dir: str, resumes: bool) -> list[Reporter]:
    """Opens what --report_to names.

    Args:
        log_dir: folder for TensorBoard.
        output_dir, resumes: see `WeightsAndBiases`.
    """
    opened = []
    if "tensorboard" in names:
        opened.append(TensorBoard(log_dir))
    if "wandb" in names:
        opened.append(WeightsAndBiases(output_dir, resumes=resumes))
    return opened
