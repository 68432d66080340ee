"""What both programs build alike from their shared flags."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from clips.decoders import resolve_decoder
from clips.lists import VideoList
from datasets import ClipSettings
from loaders import EpochSampler, LoadSettings, usable_workers
from optim import cosine_schedule, create_optimizer
from runs.bad_batches import BadBatches
from runs.bad_videos import BadVideos
from runs.console import Console
from runs.engine import Engine, resolve_amp
from runs.faults import Faults
from runs.flags import Flags
from runs.logs import RunLog
from runs.processes import start_world
from runs.reporters import open_reporters
from runs.resuming import resume
from runs.saving import Checkpoints
from runs.signals import StopSignals, Votes
from runs.training import TrainingRun
from utils import World, compute_deterministically, counted

Schedule = Callable[[int], tuple[float, float]]  # optimiser step -> learning rate, weight decay

# A fifth of the lowest peak rate of a published recipe, which is UCF101's 2.25e-4 (pre-training, 3200 epochs).
LEAST_PEAK = 4.5e-5


def rate_scale(args: argparse.Namespace, world: World) -> float:
    """What the flags' learning rates are multiplied by: total batch / 256."""
    return args.batch_size * args.update_freq * world.size / 256


def warn_of_low_rate(args: argparse.Namespace, world: World, console: Console) -> None:
    """Warns of a peak rate far below all published ones: the default is meant for the total batch of many GPUs.

    Only AdamW's rates are known.
    """
    scale, lr = rate_scale(args, world), max(getattr(args, "probe_lrs", None) or [args.lr])
    if args.opt.lower() == "adamw" and lr * scale < LEAST_PEAK:
        more = f"accumulate batches (--update_freq; the total batch is {256 * scale:g}) or " * (scale < 1)
        console.warn_once(
            f"the peak learning rate of {lr * scale:.2g} is too low to learn much, the published runs have 2.2e-4 "
            f"to 2.4e-3: {more}raise --lr"
        )


def build_schedule(args: argparse.Namespace, world: World, batches_per_epoch: int) -> Schedule:
    """The schedule of learning rate and weight decay; rates are the flags' times total batch / 256."""
    scale = rate_scale(args, world)
    steps_per_epoch = batches_per_epoch // args.update_freq
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = args.warmup_steps if args.warmup_steps > 0 else round(args.warmup_epochs * steps_per_epoch)
    decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end

    def schedule(step: int) -> tuple[float, float]:
        lr = cosine_schedule(
            step,
            start=args.warmup_lr * scale,
            peak=args.lr * scale,
            final=args.min_lr * scale,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            kind=args.schedule,
        )
        return lr, cosine_schedule(step, peak=args.weight_decay, final=decay_end, total_steps=total_steps)

    return schedule


class Session(NamedTuple):
    """A started program: its flags, its place among the processes, and what it prints, logs and listens to."""

    args: argparse.Namespace
    flags: Flags
    world: World
    console: Console
    log: RunLog
    signals: StopSignals
    num_workers: int  # that decode, of this process
    to_close: ExitStack  # closes what must be closed before the processes part

    def clips(self, **settings) -> ClipSettings:
        """The settings of clips, as far as both programs take them from the same flags; `settings` are the others."""
        args = self.args
        return ClipSettings(
            sampling_rate=args.sampling_rate,
            num_sample=args.num_sample,
            seed=args.seed,
            decoder=args.decoder,
            decode_timeout=args.decode_timeout,
            **settings,
        )

    @property
    def loading(self) -> LoadSettings:
        args = self.args
        return LoadSettings(
            batch_size=args.batch_size,
            update_freq=args.update_freq,
            num_workers=self.num_workers,
            pin_memory=args.pin_mem,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def describe(self, engine: Engine, *, model: str, videos: str) -> None:
        """Prints a run's first lines: the model, the data, and the batch arithmetic."""
        args, size = self.args, self.world.size
        trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad) / 1e6
        precision = str(engine.amp or torch.float32).removeprefix("torch.")
        total, decoder = args.batch_size * args.update_freq * size, resolve_decoder(args.decoder)
        self.console.say(
            f"{args.model}, {trained:.2f} M trained parameters, {model}\n"
            f"{videos} of {args.data_path}, decoder {decoder}, {counted(self.num_workers, 'data worker')} a process\n"
            f"on {self.world.device} in {precision}\n"
            f"{counted(size, 'process')} x {counted(args.batch_size, 'video')} x {counted(args.update_freq, 'batch')} "
            f"a step = {total}, {counted(args.num_sample, 'clip')} a video\n"
            f"learning rate {args.lr} x {total}/256 = {args.lr * total / 256:.3g}"
        )


def open_session(
    args: argparse.Namespace, flags: Flags, signals: StopSignals, to_close: ExitStack, *, most_workers: int
) -> Session:
    """Joins the job's other processes, and opens the console and the log.

    Args:
        most_workers: see `usable_workers`.
    """
    if args.deterministic:
        compute_deterministically()
    world = start_world(
        args.device,
        args.dist_url,
        args.world_size,
        local_rank=args.local_rank,
        itp=args.dist_on_itp,
        dist_timeout=args.dist_timeout,
    )
    console, log = Console(total_steps=0, show=world.is_main), RunLog(output_dir="")
    if world.is_main:
        folders = {"output_dir": args.output_dir, "log_dir": args.log_dir or args.output_dir}
        reporters = open_reporters(args.report_to, **folders, resumes=args.auto_resume)
        log = RunLog(output_dir=args.output_dir, reporters=reporters, warn=console.warn)
    to_close.callback(log.close)
    log.command(["python", flags.prog, *flags.words], processes=world.size)
    workers = usable_workers(most_workers) if args.num_workers is None else args.num_workers
    return Session(args, flags, world, console, log, signals, workers, to_close)


def build_engine(
    args: argparse.Namespace, model: nn.Module, world: World, *, layer_decay: float | None = None, **settings
) -> Engine:
    """The model with its optimiser and precision; `settings` go to `Engine`."""
    optimizer = create_optimizer(
        model,
        opt=args.opt,
        lr=args.lr,
        weight_decay=args.weight_decay,
        layer_decay=layer_decay,
        eps=args.opt_eps,
        betas=args.opt_betas,
        momentum=args.momentum,
    )
    settings |= {
        "device": world.device,
        "amp": resolve_amp(args.amp, world.device),
        "update_freq": args.update_freq,
        "clip_grad": args.clip_grad,
        "compress": args.compress_gradients,
        "compile_model": args.compile,
    }
    if args.enable_deepspeed:
        from runs.deepspeed_engine import DeepSpeedEngine  # takes seconds to import

        return DeepSpeedEngine(model, optimizer, zero_stage=args.zero_stage, **settings)
    return Engine(model, optimizer, distributed=world.size > 1, **settings)


def build_run(
    session: Session,
    engine: Engine,
    sampler: EpochSampler,
    *,
    model_settings: dict,
    videos: VideoList,
    num_read: int,
    class_names: Sequence[str] = (),
    save: bool = True,
) -> TrainingRun:
    """Resumes a checkpoint if there is one, and builds what accompanies the training.

    Args:
        videos: of training.
        num_read: number of all videos that are read, of which some may be unreadable.
        class_names: of a classifier, by number, where they are known; kept in every checkpoint.
        save: whether to write checkpoints.
    """
    args, world, console = session.args, session.world, session.console
    warn_of_low_rate(args, world, console)
    about = {"args": vars(args), "model_settings": model_settings, "class_names": list(class_names)}
    shared = {"engine": engine, "sampler": sampler, "world": world, "console": console}
    start = resume(**shared, about=about, neutral=session.flags.neutral, given=session.flags.given)
    session.log.settings(vars(args))
    votes = Votes(timeout=1.5 * args.dist_timeout)  # longer than the watchdog's limit, which reports more
    session.to_close.callback(votes.close)
    how = {"minutes": args.save_ckpt_minutes, "keep": args.keep_ckpts, "signals": session.signals, "votes": votes}
    checkpoints = Checkpoints(**shared, output_dir=args.output_dir if save else "", about=about, **how)
    record = {"output_dir": args.output_dir, "warn": console.warn}
    bad_videos = BadVideos(num_videos=num_read, limit=args.max_bad_videos, is_main=world.is_main, **record)
    bad_batches = BadBatches(videos=videos, world=world, **record)
    return TrainingRun(
        **shared,
        epochs=args.epochs,
        resumed=start,
        log=session.log,
        checkpoints=checkpoints,
        faults=Faults(bad_videos, bad_batches, engine.bad_steps, args.max_bad_steps, console),
        log_freq=args.log_freq,
        save_freq=args.save_ckpt_freq,
    )
