"""One training run as it goes: the loops report to it, and it logs, records faults, saves, and stops."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from loaders import EpochSampler
from runs import watchdog
from runs.console import Console, memory_gib
from runs.engine import Engine
from runs.faults import Faults
from runs.logs import RunLog
from runs.meters import EpochStatistics
from runs.resuming import Start
from runs.saving import Checkpoints
from utils import World


@dataclass(kw_only=True)
class TrainingRun:
    """What happens in a run, in the order in which the loops report it:

        start                       once
          start_epoch               returns the first batch to train, which is not 0 mid-epoch
            start_batch, end_batch  around the work on one batch
            end_step                after each optimiser step; may save
          end_epoch                 returns the epoch's means; `save_epoch` then writes its checkpoint
        finish                      once

    Reading numbers from the device is the only host synchronisation; it happens every `log_freq` steps.

    Attributes:
        resumed: where the run starts; the epochs to train are range(resumed.epoch, epochs).
        kept: further entries of every checkpoint, e.g. the best validation so far.
    """

    engine: Engine
    sampler: EpochSampler
    epochs: int
    resumed: Start
    world: World
    console: Console
    log: RunLog
    checkpoints: Checkpoints
    faults: Faults
    log_freq: int = 20
    save_freq: int = 1
    epoch: int = field(init=False)  # this and the next two: set by `start_epoch`
    statistics: EpochStatistics = field(init=False)
    _idle_since: float = field(init=False)  # when the last batch was done

    def __post_init__(self):
        self.kept = {name: value for name, value in self.resumed.state.items() if name != "progress"}

    def start(self) -> None:
        num_batches, update_freq = self.sampler.steps_per_epoch, self.engine.update_freq
        self.console.total = self.epochs * num_batches // update_freq
        self.console.start((self.resumed.epoch * num_batches + self.resumed.batch) // update_freq)

    def start_epoch(self, epoch: int) -> int:
        """Positions the sampler; returns the first batch to train."""
        self.epoch, first_batch, progress = epoch, 0, None
        if epoch == self.resumed.epoch:
            first_batch, progress = self.resumed.batch, self.resumed.state.get("progress")
        self.sampler.set_epoch(epoch, first_batch)
        self.statistics = EpochStatistics(self.world.device, progress)
        self.faults.start_epoch()
        self._idle_since = time.perf_counter()
        return first_batch

    def batch_number(self, index: int) -> int:
        """The number in the whole run of batch `index` of this epoch."""
        return self.epoch * self.sampler.steps_per_epoch + index

    def step_number(self, index: int) -> int:
        """The number in the whole run, from 0, of the optimiser step that batch `index` belongs to."""
        return self.batch_number(index) // self.engine.update_freq

    @property
    def last_step(self) -> int:
        """The number in the whole run of this epoch's last optimiser step."""
        return self.step_number(self.sampler.steps_per_epoch - 1)

    def start_batch(self, index: int, batch: dict) -> None:
        """A batch has arrived; the time since the last one was done is the wait for data."""
        self.statistics.waited += time.perf_counter() - self._idle_since
        watchdog.tick(f"epoch {self.epoch}, batch {index}", self.epoch, index)
        self.faults.videos.add(batch["bad"])
        self.statistics.replaced_here += len(batch["bad"])

    def end_batch(self, batch: dict, values: dict[str, Tensor]) -> None:
        """Adds one batch of this rank and its 0-dimensional tensors: always the same names, one being "loss"."""
        self.statistics.meters.add(**values)
        self.faults.batches.add(values["loss"], batch["index"])
        self.statistics.clips += len(batch["clips"]) * self.world.size
        self._idle_since = time.perf_counter()

    def end_step(self, index: int, **scalars: float) -> None:
        """Counts an optimiser step, the last batch of which was `index`; every `log_freq` steps reads and reports.

        Args:
            scalars: further values of this step for TensorBoard, one being `lr`.

        Raises:
            TrainingDiverged, TooManyBadVideos: see `Faults.review`.
            Stopped: a signal asked the run to stop, and it has saved.
        """
        step = self.step_number(index)
        self.console.advance()
        self.faults.batches.close_step(step, self.faults.steps.last)
        if (step + 1) % self.log_freq == 0 or index + 1 == self.sampler.steps_per_epoch:
            means, skipped = self._read()
            self._report(step + 1, means, skipped, scalars)
        self.checkpoints.save_if_due(self.epoch, index + 1, self.state_dict)
        self._idle_since = time.perf_counter()

    def _read(self) -> tuple[dict[str, float], int]:
        """Means since the last reading and steps skipped since then; all ranks together."""
        means, new_videos = self.statistics.read_interval(self.faults.videos.pending)
        skipped = self.faults.review(self.epoch, new_videos)
        self.statistics.skipped += skipped
        self.statistics.start_interval()
        return means, skipped

    def _report(self, step: int, means: dict[str, float], skipped: int, scalars: dict[str, float]) -> None:
        counts = {"skipped_steps": skipped, "bad_videos": len(self.faults.videos)}
        norms = {f"grad_norm_{name}": float(norm) for name, norm in self.engine.grad_norms.items()}
        self.log.scalars(step, {**means, **counts, **scalars, **norms})
        self.console.report(
            step,
            f"epoch {self.epoch}",
            loss=f"{means.get('loss_reconstruction', means['loss']):.4f}",
            lr=f"{scalars['lr']:.2e}",
            clips_s=f"{means['clips_per_second']:.1f}",
            data=f"{means['data_wait']:.0%}",
            mem=f"{memory_gib(self.world.device):.2f}G",
            **({"skipped": str(skipped)} if skipped else {}),
        )

    def state_dict(self) -> dict:
        """What a checkpoint needs to resume mid-epoch, beside the engine's state; all ranks call it together."""
        self._read()
        return {**self.kept, "progress": self.statistics.state_dict()}

    def stop_if_signalled(self) -> None:
        """After the last batch of an epoch: see `Checkpoints.stop_if_signalled`."""
        self.checkpoints.stop_if_signalled(self.epoch, self.sampler.steps_per_epoch, self.state_dict)

    def end_epoch(self) -> dict[str, float]:
        """The epoch's means over steps and ranks, its seconds, skipped steps and replaced videos.

        `bad_videos` counts the distinct unreadable ones of the whole run until now.
        """
        return self.statistics.means() | {"bad_videos": len(self.faults.videos)}

    def save_epoch(self) -> None:
        """Writes the epoch's checkpoint, every `save_freq` epochs and after the last."""
        if (self.epoch + 1) % self.save_freq == 0 or self.epoch + 1 == self.epochs:
            self.checkpoints.save_epoch(self.epoch, self.kept)

    def finish(self) -> None:
        """Closes the console; see `Checkpoints.finish`."""
        self.console.close()
        self.checkpoints.finish()
