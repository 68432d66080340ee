"""What a run tells: meters on the device, the console, log.txt and TensorBoard."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils import World, sum_over_ranks


class Meters:
    """Running means of device scalars: adding costs no synchronisation, `read` costs one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, **values: Tensor) -> None:
        """Adds one step's 0-dimensional tensors; the names must be the same in every step."""
        self.names = list(values)
        step = torch.stack([v.detach().to(self.device, torch.float64).reshape(()) for v in values.values()])
        self.total = self.total + step
        self.count += 1

    def read(self) -> dict[str, float]:
        """Means over the steps since the last `reset`, over all ranks (every rank must call it)."""
        if not self.count:
            return {}
        total = self.total / self.count
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return dict(zip(self.names, total.tolist(), strict=True))


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
            tqdm.write(text, file=sys.stderr if self.bar is not None else sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line on stderr from any rank: something a person should know of."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class RunLog:
    """log.txt (a JSON object an epoch) in `output_dir`, TensorBoard in `log_dir`; either may be ''."""

    def __init__(self, *, output_dir: str, log_dir: str, show: bool = True):
        self.file = Path(output_dir) / "log.txt" if output_dir and show else None
        self.writer = SummaryWriter(log_dir) if log_dir and show else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        """A picture (H,W,3) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def epoch(self, values: dict) -> None:
        if self.file is not None:
            with self.file.open("a") as f:
                f.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Progress:
    """The books of one epoch of training: means since the last reading, means of the epoch, time, bad videos.

    Reading the device's numbers is the loop's only host synchronisation; it happens every `log_freq` steps.
    """

    def __init__(self, *, world: World, console: Console, log: RunLog, epoch: int, log_freq: int = 20):
        self.world, self.console, self.log = world, console, log
        self.epoch, self.log_freq = epoch, log_freq
        self.meters = Meters(world.device)
        self.epoch_totals: dict[str, float] = {}
        self.epoch_count = self.num_bad = 0
        self.epoch_started = time.perf_counter()
        self._start_interval()

    def _start_interval(self) -> None:
        self.meters.reset()
        self.clips, self.waited, self.started = 0, 0.0, time.perf_counter()

    def batches(self, loader: Iterable[dict]) -> Iterable[dict]:
        """The loader's batches; the time that it takes to get them is the wait for data."""
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            for path, reason in batch["bad"]:
                self.num_bad += 1
                self.console.warn(f"unreadable video, replaced by another: {path}: {reason}")
            yield batch

    def add(self, num_clips: int, **values: Tensor) -> None:
        """Adds one batch: its clips on this rank, and 0-dimensional tensors of the same names every time."""
        self.meters.add(**values)
        self.clips += num_clips * self.world.size

    def step_done(self, step: int, *, last: bool, lr: float, **scalars: Tensor | float) -> None:
        """Counts one optimiser step; reads and reports every `log_freq` steps and after the epoch's last.

        Args:
            step: its number in the whole run, from 0.
            scalars: further values of this step for TensorBoard, read only when it is reported.

        Raises:
            FloatingPointError: the mean loss since the last reading is not finite.
        """
        self.console.advance()
        if (step + 1) % self.log_freq and not last:
            return
        count, means = self.meters.count, self.meters.read()
        seconds = time.perf_counter() - self.started
        means |= {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}
        self.epoch_count += count
        for name, value in means.items():
            self.epoch_totals[name] = self.epoch_totals.get(name, 0.0) + count * value
        self.log.scalars(step + 1, {**means, "lr": lr, **{k: float(v) for k, v in scalars.items()}})
        self.console.report(
            step + 1,
            f"epoch {self.epoch}",
            loss=f"{means.get('loss_reconstruction', means['loss']):.4f}",
            lr=f"{lr:.2e}",
            clips_s=f"{means['clips_per_second']:.1f}",
            data=f"{means['data_wait']:.0%}",
            mem=f"{memory_gib(self.world.device):.2f}G",
        )
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {step + 1} of epoch {self.epoch}: lower --lr, set "
                "--clip_grad, or use --amp bf16 or off; the last checkpoint is untouched"
            )
        self._start_interval()

    def epoch_means(self) -> dict[str, float]:
        """Means of the epoch over steps and ranks, its seconds, and the unreadable videos met by all ranks."""
        means = {name: total / self.epoch_count for name, total in self.epoch_totals.items()}
        bad = int(sum_over_ranks(self.num_bad, self.world.device))
        return means | {"seconds": time.perf_counter() - self.epoch_started, "bad_videos": bad}
