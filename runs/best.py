"""checkpoint-best.pth: the weights with the best validation so far."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from probes import ProbeGrid, chosen_settings
from runs.checkpoints import BEST, CheckpointError, read_checkpoint
from runs.console import Console
from runs.engine import Engine
from runs.saving import Checkpoints
from runs.training import TrainingRun
from utils import broadcast_from_main, whole_file

NO_BEST = {"top1": -1.0}


class BestCheckpoint:
    """Writes checkpoint-best.pth whenever a validation is better than ever.

    Attributes:
        value: the best so far: its `top1` in per cent, `epoch`, and `source`, "model" or "ema", of a grid of probes
            followed by the probe's name.
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
        more = {"epoch": epoch, "best": better}
        written = self.checkpoints.write(BEST, more, only=self._selects(better["source"]))
        if written or self.checkpoints.folder is None:
            self.value = better  # else the file still holds the old one

    def _selects(self, source: str) -> Callable[[dict], dict]:
        """What the file holds of the engine's state: one model, of a grid the one probe with its own settings."""
        which, _, probe = source.partition(" ")
        weights = "model_ema" if which == "ema" else "model"
        if not probe:
            return lambda state: {"model": state[weights]}
        grid, settings = self.checkpoints.engine.module, self.checkpoints.about["model_settings"]
        own = {"model_settings": chosen_settings(settings, probe)}
        return lambda state: {"model": grid.select(state[weights], probe), **own}

    def load_into(self, engine: Engine) -> str:
        """Loads the best weights, with which the engine then evaluates; a grid of probes becomes the best of them.

        Returns:
            Their file and the name of the probe, or "" where none was written.

        Raises:
            CheckpointError: none was written of a grid.
        """
        path = self.checkpoints.folder and self.checkpoints.folder / BEST
        is_grid = isinstance(engine.module, ProbeGrid)
        if self.value["top1"] < 0 or not path or not path.is_file():
            if is_grid:
                raise CheckpointError(f"no {BEST} to test: no probe had a finite validation, or writing it failed")
            return ""
        _, _, probe = self.value["source"].partition(" ")
        if is_grid:
            engine.module = engine.module.probe(probe)
        engine.module.load_state_dict(read_checkpoint(path)["model"])
        return f"{path} ({probe})" if probe else str(path)


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
