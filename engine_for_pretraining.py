"""The pre-training loop: one epoch of masking, reconstructing and stepping."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from augment import normalize, to_pixels
from modeling_pretrain import PretrainOutput
from optim import Engine
from targets import reconstruction_error, reconstruction_targets, sampling_loss
from utils import Console, Meters, RunLog, World, memory_gib, seed_all, sum_over_ranks


@dataclass(frozen=True)
class Losses:
    """The two losses of AdaMAE (section 3.2): L = L_R + weight * L_S.

    Args:
        patch: pixels per side of a token.
        normalize_target: standardise the target of each token and channel by its own pixels.
        loss: "mse" or "l1"; `sampling_form`: "log" or "linear", as in `targets`.
    """

    patch: int
    normalize_target: bool = True
    loss: str = "mse"
    sampling_form: str = "log"
    sampling_weight: float = 1e-4

    def __call__(self, output: PretrainOutput, pixels: Tensor) -> dict[str, Tensor]:
        """Named device scalars; `loss` is the one to minimise. Pixels are (B,3,T,H,W) in [0,1]."""
        target = reconstruction_targets(pixels, output.masked, self.patch, normalize=self.normalize_target)
        error = reconstruction_error(output.prediction, target, self.loss)  # (B,Nm)
        loss_r = error.mean()
        if output.log_probs is None:
            return {"loss": loss_r, "loss_reconstruction": loss_r}

        log_p = output.log_probs  # (B,N)
        loss_s = self.sampling_weight * sampling_loss(log_p, output.masked, error, self.sampling_form)
        probs = log_p.detach().exp()
        return {
            "loss": loss_r + loss_s,
            "loss_reconstruction": loss_r,
            "loss_sampling": loss_s,
            "probs_entropy": -(probs * log_p.detach()).sum(1).mean() / math.log(log_p.shape[1]),
            "probs_max": probs.amax(1).mean(),
        }


def pretrain_one_epoch(
    engine: Engine,
    loader: Iterable[dict],
    *,
    epoch: int,
    num_batches: int,
    losses: Losses,
    normalization: tuple[tuple, tuple],
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
    world: World,
    console: Console,
    log: RunLog,
    log_freq: int = 20,
) -> dict[str, float]:
    """Trains on every batch of the loader once.

    Args:
        loader: batches with `clips` uint8 (B,3,T,H,W) and `bad`, the (path, reason) of unreadable videos.
        num_batches: batches an epoch, from which the number of the optimiser step follows.
        normalization: channel means and standard deviations of the model's input.
        schedule: optimiser step -> (learning rate, weight decay).

    Returns:
        Means of the epoch over all steps and ranks, and the number of unreadable videos met.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    interval = Interval(world.device)
    epoch_means = EpochMeans()
    num_bad = 0
    engine.module.train()
    for index, batch in enumerate(interval.timed(loader)):
        # schedule
        batch_index = epoch * num_batches + index
        step = batch_index // engine.update_freq
        lr, weight_decay = schedule(step)
        engine.set_schedule(lr, weight_decay)
        seed_all(seed, batch_index, world.rank)

        # batch
        clips = batch["clips"].to(world.device, non_blocking=True)  # (B,3,T,H,W) uint8
        pixels = to_pixels(clips)  # float32 in [0,1]
        for path, reason in batch["bad"]:
            num_bad += 1
            console.warn(f"unreadable video, replaced by another: {path}: {reason}")

        # forward and losses
        output = engine(normalize(pixels, *normalization))
        values = losses(output, pixels)

        # step
        engine.backward(values["loss"])
        interval.meters.add(**values)
        interval.clips += len(clips) * world.size
        if not engine.step():
            continue
        console.advance()

        # log
        if (step + 1) % log_freq == 0 or index + 1 == num_batches:
            count, means = interval.read()
            epoch_means.add(count, means)
            norms = {f"grad_norm_{k}": v.item() for k, v in engine.grad_norms.items()}
            log.scalars(step + 1, {**means, **norms, "lr": lr, "weight_decay": weight_decay})
            console.report(
                step + 1,
                epoch,
                loss=f"{means['loss_reconstruction']:.4f}",
                lr=f"{lr:.2e}",
                clips_s=f"{means['clips_per_second']:.1f}",
                data=f"{means['data_wait']:.0%}",
                mem=f"{memory_gib(world.device):.2f}G",
            )
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"the loss is {means['loss']} at step {step + 1} of epoch {epoch}: lower --lr, set "
                    "--clip_grad, or use --amp bf16 or off; the last checkpoint is untouched"
                )
    return {**epoch_means.read(), "lr": lr, "bad_videos": sum_over_ranks(num_bad, world.device)}


class Interval:
    """What is gathered between two readings: means on the device, clips seen, time waited for data."""

    def __init__(self, device: torch.device):
        self.meters = Meters(device)
        self.reset()

    def reset(self) -> None:
        self.meters.reset()
        self.clips, self.waited, self.started = 0, 0.0, time.perf_counter()

    def timed(self, loader: Iterable[dict]) -> Iterable[dict]:
        """The loader's batches; the time it takes to get them is the wait for data."""
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def read(self) -> tuple[int, dict[str, float]]:
        """The number of steps since the last reading and their means: the only host synchronisation."""
        count, means = self.meters.count, self.meters.read()
        seconds = time.perf_counter() - self.started
        means |= {"clips_per_second": self.clips / seconds, "data_wait": self.waited / seconds}
        self.reset()
        return count, means


class EpochMeans:
    """Means over an epoch from the means of its intervals."""

    def __init__(self):
        self.count, self.totals = 0, {}

    def add(self, count: int, means: dict[str, float]) -> None:
        self.count += count
        for name, value in means.items():
            self.totals[name] = self.totals.get(name, 0.0) + count * value

    def read(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.totals.items()}
