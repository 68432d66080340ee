"""Fine-tunes a video classifier, probes a frozen encoder, or evaluates; FINETUNE.md has the recipes."""

import argparse
import sys
from contextlib import ExitStack

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from augment import COLOUR_STATISTICS
from clips.finetune_transforms import build_finetune_transform
from clips.lists import VideoList, check_readable, read_labels, read_splits
from datasets import DATA_SETS, FRAME_RULES, DataSet, resolve_data_set
from evaluation import FUSIONS
from finetuning import NO_BEST, Run, steps_per_epoch, test, train
from loaders import build_finetuning_loaders
from modeling_finetune import CLASSIFIER_POSITIONS, CLASSIFIERS, colour_statistics, parse_model_name, token_grid
from probes import build_classifier
from runs.flags import (
    ON_OFF,
    build_books,
    build_engine,
    check_common,
    common_parser,
    describe,
    join_processes,
)
from runs.logs import Console, RunLog
from runs.program import run_program
from runs.resuming import build_checkpoints, resume
from runs.signals import StopSignals
from utils import World, seed_all
from weights.classifier import load_classifier_weights
from weights.names import Weights, load_weights
from weights.tested import check_same_on_all_ranks, check_tested, find_tested, load_tested


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = common_parser("run_class_finetuning.py", __doc__)
    parser.set_defaults(epochs=30, save_ckpt_freq=100, lr=1e-3, min_lr=1e-6, warmup_epochs=5,
                        num_sample=2, train_interpolation="bicubic", num_workers=10, color_jitter=0.4)

    add = parser.add_argument_group("model").add_argument
    add("--model", default="vit_base_patch16_224", help=", ".join(sorted(CLASSIFIERS)))
    add("--tubelet_size", default=2, type=int, help="frames of a token")
    add("--input_size", default=None, type=int, help="side of the clip in pixels (default: the model's)")
    add("--pos_embed", default=None, choices=list(CLASSIFIER_POSITIONS),
        help="positions (default: those that --finetune was trained with, else the model's)")
    add("--drop", default=0.0, type=float, help="dropout after positions, attention and MLP")
    add("--attn_drop_rate", default=0.0, type=float, help="dropout of attention weights")
    add("--drop_path", default=0.1, type=float, help="stochastic depth")
    add("--fc_drop_rate", default=0.0, type=float, help="dropout before the head")
    add("--init_scale", default=0.001, type=float, help="scale of the head's initial weights")
    add("--use_mean_pooling", default=True, action="store_true", help="classify the mean of all tokens")
    add("--use_cls", dest="use_mean_pooling", action="store_false", help="classify the first token")
    add("--slot_pooling", action="store_true", help="classify the means of the time slots side by side")
    add("--use_checkpoint", action="store_true", help="recompute activations: less memory, more time")
    add("--model_ema", action="store_true", help="keep a moving average of the weights, and evaluate it too")
    add("--model_ema_decay", default=0.9999, type=float, help="its decay per step")
    add("--model_ema_force_cpu", action="store_true", help="keep it in the host's memory")

    add = parser.add_argument_group("start").add_argument
    add("--finetune", default="", help="checkpoint of the encoder (default: from scratch)")
    add("--model_key", default="model|module", help="where the weights are in it")
    add("--model_prefix", default="", help="prefix of the weights to take")
    add("--linear_probe", action="store_true", help="train a linear layer on the frozen encoder")
    add("--attentive_probe", action="store_true", help="train an attention pooling and a linear layer on it")
    add("--probe_batch_norm", action="store_true", help="standardise the features of a probe (MAE)")

    add = parser.add_argument_group("training").add_argument
    add("--layer_decay", default=0.75, type=float, help="learning rate of a layer over that of the next")
    add("--smoothing", default=0.1, type=float, help="label smoothing")
    add("--aa", default="rand-m7-n4-mstd0.5-inc1", help="RandAugment policy, or none")
    add("--crop_scale", default=[0.08, 1.0], type=float, nargs=2, help="area of the random crop")
    add("--reprob", default=0.25, type=float, help="probability of random erasing")
    add("--remode", default="pixel", choices=["pixel", "rand", "const"], help="what fills the erased box")
    add("--recount", default=1, type=int, help="erased boxes")
    add("--mixup", default=0.8, type=float, help="alpha of Mixup; 0: off")
    add("--cutmix", default=1.0, type=float, help="alpha of CutMix; 0: off")
    add("--cutmix_minmax", default=None, type=float, nargs=2, help="range of the box's side instead")
    add("--mixup_prob", default=1.0, type=float, help="probability of either")
    add("--mixup_switch_prob", default=0.5, type=float, help="probability of CutMix where both are on")
    add("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="what shares one draw")
    add("--save_ckpt", default=True, action="store_true", help="write checkpoints")
    add("--no_save_ckpt", dest="save_ckpt", action="store_false", help="write none, test the last weights")

    add = parser.add_argument_group("data set").add_argument
    add("--data_set", default="Kinetics-400", choices=list(DATA_SETS), help="classes, frames, flip, views")
    add("--nb_classes", default=None, type=int, help="number of classes (default: the data set's)")
    add("--sampling", default=None, choices=list(FRAME_RULES), help="frame rule (default: the data set's)")
    add("--flip", default=None, **ON_OFF, help="mirror clips (default: as the data set's)")
    add("--num_segments", default=1, type=int, help="a clip has --num_frames times so many frames")
    add("--labels", default=None, help="file of class names, one a line, for the confusion matrix")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval", action="store_true", help="only test --finetune, --resume or the best in --output_dir")
    add("--disable_eval_during_finetuning", action="store_true", help="no validation; the last weights count")
    add("--dist_eval", default=True, action="store_true", help="share validation and test between processes")
    add("--no_dist_eval", dest="dist_eval", action="store_false", help="leave them to the first process")
    add("--short_side_size", default=None, type=int, help="short side in pixels (default: --input_size)")
    add("--test_num_segment", default=None, type=int, help="temporal views (default: the data set's)")
    add("--test_num_crop", default=None, type=int, help="spatial views (default: the data set's)")
    add("--random_validation", action="store_true", help="draw validation clips, as published")
    add("--view_fusion", default="softmax", choices=FUSIONS, help="averaged over views (AdaMAE: logits)")
    add("--skip_unreadable", action="store_true", help="leave unreadable test videos out, and exit with 0")
    return parser
# fmt: on


SHARES = ("reprob", "smoothing", "mixup_prob", "mixup_switch_prob")
DROPS = ("drop", "attn_drop_rate", "drop_path", "fc_drop_rate")


def check_ranges(args: argparse.Namespace) -> None:
    """Raises ValueError, naming the flag, for a number that augmentation or model can't take."""
    for name in (*SHARES, *DROPS):
        value = getattr(args, name)
        if not 0 <= value <= 1 or (name in DROPS and value == 1):
            raise ValueError(f"--{name} {value} must be from 0 to {'below ' * (name in DROPS)}1")
    for name in ("mixup", "cutmix"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0; 0 switches it off")
    for name in ("crop_scale", "cutmix_minmax"):
        low, high = getattr(args, name) or (1, 1)
        if not 0 < low <= high <= 1:
            raise ValueError(f"--{name} {low} {high} must be two shares above 0, up to 1, the smaller one first")


def check_probe(args: argparse.Namespace) -> dict | None:
    """The settings of `make_probe` where the flags ask for a probe. Raises ValueError for flags that clash."""
    if args.linear_probe and args.attentive_probe:
        raise ValueError("--linear_probe and --attentive_probe exclude each other: give one")
    if args.slot_pooling and not args.use_mean_pooling:
        raise ValueError("--slot_pooling and --use_cls exclude each other: give one")
    if args.slot_pooling and args.attentive_probe:
        raise ValueError("--slot_pooling and --attentive_probe exclude each other: that probe pools itself")
    if not (args.linear_probe or args.attentive_probe):
        if args.probe_batch_norm:
            raise ValueError("--probe_batch_norm belongs to a probe: add --linear_probe or --attentive_probe")
        return None
    if not (args.finetune or args.eval):
        raise ValueError("a probe needs a frozen encoder: set --finetune to a checkpoint")
    if args.probe_batch_norm and not args.eval and args.batch_size * args.num_sample == 1:
        raise ValueError("--probe_batch_norm can't standardise a batch of one clip: raise --batch_size")
    return {"kind": "linear" if args.linear_probe else "attentive", "batch_norm": args.probe_batch_norm}


def check_settings(
    args: argparse.Namespace,
) -> tuple[dict, Weights | None, DataSet, dict[str, VideoList], list[str] | None]:
    """Everything that can be told wrong before anything is built.

    Returns the settings of `build_classifier`; the weights to start from or to test; the data set; the lists; and
    the names of the classes. Raises ValueError with a message that says what to change, or CheckpointError.
    """
    check_common(args, "num_segments", "recount", "tubelet_size")
    check_ranges(args)
    _, patch, img = parse_model_name(args.model, CLASSIFIERS)
    num_frames, size = args.num_frames * args.num_segments, args.input_size or img
    token_grid(num_frames, size, patch, args.tubelet_size)
    probe = check_probe(args)
    if not args.data_path:
        raise ValueError("--data_path is missing: a folder of train.csv, val.csv and test.csv (DATASET.md)")
    data_set = resolve_data_set(
        args.data_set,
        num_classes=args.nb_classes,
        sampling=args.sampling,
        flip=args.flip,
        test_segments=args.test_num_segment,
        test_crops=args.test_num_crop,
    )
    class_names = read_labels(args.labels, data_set.num_classes) if args.labels else None
    splits = ["test"] if args.eval else ["train", "val", "test"]
    if args.disable_eval_during_finetuning and not args.eval:
        splits.remove("val")
    source, place = None, {"model_key": args.model_key, "prefix": args.model_prefix}
    if args.eval:
        source = find_tested(finetune=args.finetune, resume=args.resume, output_dir=args.output_dir, **place)
    elif args.finetune:
        source = load_weights(args.finetune, **place)
    model_settings = {
        "name": args.model,
        "num_classes": data_set.num_classes,
        "num_frames": num_frames,
        "input_size": size,
        "tubelet": args.tubelet_size,
        "pos_embed": args.pos_embed or (source and source.settings.get("pos_embed")),
        "mean_pooling": args.use_mean_pooling,
        "slot_pooling": args.slot_pooling,
        "drop": args.drop,
        "attn_drop": args.attn_drop_rate,
        "drop_path": args.drop_path,
        "fc_drop": args.fc_drop_rate,
        "init_scale": args.init_scale,
        "checkpoint_activations": args.use_checkpoint,
        **({"probe": probe} if probe else {}),
    }
    if args.eval:
        check_tested(source, model_settings)
    lists = read_splits(args.data_path, num_classes=data_set.num_classes, splits=splits, data_root=args.data_root)
    return model_settings, source, data_set, lists, class_names


def warn_of_empty_classes(args: argparse.Namespace, lists: dict[str, VideoList], console: Console) -> None:
    """A data set of one's own has more classes than labels: more often a wrong number than meant so."""
    found = len(np.unique(np.concatenate([videos.labels for videos in lists.values()])))
    if args.data_set == "custom" and not args.eval and found < args.nb_classes:
        console.say_error(f"--nb_classes {args.nb_classes}, but the lists have videos of {found} classes only")


def assemble(args: argparse.Namespace, signals: StopSignals, to_close: ExitStack) -> Run:
    """Checks the settings and builds everything. Raises ValueError or CheckpointError."""
    model_settings, source, data_set, lists, class_names = check_settings(args)
    world = join_processes(args)
    for videos in lists.values():
        check_readable(videos, args.decoder, decode_timeout=args.decode_timeout)
    loaders = build_loaders(args, data_set, lists, model_settings, world)
    is_main = world.rank == 0
    console = Console(total_steps=steps_per_epoch(args, loaders) * args.epochs, show=is_main)
    warn_of_empty_classes(args, lists, console)
    seed_all(args.seed)
    tested = str(source.path) if args.eval else ""
    model = build_model(args, model_settings, source, world, console).to(world.device)
    del source  # as large as the model
    engine = build_engine(
        args,
        model,
        world,
        layer_decay=args.layer_decay,
        ema_decay=args.model_ema_decay if args.model_ema else None,
        ema_force_cpu=args.model_ema_force_cpu,
    )
    to_close.callback(engine.close)
    videos = ", ".join(f"{len(loader.dataset)} {split}" for split, loader in loaders.items()) + " videos"
    classes = f"{data_set.num_classes} classes of {args.data_set}"
    console.say(describe(args, engine, world, model=classes, videos=videos))
    statistics = colour_statistics(args.model, imagenet=args.imagenet_default_mean_and_std)
    run = Run(
        args=args,
        model_settings=model_settings,
        data_set=data_set,
        world=world,
        loaders=loaders,
        engine=engine,
        console=console,
        log=RunLog(
            output_dir=args.output_dir, log_dir=args.log_dir or args.output_dir, show=is_main, warn=console.warn
        ),
        normalization=COLOUR_STATISTICS[statistics],
        signals=signals,
        class_names=class_names,
        tested=tested,
    )
    return run if args.eval else prepare_training(run, to_close)


def prepare_training(run: Run, to_close: ExitStack) -> Run:
    """What only training needs: where it starts, its checkpoints, its books. Raises CheckpointError."""
    args, world, console, loader = run.args, run.world, run.console, run.loaders["train"]
    start = resume(args, run.engine, loader.sampler, run.model_settings, world=world, console=console)
    checkpoints = build_checkpoints(
        args,
        run.engine,
        loader.sampler,
        run.model_settings,
        output_dir=args.output_dir if args.save_ckpt else "",
        signals=run.signals,
        to_close=to_close,
        world=world,
        console=console,
    )
    read = sum(len(run.loaders[split].dataset) for split in ("train", "val") if split in run.loaders)
    books = build_books(args, run.engine, loader.dataset.videos, world, console, num_read=read)
    return run._replace(start=start, checkpoints=checkpoints, books=books)


def build_model(
    args: argparse.Namespace, model_settings: dict, source: Weights | None, world: World, console: Console
) -> nn.Module:
    """The classifier or probe with the weights of `source`. Raises CheckpointError."""
    if source is None:
        return build_classifier(model_settings)
    if not args.eval:
        return build_classifier(model_settings, lambda model: load_classifier_weights(model, source, console.say))
    model = build_classifier(model_settings)
    load_tested(source, model, console.say)
    check_same_on_all_ranks(str(source.path), model, world)
    return model


def build_loaders(
    args: argparse.Namespace, data_set: DataSet, lists: dict, model_settings: dict, world: World
) -> dict[str, DataLoader]:
    size = model_settings["input_size"]
    return build_finetuning_loaders(
        splits=lists,
        data_set=data_set,
        transform=build_finetune_transform(
            size=size,
            flip=data_set.flip,
            aa=args.aa,
            interpolation=args.train_interpolation,
            color_jitter=args.color_jitter,
            scale=tuple(args.crop_scale),
        ),
        num_frames=model_settings["num_frames"],
        sampling_rate=args.sampling_rate,
        input_size=size,
        short_side=args.short_side_size or size,
        num_sample=args.num_sample,
        batch_size=args.batch_size,
        update_freq=args.update_freq,
        random_validation=args.random_validation,
        dist_eval=args.dist_eval,
        seed=args.seed,
        decoder=args.decoder,
        decode_timeout=args.decode_timeout,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        rank=world.rank,
        world_size=world.size,
    )


def main(argv: list[str] | None = None) -> int:
    """The program; see `run_program` for how it ends."""
    args = get_args_parser().parse_args(argv)

    def work(signals: StopSignals, to_close: ExitStack) -> int:
        run = assemble(args, signals, to_close)
        status = test(run, best=NO_BEST if args.eval else train(run))
        run.log.close()
        return status

    return run_program("run_class_finetuning.py", work)


if __name__ == "__main__":
    sys.exit(main())
