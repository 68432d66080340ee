"""What a run tells: meters on the device, the console, log.txt and TensorBoard."""

import itertools
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from runs import watchdog
from runs.bad_steps import BadBatches, BadSteps
from runs.bad_videos import BadVideos
from utils import World


class Meters:
    """Running means of device scalars: adding costs no synchronisation, `read` costs one.

    A step with a value that is not finite is left out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.total = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=self.device)  # last: the count

    def add(self, **values: Tensor) -> None:
        """Adds one step's 0-dimensional tensors; the names must be the same in every step."""
        if not self.names:
            self.names = list(values)
            self.reset()
        step = torch.stack([v.detach().to(self.device, torch.float64).reshape(()) for v in values.values()])
        step = torch.cat([step, step.new_ones(1)])
        self.total = self.total + torch.where(step.isfinite().all(), step, 0.0)

    def read(self, *numbers: float) -> tuple[dict[str, float], int, list[float]]:
        """Over all ranks, which call it together, since the last `reset`.

        Returns:
            The means (NaN where no step was finite), how many steps they are of, and the sums of `numbers`.
        """
        total = torch.cat([self.total, torch.tensor(numbers, dtype=torch.float64, device=self.device)])
        if dist.is_initialized():
            dist.all_reduce(total)
        *sums, count = total[: len(self.names) + 1].tolist()
        means = {name: value / count if count else math.nan for name, value in zip(self.names, sums, strict=True)}
        return means, int(count), total[len(self.names) + 1 :].tolist()


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the device for CUDA, else of this process (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def readable_time(seconds: float) -> str:
    """3725 -> "1:02:05"; days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    return f"{days} d " * bool(days) + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


class Console:
    """What a person sees of a run: a bar on a terminal, plain lines elsewhere, nothing off rank 0."""

    def __init__(self, *, total_steps: int, show: bool = True):
        self.total, self.show, self.bar = total_steps, show, None
        self.first, self.started = 0, time.monotonic()

    def start(self, first_step: int) -> None:
        """The clock starts, `first_step` steps being done already."""
        self.first, self.started = first_step, time.monotonic()
        if self.show and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def report(self, step: int, where: str, **values: str) -> None:
        """Shows the values of the last steps; `where` is like "epoch 3", `step` steps of the total are done."""
        if self.bar is not None:
            self.bar.set_description(where)
            self.bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in values.items()))
            return
        done = max(1, step - self.first)
        left = (time.monotonic() - self.started) / done * (self.total - step)
        text = "  ".join(f"{k} {v}" for k, v in values.items())
        self.say(f"{where}  step {step}/{self.total}  {text}  left {readable_time(left)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.show:
            with suppress(OSError):  # a full disk behind it, or nobody at the other end: the run goes on
                tqdm.write(text, file=sys.stderr if self.bar is not None else sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line on stderr from any rank: something a person should know of."""
        with suppress(OSError):
            tqdm.write(text, file=sys.stderr)

    def say_error(self, text: str) -> None:
        """A line on stderr of what all ranks know of, so one of them tells it."""
        if self.show:
            self.warn(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class RunLog:
    """log.txt (a JSON object an epoch) in `output_dir`, TensorBoard in `log_dir`; either may be ''.

    A disk that is full or fails costs entries and not the run: `warn` is told once, until writing works again.
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
            self._curve(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))

    def picture(self, epoch: int, picture: np.ndarray) -> None:
        """A picture (H,W,3) uint8, in TensorBoard and as pictures/epoch-<epoch>.png."""
        self._curve(lambda writer: writer.add_image("clips", picture, epoch + 1, dataformats="HWC"))
        if self.output_dir is not None:
            with self._unless_disk_fails(self.output_dir / "pictures"):
                (self.output_dir / "pictures").mkdir(exist_ok=True)
                Image.fromarray(picture).save(self.output_dir / "pictures" / f"epoch-{epoch:04d}.png")

    def epoch(self, values: dict) -> None:
        if self.output_dir is not None:
            with (
                self._unless_disk_fails(self.output_dir / "log.txt"),
                (self.output_dir / "log.txt").open("a") as f,
            ):
                f.write(json.dumps(values) + "\n")

    def _curve(self, write: Callable[[SummaryWriter], None]) -> None:
        if not self.log_dir:
            return
        with self._unless_disk_fails(Path(self.log_dir)):
            writer, self.writer = self.writer or SummaryWriter(self.log_dir), None
            write(writer)
            self.writer = writer  # where it failed its thread has ended, and the next entry tries a new one

    @contextmanager
    def _unless_disk_fails(self, what: Path) -> Iterator[None]:
        try:
            yield
            self.failing.discard(what)
        except OSError as error:
            if what not in self.failing:
                self.warn(f"{what} could not be written ({error}): entries are lost, the training goes on")
            self.failing.add(what)

    def close(self) -> None:
        if self.writer is not None:
            self._curve(SummaryWriter.close)
            self.writer = None


class Progress:
    """The books of one epoch of training: means, time, unreadable videos, skipped steps.

    Reading the device's numbers is the loop's only host synchronisation; it happens every `log_freq` steps.

    Args:
        bad_videos, bad_batches, bad_steps: the run's books of what went wrong.
        max_bad_steps: so many steps skipped in a row end the run.
        state: of an earlier `state_dict`, for an epoch that is resumed within.
    """

    def __init__(
        self,
        *,
        world: World,
        console: Console,
        log: RunLog,
        epoch: int,
        bad_videos: BadVideos,
        bad_batches: BadBatches,
        bad_steps: BadSteps,
        max_bad_steps: int = 10,
        log_freq: int = 20,
        state: dict | None = None,
    ):
        self.world, self.console, self.log = world, console, log
        self.epoch, self.log_freq, self.max_bad_steps = epoch, log_freq, max_bad_steps
        self.bad_videos, self.bad_batches, self.bad_steps = bad_videos, bad_batches, bad_steps
        self.meters = Meters(world.device)
        self.totals: dict[str, float] = {}  # sums over the epoch's steps of all ranks
        self.count = self.replaced = self.skipped = 0
        self.seconds = 0.0
        if state:
            self.totals, self.count = dict(state["totals"]), state["count"]
            self.replaced, self.skipped, self.seconds = state["replaced"], state["skipped"], state["seconds"]
        self.skipped_before = self.bad_steps.read()[0]
        self._start_interval()

    def _start_interval(self) -> None:
        self.meters.reset()
        self.bad_batches.forget()
        self.clips, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.replaced_here = 0

    def batches(self, loader: Iterable[dict], first: int = 0) -> Iterator[tuple[int, dict]]:
        """The loader's batches with their number in the epoch, from `first`; the time to get them is the wait."""
        batches = iter(loader)
        for index in itertools.count(first):
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            watchdog.tick(f"epoch {self.epoch}, batch {index}", self.epoch, index)
            self.bad_videos.add(batch["bad"])
            self.replaced_here += len(batch["bad"])
            yield index, batch

    def add(self, batch: dict, **values: Tensor) -> None:
        """Adds one batch of this rank, and 0-dimensional tensors of the same names every time, one being loss."""
        self.meters.add(**values)
        self.bad_batches.add(values["loss"], batch["index"])
        self.clips += len(batch["clips"]) * self.world.size

    def step_done(self, step: int, *, last: bool, lr: float, **scalars: Tensor | float) -> None:
        """Counts one optimiser step; reads and reports every `log_freq` steps and after the epoch's last.

        Args:
            step: its number in the whole run, from 0.
            scalars: further values of this step for TensorBoard, read only when it is reported.

        Raises:
            FloatingPointError: too many steps in a row had a loss that is not finite.
            TooManyBadVideos: too many videos of the list are unreadable.
        """
        self.console.advance()
        self.bad_batches.step_done(step, self.bad_steps.last)
        if (step + 1) % self.log_freq and not last:
            return
        means, skipped = self._read()
        counts = {"skipped_steps": skipped, "bad_videos": len(self.bad_videos)}
        self.log.scalars(step + 1, {**means, **counts, "lr": lr, **{k: float(v) for k, v in scalars.items()}})
        self.console.report(
            step + 1,
            f"epoch {self.epoch}",
            loss=f"{means.get('loss_reconstruction', means['loss']):.4f}",
            lr=f"{lr:.2e}",
            clips_s=f"{means['clips_per_second']:.1f}",
            data=f"{means['data_wait']:.0%}",
            mem=f"{memory_gib(self.world.device):.2f}G",
            **({"skipped": str(skipped)} if skipped else {}),
        )

    def _read(self) -> tuple[dict[str, float], int]:
        """The means since the last reading, and the steps skipped since then; adds both to the epoch's."""
        seconds = time.perf_counter() - self.started
        means, count, (pending, replaced) = self.meters.read(self.bad_videos.pending, self.replaced_here)
        means |= {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}
        self.count, self.seconds = self.count + count, self.seconds + seconds
        self.replaced += int(replaced)
        for name, value in means.items() if count else ():
            self.totals[name] = self.totals.get(name, 0.0) + count * value
        for path, reason in self.bad_videos.share() if pending else []:
            self.console.say_error(f"unreadable video, replaced by another: {path}: {reason}")
        skipped = self._check_steps()
        self._start_interval()
        return means, skipped

    def _check_steps(self) -> int:
        """How many steps were skipped since the last reading; writes down their videos."""
        total, _, longest = self.bad_steps.read()
        skipped, self.skipped_before = total - self.skipped_before, total
        self.skipped += skipped
        if skipped:
            self.bad_batches.write()
        if longest >= self.max_bad_steps:
            listed = f" (their videos: {self.bad_batches.file})" if self.bad_batches.file else ""
            raise FloatingPointError(
                f"the loss was not finite in {longest} steps in a row of epoch {self.epoch}{listed}; they were "
                "skipped, the last checkpoint is untouched: lower --lr, set --clip_grad, or use --amp bf16 or off"
            )
        return skipped

    def state_dict(self) -> dict:
        """What a run needs to go on within the epoch; all ranks call it together."""
        self._read()
        return {
            "totals": self.totals,
            "count": self.count,
            "replaced": self.replaced,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }

    def epoch_means(self) -> dict[str, float]:
        """Means of the epoch over steps and ranks, its seconds, its skipped steps and replaced videos.

        `bad_videos` are the different unreadable ones of the whole run until now.
        """
        means = {name: total / self.count for name, total in self.totals.items()}
        counts = {"skipped_steps": self.skipped, "replaced": self.replaced, "bad_videos": len(self.bad_videos)}
        return means | {"seconds": self.seconds} | counts
