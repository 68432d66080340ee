"""When a run writes its checkpoints, and how it stops when a signal asks for it.

    checkpoint-<epoch>.pth  after every --save_ckpt_freq epochs and the last one
    checkpoint-last.pth     every --save_ckpt_minutes, also mid-epoch, and when the run is asked to stop
    checkpoint-previous.pth the checkpoint-last.pth before it

What is random in a step is drawn from (seed, batch, rank), and what happens to a video from (seed, epoch, video). So
the position within the epoch is all the random state there is, and a resumed run repeats a straight one: bit for bit on
the CPU, and on CUDA as far as its algorithms repeat themselves (--deterministic).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loaders import EpochSampler
from runs import watchdog
from runs.checkpoints import LAST, PREVIOUS, CheckpointError, epoch_checkpoints, save_checkpoint
from runs.console import Console
from runs.engine import Engine
from runs.resuming import layout_of
from runs.signals import Stopped, StopSignals, Votes
from runs.version import code_version
from utils import World, broadcast_from_main


@dataclass(kw_only=True)
class Checkpoints:
    """Writes a run's checkpoints, and stops the run where a signal asks for it.

    Args:
        output_dir: folder of the checkpoints; '' writes none.
        about: goes into every checkpoint: flags, and the settings that rebuild the model.
        minutes: time between two writes of checkpoint-last.pth; 0 writes it on signals only.
        keep: how many checkpoint-<epoch>.pth to keep; 0 keeps all.
    """

    engine: Engine
    sampler: EpochSampler
    output_dir: str
    about: dict
    minutes: float
    keep: int
    signals: StopSignals
    votes: Votes
    world: World
    console: Console

    def __post_init__(self):
        self.folder = Path(self.output_dir) if self.output_dir else None
        self.about |= {"layout": layout_of(self.sampler), "version": code_version()}
        self.about["optimizer_name"] = type(self.engine.optimizer).__name__
        self.saved_at = time.monotonic()
        self.unsaved = ""  # why the newest state is not on the disk
        if self.folder and self.world.is_main:
            for left in self.folder.glob(".checkpoint-*.tmp"):  # by a process that was killed while writing
                left.unlink(missing_ok=True)

    def write(self, name: str, more: dict, only: Callable[[dict], dict] = lambda state: state) -> bool:
        """Writes one file, by rank 0; every rank calls it, since DeepSpeed gathers the state, and waits for it.

        A full or failing disk loses this checkpoint but does not end the run: a warning says so.

        Args:
            more: what the file holds beside the engine's state.
            only: selects from the engine's state, and adds what replaces `about`.

        Returns:
            Whether the file was written, the same on all ranks.
        """
        if self.folder is None:
            return False
        watchdog.tick(f"saving {name}")
        state = only(self.engine.state_dict())
        self.unsaved = ""
        if self.world.is_main:
            self._write(name, {**self.about, **state, **more})
        # The others wait: when one of them leaves, its launcher ends rank 0, which may still be writing.
        self.unsaved = broadcast_from_main(self.unsaved, self.world.device)
        return not self.unsaved

    def _write(self, name: str, state: dict) -> None:
        try:
            save_checkpoint(self.folder / name, state, keep_as=PREVIOUS if name == LAST else "")
        except (OSError, RuntimeError) as error:  # torch wraps what the file system raises
            self.unsaved = f"{self.folder / name} could not be written ({str(error).splitlines()[0]})"
            self.console.warn(f"{self.unsaved}: older checkpoints are untouched, training continues; free some space")

    def save_epoch(self, epoch: int, more: dict) -> None:
        """Writes checkpoint-<epoch>.pth, and removes older ones beyond the number to keep."""
        saved = self.write(f"checkpoint-{epoch}.pth", {"epoch": epoch, "batch": 0, **more})
        self.saved_at = time.monotonic()
        if self.keep and saved and self.world.is_main:
            found = epoch_checkpoints(self.folder)
            newest = found.index(self.folder / f"checkpoint-{epoch}.pth")  # later epochs are another run's
            for old in found[newest + self.keep :]:
                old.unlink(missing_ok=True)

    def save_if_due(self, epoch: int, batch: int, state: Callable[[], dict]) -> None:
        """After an optimiser step, with `batch` batches of the epoch done: saves if it is time or a signal came.

        Args:
            state: makes what the checkpoint holds beside the engine's state; all ranks call it together.

        Raises:
            Stopped: a signal came and the state is saved.
        """
        due = 0 < 60 * self.minutes < time.monotonic() - self.saved_at
        self._act(self.votes(self.signals.status, due and self.world.is_main), epoch, batch, state)

    def stop_if_signalled(self, epoch: int, batch: int, state: Callable[[], dict]) -> None:
        """As `save_if_due` for signals alone, where the processes wait for each other anyway."""
        self._act(self.votes.now(self.signals.status, 0), epoch, batch, state)

    def _act(self, outcome: list[int], epoch: int, batch: int, state: Callable[[], dict]) -> None:
        status, due = outcome
        if not status and (not due or self.engine.bad_steps.in_row > 0):  # doubtful weights replace no good ones
            return
        self.write(LAST, {"epoch": epoch - 1, "batch": batch, **state()})  # epoch: the last whole one
        self.saved_at = time.monotonic()
        if not status:
            return
        if self.folder is None or self.unsaved:
            raise Stopped(f"stopped in epoch {epoch}; {self.unsaved or 'nothing is kept without --output_dir'}", 1)
        raise Stopped(
            f"stopped in epoch {epoch} after {batch} of {self.sampler.steps_per_epoch} batches, saved in "
            f"{self.folder / LAST}: rerun the same command to resume",
            status,
        )

    def finish(self) -> None:
        """Checks that the end state was written.

        Raises:
            CheckpointError: the newest state is not on the disk.
        """
        if self.unsaved:
            raise CheckpointError(f"{self.unsaved}; free some space and rerun the same command")
