"""The pre-training loop: one epoch of masking, reconstructing and stepping."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from augment import normalize, to_pixels
from optim import Engine
from runs.logs import Progress
from targets import Losses
from utils import World, seed_all


def mask_numbers(batch: int, num_draws: int, *, clips_a_video: int, seed: tuple[int, ...], world: World) -> Tensor:
    """The random numbers (batch, num_draws) that the masks of this rank's clips are drawn from.

    They are rows of those of all ranks' clips together, drawn alike on every rank: so the masks of a step are
    the same for any number of processes with the same total batch, and each clip has its own.
    """
    seed_all(*seed)
    videos = batch // clips_a_video * world.size
    numbers = torch.rand(videos, clips_a_video, num_draws, device=world.device)
    return numbers[world.rank :: world.size].flatten(0, 1)


def pretrain_one_epoch(
    engine: Engine,
    loader: Iterable[dict],
    *,
    num_batches: int,
    first_batch: int = 0,
    clips_a_video: int = 1,
    losses: Losses,
    normalization: tuple[tuple, tuple],
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
    progress: Progress,
    step_done: Callable[[int], None] = lambda batches: None,
) -> dict[str, float]:
    """Trains on the batches of the loader, as those of the epoch of `progress` from `first_batch` on.

    Args:
        loader: batches with `clips` uint8 (B,3,T,H,W), `index`, the numbers of their videos, and `bad`, the (path,
            reason) of unreadable ones. The clips of one video, `clips_a_video`, stand side by side.
        num_batches: batches an epoch, from which the number of the optimiser step follows.
        normalization: channel means and standard deviations of the model's input.
        schedule: optimiser step -> (learning rate, weight decay).
        seed: with the batch's number (and for dropout the rank) it decides masks and dropout.
        step_done: called after every optimiser step with the batches of the epoch that are done; may raise.

    Returns:
        Means of the epoch over all steps and ranks, and what went wrong (`Progress.epoch_means`).

    Raises:
        FloatingPointError: the loss stays not finite.
        TooManyBadVideos: too many videos are unreadable.
    """
    engine.module.train()
    num_draws, world = engine.module.masking.num_draws, progress.world
    for index, batch in progress.batches(loader, first_batch):
        # schedule
        batch_index = progress.epoch * num_batches + index
        step = batch_index // engine.update_freq
        lr, weight_decay = schedule(step)
        engine.set_schedule(lr, weight_decay)

        # batch
        clips = batch["clips"].to(engine.device, non_blocking=True)  # (B,3,T,H,W) uint8
        pixels = to_pixels(clips)  # float32 in [0,1]
        uniform = mask_numbers(
            len(clips), num_draws, clips_a_video=clips_a_video, seed=(seed, batch_index), world=world
        )
        seed_all(seed, batch_index, world.rank)

        # forward and losses
        output = engine(normalize(pixels, *normalization), uniform=uniform)
        values = losses(output, pixels)

        # step
        engine.backward(values["loss"])
        progress.add(batch, **values)
        if engine.step():
            norms = {f"grad_norm_{name}": norm for name, norm in engine.grad_norms.items()}
            last = index + 1 == num_batches
            progress.step_done(step, last=last, lr=lr, weight_decay=weight_decay, **norms)
            step_done(index + 1)
    return progress.epoch_means() | {
        "lr": schedule((progress.epoch + 1) * num_batches // engine.update_freq - 1)[0]
    }
