"""checkpoint-best.pth: the weights with the best validation so far."""

import math
import shutil
from pathlib import Path

from torch import nn

from runs.checkpoints import BEST, read_checkpoint
from runs.console import Console
from runs.saving import Checkpoints
from runs.training import TrainingRun
from utils import broadcast_from_main, whole_file

NO_BEST = {"top1": -1.0}


class BestCheckpoint:
    """Writes checkpoint-best.pth whenever a validation is better than ever.

    Attributes:
        value: the best so far: its `top1` in per cent, `epoch`, and `source`, "model" or "ema".
    """

    def __init__(self, value: dict, *, checkpoints: Checkpoints, console: Console):
        self.value, self.checkpoints, self.console = value, checkpoints, console

    def update(self, epoch: int, found: dict[str, dict[str, float]]) -> None:
        """Compares the validations of an epoch, by source, with the best; a non-finite one never becomes best."""
        better = self.value
        for source, values in found.items():
            if not math.isfinite(values["loss"]):
                self.console.warn_once(
                    f"epoch {epoch}: the validation of {source} is not finite, so it can't become the best"
                )
            elif values["top1"] > better["top1"]:
                better = {"top1": values["top1"], "epoch": epoch, "source": source}
        if better is self.value:
            return
        weights = "model_ema" if better["source"] == "ema" else "model"
        more = {"epoch": epoch, "best": better}
        written = self.checkpoints.write(BEST, more, only=lambda state: {"model": state[weights]})
        if written or self.checkpoints.folder is None:
            self.value = better  # else the file still holds the old one

    def load_into(self, model: nn.Module) -> str:
        """Loads the best weights into a classifier or probe; returns their file, or "" where none was written."""
        path = self.checkpoints.folder and self.checkpoints.folder / BEST
        if self.value["top1"] < 0 or not path or not path.is_file():
            return ""
        model.load_state_dict(read_checkpoint(path)["model"])
        return str(path)


def resume_best(run: TrainingRun, *, resumed_from: str) -> BestCheckpoint:
    """The best so far of a run, as its checkpoint has it if the file is in --output_dir or beside --resume.

    A file beside `resumed_from` (--resume) is copied to --output_dir. Without one the best starts anew.
    """
    value, folder, console = run.kept.get("best", NO_BEST), run.checkpoints.folder, run.console
    if value["top1"] >= 0 and folder is not None:
        found = not run.world.is_main or (folder / BEST).is_file()
        if not found and not copy_best(value, resumed_from, folder, console):
            console.warn(f"the file of the best so far, {value['top1']:.2f}, is not there: the best starts anew")
            value = NO_BEST
        value = broadcast_from_main(value, run.world.device)
    run.kept["best"] = value
    return BestCheckpoint(value, checkpoints=run.checkpoints, console=console)


def copy_best(best: dict, resumed_from: str, folder: Path, console: Console) -> bool:
    """Copies checkpoint-best.pth from beside --resume to `folder`; returns False unless it is that of `best`."""
    source, target = Path(resumed_from).parent / BEST, folder / BEST
    if not resumed_from or not source.is_file() or read_checkpoint(source).get("best") != best:
        return False
    try:
        with source.open("rb") as old, whole_file(target) as new:
            shutil.copyfileobj(old, new)
    except OSError as error:
        console.warn(f"{target} could not be written ({error})")
        return False
    console.say(f"{source}, the best so far, is copied to {folder}")
    return True
