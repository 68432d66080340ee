"""Pre-trains AdaMAE, VideoMAE or MAE-ST on a list of videos; PRETRAIN.md has the recipes."""

import signal

if __name__ == "__main__":  # at once: SLURM's warning would end the program while it imports, and after its end
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in between `StopSignals` takes it

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from augment import COLOUR_STATISTICS, to_pixels
from clips.lists import VideoList, check_readable, read_list
from clips.transforms import CROPS, ClipTransform, build_pretrain_transform
from datasets import FRAME_RULES, TrainDataset
from engine_for_pretraining import pretrain
from loaders import build_training_loader
from masking_generator import ALIASES, DECODER_ORDERS, RULES, visible_count
from modeling_blocks import POSITION_KINDS, TUBELET
from modeling_finetune import colour_statistics, parse_model_name, token_grid
from modeling_pretrain import PRETRAIN_MODELS, create_pretrain_model
from pictures.panels import training_picture
from pictures.reconstruction import PictureSettings
from runs import watchdog
from runs.assembly import Session, build_engine, build_run, build_schedule, open_session
from runs.engine import Engine
from runs.flags import (
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    BELOW_ONE,
    ON_OFF,
    POSITIVE,
    SHARE,
    Flags,
    check_common,
    common_parser,
)
from runs.program import run_program
from runs.signals import StopSignals
from runs.training import TrainingRun
from sampling import SAMPLING_LOSSES
from targets import ERRORS, TARGETS, Losses, Target, create_target
from utils import SettingError, counted, seed_all
from weights.names import Weights, load_weights
from weights.pretraining import PARTS, load_pretraining_weights, trained_target
from weights.teachers import Teacher, Tokenizer, check_same_on_all_ranks, load_frozen


# fmt: off
def get_args_parser() -> Flags:
    parser = common_parser("run_mae_pretraining.py", __doc__)
    parser.set_defaults(epochs=800, save_ckpt_freq=50, lr=1.5e-4, min_lr=1e-5, warmup_epochs=40,
                        num_sample=1, train_interpolation="bilinear")

    add = parser.group("model")
    add("--model", default="pretrain_videomae_base_patch16_224", help=", ".join(sorted(PRETRAIN_MODELS)))
    add("--decoder_depth", default=4, type=int, valid=AT_LEAST_ONE, help="transformer blocks of the decoder")
    add("--input_size", default=None, type=int, valid=AT_LEAST_ONE,
        help="side of the clip in pixels (default: the model's)")
    add("--drop_path", default=0.0, type=float, valid=BELOW_ONE, help="stochastic depth of encoder and decoder")
    add("--use_checkpoint", action="store_true", help="recompute activations: less memory, more time")
    add("--decoder_dim", default=None, type=int, valid=AT_LEAST_ONE, help="width of the decoder (default: the model's)")
    add("--pos_embed", default=None, choices=list(POSITION_KINDS),
        help="positions (default: the model's; AdaMAE's paper: sinusoid_3d)")
    add("--class_token", default=None, **ON_OFF, help="give encoder and decoder a class token (default: the model's)")
    add("--dense_encoder", action="store_true", help="encode all tokens, masked ones as a learned vector (MAE-ST)")
    add("--attn_init", default="xavier", choices=["xavier", "identity"], help="initialisation of attention")

    add = parser.group("initial weights")
    add("--finetune", default="", help="checkpoint to start from, or org/name on the hub (default: random weights)")
    add("--finetune_parts", default="all", choices=PARTS, help="what to take of it")

    add = parser.group("masking")
    add("--mask_type", default="adaptive", choices=[*RULES, *ALIASES], help="rule that chooses the visible tokens")
    add("--mask_ratio", default=0.95, type=float, help="share of tokens hidden from the encoder")
    add("--decoder_mask_ratio", default=0.0, type=float, valid=BELOW_ONE,
        help="share of the masked tokens that the decoder leaves out while training (VideoMAE V2)")
    add("--decoder_mask_type", default="random", choices=list(DECODER_ORDERS), help="rule that chooses them")
    add("--sampler", default="mha", choices=["mha", "attention", "mlp"],
        help="network of the adaptive sampler: transformer block (published code), attention alone (paper) or mlp")
    add("--sampler_depth", default=1, type=int, valid=AT_LEAST_ONE, help="blocks of mha or attention")
    add("--sampler_dim", default=None, type=int, valid=AT_LEAST_ONE,
        help="width of the sampler (default: the encoder's; mlp: 4 x)")
    add("--sampler_amp", default=True, **ON_OFF, help="run the sampler in mixed precision too, up to its softmax")
    add("--sampler_positions", action="store_true", help="give the sampler position-encoded tokens (paper)")
    add("--sampler_detach", action="store_true", help="keep the sampling loss from the tubelet embedding (paper)")
    add("--softmax_temp", default=1.0, type=float, valid=POSITIVE,
        help="temperature of the sampler's softmax (without effect in the published code)")

    add = parser.group("target and losses")
    add("--target", default="pixels", choices=list(TARGETS), help="what is reconstructed")
    add("--teacher", default="", metavar="FILE",
        help="frozen network whose features are the target: a checkpoint that fine-tuning reads, or timm:<name>")
    add("--tokenizer", default="", metavar="FILE",
        help="frozen network whose ids are the target: a program of torch.export.save, clips (B,3,T,H,W) in [0,1] "
             "-> ids (B,N)")
    add("--tokenizer_vocab", default=None, type=int, valid=AT_LEAST_ONE, help="number of ids of the tokenizer")
    add("--normalize_target", "--normlize_target", dest="normalize_target", default=True, **ON_OFF,
        help="normalise each token's target by its own mean and deviation")
    add("--target_statistics", default=None, choices=["channel", "joint"],
        help="normalise by channel (AdaMAE, VideoMAE) or all channels jointly (MAE-ST; default: the model's)")
    add("--pred_t_dim", default=None, type=int, valid=AT_LEAST_ONE,
        help="frames of a clip that are predicted, evenly spread (default: all; MAE-ST: half of them)")
    add("--loss", default="mse", choices=list(ERRORS), help="reconstruction error of a token")
    add("--sampling_loss", default="log", choices=list(SAMPLING_LOSSES),
        help="log: -mean(log p * error), published code; linear: -sum(p * error), paper; score_function: expected "
             "error (docs/paper_and_code.md)")
    add("--sampling_loss_weight", default=1e-4, type=float, help="weight of the sampling loss")
    add("--sampling_entropy_weight", default=0.0, type=float, valid=AT_LEAST_ZERO,
        help="weight of the entropy of P / log N, which the sampler then maximises too")

    add = parser.group("clips and pictures")
    add("--sampling", default=None, choices=list(FRAME_RULES), help="rule for frame indices (default: the model's)")
    add("--crop", default=None, choices=list(CROPS), help="spatial crop (default: the model's)")
    add("--crop_scale", default=None, type=float, nargs=2, metavar=("MIN", "MAX"),
        help="area of a random resized crop, as a share of the frame (default: 0.5 1)")
    add("--flip", default=None, type=float, valid=SHARE, help="probability of mirroring (default: the crop's)")
    add("--vis_freq", default=20, type=int, neutral=True, help="epochs between pictures; 0: none")
    return parser
# fmt: on


@dataclass
class Settings:
    """What the flags say, validated: the arguments of `create_pretrain_model`, and what was read from files."""

    model: dict
    videos: VideoList
    weights: Weights | None  # to start from
    teacher: Teacher | Tokenizer | None  # the frozen network of the target


def check_settings(args: argparse.Namespace) -> Settings:
    """Validates the settings before anything is built, and reads the list and the checkpoint to start from.

    Raises:
        SettingError, CheckpointError: says what to change.
    """
    check_common(args)
    if not args.data_path:
        raise SettingError("--data_path is missing: a text file with one `path [label]` a line (DATASET.md)")
    _, patch, img = parse_model_name(args.model, PRETRAIN_MODELS)
    take_family_defaults(args)
    window = token_grid(args.num_frames, args.input_size or img, patch)
    visible_count(args.mask_type, args.mask_ratio, window)
    build_transform(args, args.input_size or img)
    pixels = {"joint": args.target_statistics == "joint", "pred_t_dim": args.pred_t_dim}
    model_settings = {
        "name": args.model,
        "num_frames": args.num_frames,
        "input_size": args.input_size or img,
        "mask_type": ALIASES.get(args.mask_type, args.mask_type),
        "mask_ratio": args.mask_ratio,
        "decoder_mask_type": args.decoder_mask_type,
        "decoder_mask_ratio": args.decoder_mask_ratio,
        "target": args.target,
        "target_settings": pixels if args.target == "pixels" else {},
        "decoder_depth": args.decoder_depth,
        "decoder_dim": args.decoder_dim,
        "sampler": {"kind": args.sampler, "width": args.sampler_dim, "depth": args.sampler_depth},
        "sampler_options": {
            "amp": args.sampler_amp,
            "temperature": args.softmax_temp,
            "positions": args.sampler_positions,
            "detach": args.sampler_detach,
        },
        "pos_embed": args.pos_embed,
        "class_token": args.class_token,
        "dense_encoder": args.dense_encoder,
        "attn_init": args.attn_init,
        "drop_path": args.drop_path,
        "checkpoint_activations": args.use_checkpoint,
    }
    weights = load_weights(args.finetune) if args.finetune else None
    teacher = load_teacher(args, model_settings)
    return Settings(model_settings, read_list(args.data_path, args.data_root), weights, teacher)


def load_teacher(args: argparse.Namespace, model_settings: dict) -> Teacher | Tokenizer | None:
    """Loads the frozen network of the target, if it needs one, and adds what follows from it to the model's settings.

    Raises:
        CheckpointError, SettingError: as `load_frozen`.
    """
    _, patch, _ = parse_model_name(args.model, PRETRAIN_MODELS)
    window = token_grid(args.num_frames, model_settings["input_size"], patch)
    teacher = load_frozen(
        args.target,
        patch=patch,
        window=window,
        teacher=args.teacher,
        tokenizer=args.tokenizer,
        vocab=args.tokenizer_vocab,
        batch=args.batch_size * args.num_sample,
    )
    if teacher is not None:
        model_settings["target_settings"] = teacher.settings
    return teacher


def build_target(session: Session, settings: Settings, *, patch: int, amp: torch.dtype | None) -> Target:
    """The target; its frozen network goes to the device, and computes in the mixed precision of the run.

    Raises:
        SettingError: the processes have different networks.
    """
    args, own = session.args, dict(settings.model["target_settings"])
    if settings.teacher is not None:
        check_same_on_all_ranks(settings.teacher)
        own["teacher"] = settings.teacher.place(session.world.device, amp)
    return create_target(args.target, patch=patch, normalize=args.normalize_target, num_frames=args.num_frames, **own)


def take_family_defaults(args: argparse.Namespace) -> None:
    """Gives the flags that are not given the values of the model's family.

    Raises:
        SettingError: flags of pixels are given with another target.
    """
    if args.target != "pixels" and (args.pred_t_dim or args.target_statistics):
        raise SettingError(f"--pred_t_dim and --target_statistics are of --target pixels, not of {args.target}")
    family, size = PRETRAIN_MODELS[args.model], parse_model_name(args.model, PRETRAIN_MODELS)[0]
    defaults = {
        "decoder_dim": family.decoder[0] if family.decoder else size.decoder_dim,
        "pos_embed": family.settings["pos_embed"],
        "class_token": family.settings["class_token"],
        "target_statistics": "joint" if family.target.get("joint") else "channel",
        "pred_t_dim": args.num_frames // TUBELET if "pred_t_dim" in family.target else None,
        "sampling": family.sampling,
        "crop": family.crop,
        "schedule": family.schedule,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def build_transform(args: argparse.Namespace, size: int) -> ClipTransform:
    return build_pretrain_transform(
        args.crop,
        size=size,
        interpolation=args.train_interpolation,
        color_jitter=args.color_jitter,
        scale=args.crop_scale,
        flip=args.flip,
    )


def build_loader(session: Session, videos: VideoList, size: int) -> DataLoader:
    args = session.args
    transform = build_transform(args, size)
    clips = session.clips(sampling=args.sampling, num_frames=args.num_frames)
    return build_training_loader(TrainDataset(videos=videos, transform=transform, settings=clips), session.loading)


def picture_drawer(
    every: int, run: TrainingRun, engine: Engine, loader: DataLoader, settings: PictureSettings
) -> Callable[[int], None]:
    """A function of the epoch that draws the five panels of the list's first clips, always the same ones."""

    def draw(epoch: int) -> None:
        is_due = every and ((epoch + 1) % every == 0 or epoch + 1 == run.epochs)
        if not (is_due and run.world.is_main):
            return
        watchdog.tick("drawing")
        dataset = loader.dataset
        clips = torch.stack([dataset[0, i]["clips"][0] for i in range(min(4, len(dataset)))])  # (n,3,T,H,W)
        pixels = to_pixels(clips.to(engine.device))
        run.log.picture(epoch, training_picture(engine.module, pixels, settings))

    return draw


def build_model(args: argparse.Namespace, settings: Settings, report: Callable[[str], None]) -> nn.Module:
    """The model, with the weights to start from."""
    model = create_pretrain_model(**settings.model)
    if settings.weights:
        target = trained_target(settings.model, vars(args), patch=model.patch)
        load_pretraining_weights(model, settings.weights, parts=args.finetune_parts, target=target, report=report)
    settings.weights = None  # as large as the model
    return model


def train(session: Session, settings: Settings) -> None:
    """Assembles a run and trains it."""
    args, world, videos = session.args, session.world, settings.videos
    loader = build_loader(session, videos, settings.model["input_size"])
    seed_all(args.seed)
    model = build_model(args, settings, session.console.say).to(world.device)
    engine = build_engine(args, model, world, watch={"sampler": model.sampler_parameters()})
    session.to_close.callback(engine.close)
    masking = model.masking
    text = f"{masking.mask_type} masking: {masking.num_visible} of {masking.num_tokens} tokens visible"
    session.describe(engine, model=text, videos=counted(len(videos), "video"))

    run = build_run(session, engine, loader.sampler, model_settings=settings.model, videos=videos, num_read=len(videos))
    target = build_target(session, settings, patch=model.patch, amp=engine.amp)
    colours = COLOUR_STATISTICS[colour_statistics(model.statistics, imagenet=args.imagenet_default_mean_and_std)]
    pretrain(
        run,
        engine,
        loader,
        losses=Losses(
            target=target,
            loss=args.loss,
            sampling_form=args.sampling_loss,
            sampling_weight=args.sampling_loss_weight,
            entropy_weight=args.sampling_entropy_weight,
        ),
        colours=colours,
        schedule=build_schedule(args, world, loader.sampler.steps_per_epoch),
        seed=args.seed,
        after_epoch=picture_drawer(
            args.vis_freq, run, engine, loader, PictureSettings(target=target, normalization=colours)
        ),
    )


def main(argv: list[str] | None = None) -> int:
    """The program; see `run_program` for how it ends."""
    flags = get_args_parser()
    args = flags.parse_args(argv)

    def work(signals: StopSignals, to_close: ExitStack) -> int:
        flags.check(args)
        settings = check_settings(args)
        session = open_session(args, flags, signals, to_close, most_workers=4)
        check_readable(settings.videos, args.decoder, decode_timeout=args.decode_timeout)
        train(session, settings)
        return 0

    return run_program("run_mae_pretraining.py", work)


if __name__ == "__main__":
    sys.exit(main())
