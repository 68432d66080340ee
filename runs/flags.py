"""The flags that both programs have, and what follows from them. Names are VideoMAE's."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import nn

from clips.decoders import resolve_decoder
from clips.lists import VideoList
from optim import Engine, cosine_schedule, create_optimizer, resolve_amp
from runs.bad_steps import BadBatches
from runs.bad_videos import BadVideos
from runs.logs import Console
from runs.processes import start_world
from utils import World


def boolean(text: str) -> bool:
    """A flag's true or false, as people write it."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


ON_OFF = {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}


# fmt: off
def common_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the shared flags; the program sets the defaults in which the two differ."""
    parser = argparse.ArgumentParser(program, description=description,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    add = parser.add_argument_group("run").add_argument
    add("--batch_size", default=64, type=int, help="videos per process and forward pass")
    add("--epochs", type=int, help="the true number of epochs (the published scripts add one)")
    add("--update_freq", default=1, type=int, help="batches accumulated into one optimiser step")
    add("--save_ckpt_freq", type=int, help="epochs between checkpoints; the last is always saved")
    add("--save_ckpt_minutes", default=15.0, type=float, help="minutes between checkpoint-last.pth; 0: never")
    add("--keep_ckpts", default=0, type=int, help="newest checkpoints of epochs to keep; 0: all")
    add("--max_bad_steps", default=10, type=int, help="steps in a row without a finite loss that end the run")
    add("--seed", default=0, type=int, help="with epoch, step, video and rank it decides all that is random")
    add("--start_epoch", default=0, type=int, help="first epoch of a run that resumes nothing")
    add("--resume", default="", help="checkpoint to go on from")
    add("--auto_resume", default=True, action="store_true", help="go on from the newest one in --output_dir")
    add("--no_auto_resume", dest="auto_resume", action="store_false", help="start afresh")

    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", default="adamw", help="any name timm knows")
    add("--opt_eps", default=1e-8, type=float, help="epsilon")
    add("--opt_betas", default=None, type=float, nargs="+", help="betas (default: the optimiser's)")
    add("--clip_grad", default=None, type=float, help="largest norm of the gradient (default: no limit)")
    add("--momentum", default=0.9, type=float, help="of SGD")
    add("--weight_decay", default=0.05, type=float, help="weight decay")
    add("--weight_decay_end", default=None, type=float, help="at the end of a cosine (default: the same)")
    add("--lr", type=float, help="peak learning rate; times total batch / 256")
    add("--warmup_lr", default=0.0, type=float, help="where the warm-up starts, scaled likewise")
    add("--min_lr", type=float, help="where the cosine ends, scaled likewise")
    add("--warmup_epochs", type=int, help="epochs of linear warm-up")
    add("--warmup_steps", default=-1, type=int, help="optimiser steps of warm-up, instead of epochs")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--enable_deepspeed", action="store_true", help="share the optimiser's state between processes")
    add("--zero_stage", default=1, type=int, choices=[0, 1, 2], help="2: share the gradients too")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="", help="list of videos, or the folder of three lists (DATASET.md)")
    add("--data_root", default=None, help="folder that relative paths start from (default: the list's)")
    add("--decoder", default="auto", choices=["auto", "torchcodec", "decord", "pyav"], help="video decoder")
    add("--num_frames", default=16, type=int, help="frames of a clip")
    add("--sampling_rate", default=4, type=int, help="frames of the video from one frame to the next")
    add("--num_sample", type=int, help="clips of one video per decoding")
    add("--train_interpolation", choices=["bilinear", "bicubic"], help="of training transforms")
    add("--color_jitter", default=0.0, type=float, help="brightness, contrast, saturation within 1 +- this")
    add("--imagenet_default_mean_and_std", default=True, **ON_OFF, help="false: mean and std of 0.5")
    add("--decode_timeout", default=60.0, type=float, help="seconds to read one video in; 0: no limit")
    add("--max_bad_videos", default=0.01, type=float, help="share of the list that may be unreadable")
    add("--num_workers", type=int, help="decoding processes per training process")
    add("--pin_mem", default=True, action="store_true", help="page-locked batches for CUDA")
    add("--no_pin_mem", dest="pin_mem", action="store_false", help="pageable batches")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="", help="checkpoints, log.txt and pictures (default: nothing is kept)")
    add("--log_dir", default=None, help="TensorBoard (default: --output_dir)")
    add("--log_freq", default=20, type=int, help="optimiser steps between readings")

    add = parser.add_argument_group("processes").add_argument
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--dist_url", default="env://", help="where the processes meet")
    add("--world_size", default=1, type=int, help="processes that the launcher should have started")
    add("--local_rank", "--local-rank", default=-1, type=int, help="set by torch.distributed.launch")
    add("--dist_timeout", default=600.0, type=float, help="seconds after which a silent process ends the job")
    add("--compress_gradients", action="store_true", help="send gradients between processes in bfloat16")
    add("--dist_on_itp", action="store_true", help="read Open MPI's environment variables")
    return parser
# fmt: on

AT_LEAST_ONE = (
    *("batch_size", "epochs", "update_freq", "save_ckpt_freq", "log_freq"),
    *("num_frames", "sampling_rate", "num_sample", "max_bad_steps"),
)
AT_LEAST_ZERO = ("num_workers", "save_ckpt_minutes", "keep_ckpts", "decode_timeout")


def check_common(args: argparse.Namespace, *more_counts: str) -> None:
    """What can be told wrong of the shared flags before anything is built; `more_counts` are at least 1 too.

    Raises:
        ValueError: names the flag and says what to change.
    """
    for name in (*AT_LEAST_ONE, *more_counts):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    for name in AT_LEAST_ZERO:
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0")
    if not 0 <= args.max_bad_videos <= 1:
        raise ValueError(f"--max_bad_videos {args.max_bad_videos} is a share of the list, 0 to 1")
    if args.dist_timeout <= 0:
        raise ValueError(f"--dist_timeout {args.dist_timeout} must be positive")
    if args.warmup_steps < 0 and args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.output_dir:
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=args.output_dir).close()
        except OSError as error:
            raise ValueError(f"--output_dir {args.output_dir} can't be written to: {error}") from error
    resolve_decoder(args.decoder)


def build_schedule(
    args: argparse.Namespace, total_batch: int, steps_per_epoch: int
) -> Callable[[int], tuple[float, float]]:
    """Optimiser step -> (learning rate, weight decay); rates are the flags' times total_batch / 256."""
    scale = total_batch / 256
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * steps_per_epoch
    decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end

    def schedule(step: int) -> tuple[float, float]:
        lr = cosine_schedule(
            step,
            start=args.warmup_lr * scale,
            peak=args.lr * scale,
            final=args.min_lr * scale,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
        )
        return lr, cosine_schedule(step, peak=args.weight_decay, final=decay_end, total_steps=total_steps)

    return schedule


def join_processes(args: argparse.Namespace) -> World:
    """Joins the job's other processes as the flags say; see `start_world`."""
    return start_world(
        args.device,
        args.dist_url,
        args.world_size,
        local_rank=args.local_rank,
        itp=args.dist_on_itp,
        dist_timeout=args.dist_timeout,
    )


def build_books(
    args: argparse.Namespace, engine: Engine, videos: VideoList, world: World, console: Console, *, num_read: int
) -> dict:
    """The books of what goes wrong, as `Progress` takes them.

    videos: of training; num_read: of all videos that are read, of which some may be unreadable.
    """
    files = {"output_dir": args.output_dir, "warn": console.warn}
    return {
        "bad_videos": BadVideos(num_videos=num_read, limit=args.max_bad_videos, is_main=world.rank == 0, **files),
        "bad_batches": BadBatches(videos=videos, world=world, **files),
        "bad_steps": engine.bad_steps,
        "max_bad_steps": args.max_bad_steps,
    }


def build_engine(
    args: argparse.Namespace, model: nn.Module, world: World, *, layer_decay: float | None = None, **settings
) -> Engine:
    """The model with the flags' optimiser, in the flags' precision; `settings` go to `Engine`.

    Raises:
        ValueError: an optimiser that does not exist, does not take the flags, or can't be shared.
    """
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


def describe(args: argparse.Namespace, engine: Engine, world: World, *, model: str, videos: str) -> str:
    """What is about to run, in three lines: the model, the data, and the batch arithmetic."""
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad) / 1e6
    precision = str(engine.amp or torch.float32).removeprefix("torch.")
    total = args.batch_size * args.update_freq * world.size
    decoder = resolve_decoder(args.decoder)
    return (
        f"{args.model}, {trained:.2f} M trained parameters, {model}\n"
        f"{videos} of {args.data_path}, decoder {decoder}, on {world.device} in {precision}\n"
        f"{world.size} processes x {args.batch_size} videos x {args.update_freq} batches a step = {total}, "
        f"{args.num_sample} clips a video\n"
        f"learning rate {args.lr} x {total}/256 = {args.lr * total / 256:.3g}"
    )
