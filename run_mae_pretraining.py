"""Pre-trains AdaMAE or VideoMAE on a list of videos. Flags and assembly only; PRETRAIN.md has the recipes."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from augment import COLOUR_STATISTICS, to_pixels
from clips.lists import VideoList, check_readable, read_list
from clips.transforms import build_pretrain_transform
from engine_for_pretraining import pretrain_one_epoch
from loaders import build_pretraining_loader
from masking_generator import ALIASES, RULES, visible_count
from modeling_blocks import POSITIONS
from modeling_finetune import parse_model_name, token_grid
from modeling_pretrain import PRETRAIN_MODELS, create_pretrain_model
from optim import Engine
from pictures import panels
from pictures.reconstruction import PictureSettings
from runs import watchdog
from runs.flags import (
    ON_OFF,
    build_books,
    build_engine,
    build_schedule,
    check_common,
    common_parser,
    describe,
    join_processes,
)
from runs.logs import Console, Progress, RunLog
from runs.program import run_program
from runs.resuming import Checkpoints, Start, build_checkpoints, resume
from runs.signals import StopSignals
from targets import ERRORS, TARGETS, Losses, create_target
from utils import World, seed_all


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = common_parser("run_mae_pretraining.py", __doc__)
    parser.set_defaults(epochs=800, save_ckpt_freq=50, lr=1.5e-4, min_lr=1e-5, warmup_epochs=40,
                        num_sample=1, train_interpolation="bilinear", num_workers=4)

    add = parser.add_argument_group("model").add_argument
    add("--model", default="pretrain_videomae_base_patch16_224", help=", ".join(sorted(PRETRAIN_MODELS)))
    add("--decoder_depth", default=4, type=int, help="transformer blocks of the decoder")
    add("--input_size", default=None, type=int, help="side of the clip in pixels (default: the model's)")
    add("--drop_path", default=0.0, type=float, help="stochastic depth of encoder and decoder")
    add("--use_checkpoint", action="store_true", help="recompute activations: less memory, more time")
    add("--pos_embed", default="sinusoid_1d", choices=list(POSITIONS), help="published code: 1d, paper: 3d")
    add("--attn_init", default="xavier", choices=["xavier", "identity"], help="start of attention")

    add = parser.add_argument_group("masking").add_argument
    add("--mask_type", default="adaptive", choices=[*RULES, *ALIASES], help="who chooses the visible tokens")
    add("--mask_ratio", default=0.95, type=float, help="share of tokens hidden from the encoder")
    add("--sampler", default="mha", choices=["mha", "mlp"], help="network of the adaptive sampler")
    add("--sampler_depth", default=1, type=int, help="its transformer blocks (mha)")
    add("--sampler_dim", default=None, type=int, help="its width (default: the encoder's; mlp: 4 x)")
    add("--sampler_amp", action="store_true", help="run it in mixed precision; by default in float32")
    add("--sampler_positions", action="store_true", help="give it position-encoded tokens (paper)")
    add("--sampler_detach", action="store_true", help="keep its loss from the tubelet embedding (paper)")
    add("--softmax_temp", default=1.0, type=float, help="divides its logits (published: flag without effect)")

    add = parser.add_argument_group("losses").add_argument
    add("--target", default="pixels", choices=list(TARGETS), help="what is reconstructed of a masked token")
    add("--normlize_target", "--normalize_target", dest="normalize_target", default=True, **ON_OFF,
        help="standardise each token's target by its own pixels")
    add("--loss", default="mse", choices=list(ERRORS), help="reconstruction error of a token")
    add("--sampling_loss", default="log", choices=["log", "linear"],
        help="log: -mean(log p * error), published code; linear: -sum(p * error), paper")
    add("--sampling_loss_weight", default=1e-4, type=float, help="its weight in the total loss")

    add = parser.add_argument_group("clips and pictures").add_argument
    add("--crop", default="multi_scale", choices=["multi_scale", "random_resized"], help="spatial crop")
    add("--vis_freq", default=20, type=int, help="epochs between pictures; 0: none")
    return parser
# fmt: on


def check_settings(args: argparse.Namespace) -> tuple[dict, VideoList]:
    """Everything that can be told wrong before anything is built.

    Returns the settings of `create_pretrain_model` and the list of videos. Raises ValueError with a message
    that says what to change.
    """
    check_common(args, "decoder_depth", "sampler_depth")
    if args.softmax_temp <= 0:
        raise ValueError(f"--softmax_temp {args.softmax_temp} must be positive")
    if not args.data_path:
        raise ValueError("--data_path is missing: a text file with one `path [label]` a line (DATASET.md)")
    _, patch, img = parse_model_name(args.model, PRETRAIN_MODELS)
    window = token_grid(args.num_frames, args.input_size or img, patch)
    visible_count(args.mask_type, args.mask_ratio, window)
    model_settings = {
        "name": args.model,
        "num_frames": args.num_frames,
        "input_size": args.input_size or img,
        "mask_type": ALIASES.get(args.mask_type, args.mask_type),
        "mask_ratio": args.mask_ratio,
        "decoder_depth": args.decoder_depth,
        "sampler": {"kind": args.sampler, "width": args.sampler_dim, "depth": args.sampler_depth},
        "sampler_options": {
            "amp": args.sampler_amp,
            "temperature": args.softmax_temp,
            "positions": args.sampler_positions,
            "detach": args.sampler_detach,
        },
        "pos_embed": args.pos_embed,
        "attn_init": args.attn_init,
        "drop_path": args.drop_path,
        "checkpoint_activations": args.use_checkpoint,
        "target": args.target,
    }
    return model_settings, read_list(args.data_path, args.data_root)


def build_loader(args: argparse.Namespace, videos: VideoList, size: int, world: World):
    transform = build_pretrain_transform(
        args.crop, size=size, interpolation=args.train_interpolation, color_jitter=args.color_jitter
    )
    return build_pretraining_loader(
        videos=videos,
        transform=transform,
        num_frames=args.num_frames,
        sampling_rate=args.sampling_rate,
        num_sample=args.num_sample,
        batch_size=args.batch_size,
        update_freq=args.update_freq,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        seed=args.seed,
        rank=world.rank,
        world_size=world.size,
        decoder=args.decoder,
        decode_timeout=args.decode_timeout,
    )


class Run(NamedTuple):
    """Everything a training run needs, assembled and checked."""

    args: argparse.Namespace
    model_settings: dict
    world: World
    loader: DataLoader
    engine: Engine
    losses: Losses
    schedule: Callable[[int], tuple[float, float]]
    start: Start
    checkpoints: Checkpoints
    books: dict  # of what goes wrong, for `Progress`
    console: Console
    log: RunLog


def assemble(args: argparse.Namespace, signals: StopSignals, to_close: ExitStack) -> Run:
    """Checks the settings and builds everything. Raises ValueError or CheckpointError."""
    model_settings, videos = check_settings(args)
    world = join_processes(args)
    check_readable(videos, args.decoder, decode_timeout=args.decode_timeout)
    loader = build_loader(args, videos, model_settings["input_size"], world)
    seed_all(args.seed)
    model = create_pretrain_model(**model_settings).to(world.device)
    engine = build_engine(args, model, world, watch={"sampler": model.sampler_parameters()})
    to_close.callback(engine.close)
    steps_per_epoch = loader.sampler.steps_per_epoch // args.update_freq
    total_batch = args.batch_size * args.update_freq * world.size

    is_main = world.rank == 0
    console = Console(total_steps=args.epochs * steps_per_epoch, show=is_main)
    masking = model.masking
    tokens = f"{masking.num_visible} of {masking.num_tokens} tokens visible"
    text = f"{masking.mask_type} masking: {tokens}"
    console.say(describe(args, engine, world, model=text, videos=f"{len(videos)} videos"))
    start = resume(args, engine, loader.sampler, model_settings, world=world, console=console)
    checkpoints = build_checkpoints(
        args,
        engine,
        loader.sampler,
        model_settings,
        output_dir=args.output_dir,
        signals=signals,
        to_close=to_close,
        world=world,
        console=console,
    )
    return Run(
        args=args,
        model_settings=model_settings,
        world=world,
        loader=loader,
        engine=engine,
        losses=Losses(
            target=create_target(args.target, patch=engine.module.patch, normalize=args.normalize_target),
            loss=args.loss,
            sampling_form=args.sampling_loss,
            sampling_weight=args.sampling_loss_weight,
        ),
        schedule=build_schedule(args, total_batch, steps_per_epoch),
        start=start,
        checkpoints=checkpoints,
        books=build_books(args, engine, videos, world, console, num_read=len(videos)),
        console=console,
        log=RunLog(
            output_dir=args.output_dir, log_dir=args.log_dir or args.output_dir, show=is_main, warn=console.warn
        ),
    )


def train(run: Run) -> None:
    """The epochs of a run, with a checkpoint and a picture every few of them."""
    args, console, is_main = run.args, run.console, run.world.rank == 0
    normalization = COLOUR_STATISTICS["imagenet" if args.imagenet_default_mean_and_std else "half"]
    num_batches = run.loader.sampler.steps_per_epoch
    first_batch, state = run.start.batch, run.start.state.get("progress")
    console.start((run.start.epoch * num_batches + first_batch) // args.update_freq)
    for epoch in range(run.start.epoch, args.epochs):
        run.loader.sampler.set_epoch(epoch, first_batch)
        progress = Progress(
            world=run.world,
            console=console,
            log=run.log,
            epoch=epoch,
            log_freq=args.log_freq,
            **run.books,
            state=state,
        )

        def step_done(batch: int, epoch: int = epoch, progress: Progress = progress) -> None:
            run.checkpoints.step_done(epoch, batch, lambda: {"progress": progress.state_dict()})

        means = pretrain_one_epoch(
            run.engine,
            run.loader,
            num_batches=num_batches,
            first_batch=first_batch,
            clips_a_video=args.num_sample,
            losses=run.losses,
            normalization=normalization,
            schedule=run.schedule,
            seed=args.seed,
            progress=progress,
            step_done=step_done,
        )
        first_batch, state = 0, None
        run.log.epoch({"epoch": epoch, **means})
        is_last = epoch + 1 == args.epochs
        if (epoch + 1) % args.save_ckpt_freq == 0 or is_last:
            run.checkpoints.epoch_done(epoch)
        if is_main and args.vis_freq and ((epoch + 1) % args.vis_freq == 0 or is_last):
            draw(run, epoch, normalization)
    console.close()
    run.log.close()
    run.checkpoints.finish()


def draw(run: Run, epoch: int, normalization: tuple) -> None:
    """The five panels of the list's first clips, always the same ones, to a file and TensorBoard."""
    watchdog.tick("drawing")
    dataset = run.loader.dataset
    clips = torch.stack([dataset[0, i]["clips"][0] for i in range(min(4, len(dataset)))])  # (n,3,T,H,W)
    settings = PictureSettings(target=run.losses.target, normalization=normalization)
    pixels = to_pixels(clips.to(run.world.device))  # (n,3,T,H,W) in [0,1]
    picture = panels.training_picture(run.engine.module, pixels, settings)
    run.log.picture(epoch, picture)


def main(argv: list[str] | None = None) -> int:
    """The program; see `run_program` for how it ends."""
    args = get_args_parser().parse_args(argv)

    def work(signals: StopSignals, to_close: ExitStack) -> int:
        train(assemble(args, signals, to_close))
        return 0

    return run_program("run_mae_pretraining.py", work)


if __name__ == "__main__":
    sys.exit(main())
