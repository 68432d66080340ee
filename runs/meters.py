"""Running means of device scalars, and what one epoch of training adds up to."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor


class Meters:
    """Running means of device scalars: adding costs no synchronisation, `read` costs one.

    A step with a non-finite value is left out.
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
        """Reduces over all ranks, which must call it together, what was added since the last `reset`.

        Returns:
            The means (NaN where no step was finite), how many steps they cover, and the sums of `numbers`.
        """
        total = torch.cat([self.total, torch.tensor(numbers, dtype=torch.float64, device=self.device)])
        if dist.is_initialized():
            dist.all_reduce(total)
        *sums, count = total[: len(self.names) + 1].tolist()
        means = {name: value / count if count else math.nan for name, value in zip(self.names, sums, strict=True)}
        return means, int(count), total[len(self.names) + 1 :].tolist()


class EpochStatistics:
    """Means, durations and counts of one epoch, read from the device once per interval.

    An epoch that is resumed midway starts from the `state` of an earlier `state_dict`.
    """

    def __init__(self, device: torch.device, state: dict | None = None):
        self.meters = Meters(device)
        state = state or {"totals": {}, "count": 0, "replaced": 0, "skipped": 0, "seconds": 0.0}
        self.totals = dict(state["totals"])  # sums over the epoch's steps of all ranks
        self.count, self.replaced, self.skipped = state["count"], state["replaced"], state["skipped"]
        self.seconds = state["seconds"]
        self.start_interval()

    def start_interval(self) -> None:
        self.meters.reset()
        self.clips = self.replaced_here = 0
        self.waited, self.started = 0.0, time.perf_counter()

    def read_interval(self, pending: int) -> tuple[dict[str, float], int]:
        """Ends the interval; all ranks call it together.

        Args:
            pending: a number of this rank to sum over all ranks in the same reduction.

        Returns:
            The interval's means with `clips_per_second` and `data_wait`, and the sum of `pending`.
        """
        seconds = time.perf_counter() - self.started
        means, count, (pending, replaced) = self.meters.read(pending, self.replaced_here)
        means |= {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}
        self.count, self.seconds = self.count + count, self.seconds + seconds
        self.replaced += int(replaced)
        for name, value in means.items() if count else ():
            self.totals[name] = self.totals.get(name, 0.0) + count * value
        return means, int(pending)

    def state_dict(self) -> dict:
        names = ("totals", "count", "replaced", "skipped", "seconds")
        return {name: getattr(self, name) for name in names}

    def means(self) -> dict[str, float]:
        """Means of the epoch over steps and ranks, its skipped steps, replaced videos and seconds."""
        means = {name: total / self.count for name, total in self.totals.items()}
        return means | {"skipped_steps": self.skipped, "replaced": self.replaced, "seconds": self.seconds}
