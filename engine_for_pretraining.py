"""The pre-training loop: masking, reconstructing and stepping, epoch by epoch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from augment import Colours, normalize, to_pixels
from runs.engine import Engine
from runs.training import TrainingRun
from targets import Losses
from utils import World, seed_all


def mask_numbers(batch: int, num_draws: int, *, clips_a_video: int, seed: tuple[int, ...], world: World) -> Tensor:
    """The random numbers (batch,num_draws) that the masks of this rank's clips are drawn from.

    They are this rank's rows of those of all ranks' clips, which every rank draws alike: so the masks of a step
    are the same for any number of processes with the same total batch, and each clip has its own.
    """
    seed_all(*seed)
    videos = batch // clips_a_video * world.size
    numbers = torch.rand(videos, clips_a_video, num_draws, device=world.device)
    return numbers[world.rank :: world.size].flatten(0, 1)


def pretrain(
    run: TrainingRun,
    engine: Engine,
    loader: DataLoader,
    *,
    losses: Losses,
    colours: Colours,
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Trains the epochs that are left of a run, with a log entry and perhaps a checkpoint after each.

    Args:
        loader: batches with `clips` uint8 (B,3,T,H,W), `index`, the numbers of their videos, and `bad`, the (path,
            reason) of unreadable ones. The clips of one video stand side by side.
        colours: channel means and standard deviations of the model's input.
        schedule: optimiser step -> (learning rate, weight decay).
        seed: with the batch's number (and for dropout the rank) it decides masks and dropout.
        after_epoch: called with each finished epoch, e.g. to draw pictures.

    Raises:
        TrainingDiverged, TooManyBadVideos, Stopped: see `TrainingRun`.
    """
    run.start()
    for epoch in range(run.resumed.epoch, run.epochs):
        pretrain_one_epoch(
            run, engine, loader, epoch=epoch, losses=losses, colours=colours, schedule=schedule, seed=seed
        )
        run.log.epoch({"epoch": epoch, **run.end_epoch(), "lr": schedule(run.last_step)[0]})
        run.save_epoch()
        after_epoch(epoch)
    run.finish()


def pretrain_one_epoch(
    run: TrainingRun,
    engine: Engine,
    loader: DataLoader,
    *,
    epoch: int,
    losses: Losses,
    colours: Colours,
    schedule: Callable[[int], tuple[float, float]],
    seed: int,
) -> None:
    """Trains what is left of one epoch; arguments as in `pretrain`."""
    engine.module.train()
    num_draws = engine.module.masking.num_draws
    first_batch = run.start_epoch(epoch)
    for index, batch in enumerate(loader, start=first_batch):
        run.start_batch(index, batch)

        # schedule
        number = run.batch_number(index)
        lr, weight_decay = schedule(run.step_number(index))
        engine.set_schedule(lr, weight_decay)

        # batch
        clips = batch["clips"].to(engine.device, non_blocking=True)  # (B,3,T,H,W) uint8
        pixels = to_pixels(clips)  # (B,3,T,H,W) float32 in [0,1]
        clips_a_video = len(clips) // len(batch["index"])
        uniform = mask_numbers(
            len(clips), num_draws, clips_a_video=clips_a_video, seed=(seed, number), world=run.world
        )  # (B,num_draws)
        seed_all(seed, number, run.world.rank)

        # forward and losses
        output = engine(normalize(pixels, *colours), uniform=uniform)
        values = losses(output, pixels)

        # step
        engine.backward(values["loss"])
        run.end_batch(batch, values)
        if engine.step():
            run.end_step(index, lr=lr, weight_decay=weight_decay)
