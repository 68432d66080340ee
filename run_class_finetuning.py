"""Fine-tunes a video classifier, probes a frozen encoder, or evaluates; FINETUNE.md has the recipes."""

import signal

if __name__ == "__main__":  # at once: SLURM's warning would end the program while it imports, and after its end
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in between `StopSignals` takes it

import argparse
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn
from torch.utils.data import DataLoader

from augment import COLOUR_STATISTICS, BatchAugmentation, ClipErasing, ClipMixup
from clips.class_names import ClassNames, check_classes, names_beside, number_lists, warn_of_empty_classes
from clips.finetune_transforms import build_finetune_transform
from clips.lists import VideoList, check_readable, draw_fraction, read_splits
from datasets import DATA_SETS, FRAME_RULES, DataSet, resolve_data_set
from engine_for_finetuning import finetune
from evaluation import FUSIONS, test
from loaders import build_finetuning_loaders
from modeling_blocks import POSITION_KINDS
from modeling_finetune import CLASSIFIERS, colour_statistics, parse_model_name, token_grid
from probes import ProbeGrid, build_classifier
from runs.assembly import Session, build_engine, build_run, build_schedule, open_session
from runs.best import BestCheckpoint, resume_best
from runs.engine import Engine
from runs.flags import AT_LEAST_ONE, AT_LEAST_ZERO, BELOW_ONE, ON_OFF, SHARE, SOME, Flags, check_common, common_parser
from runs.probe_flags import check_probe_flags, probe_settings
from runs.program import run_program
from runs.signals import StopSignals
from utils import SettingError, seed_all
from weights.classifier import load_classifier_weights
from weights.images import INFLATIONS, TIMM, inflate, load_timm
from weights.names import Weights, load_weights
from weights.tested import check_same_on_all_ranks, check_tested, find_tested, load_tested, take_trained


# fmt: off
def get_args_parser() -> Flags:
    parser = common_parser("run_class_finetuning.py", __doc__)
    parser.set_defaults(schedule="steps", epochs=30, save_ckpt_freq=100, lr=1e-3, min_lr=1e-6, warmup_epochs=5,
                        num_sample=2, train_interpolation="bicubic", color_jitter=0.4)

    add = parser.group("model")
    add("--model", default="vit_base_patch16_224", help=", ".join(sorted(CLASSIFIERS)))
    add("--tubelet_size", default=2, type=int, valid=AT_LEAST_ONE, help="frames of a tubelet")
    add("--input_size", default=None, type=int, valid=AT_LEAST_ONE,
        help="side of the clip in pixels (default: the model's)")
    add("--pos_embed", default=None, choices=list(POSITION_KINDS),
        help="positions (default: those that --finetune was trained with, else the model's)")
    add("--drop", default=0.0, type=float, valid=BELOW_ONE, help="dropout after positions, attention and MLP")
    add("--attn_drop_rate", default=0.0, type=float, valid=BELOW_ONE, help="dropout of attention weights")
    add("--drop_path", default=0.1, type=float, valid=BELOW_ONE, help="stochastic depth")
    add("--fc_drop_rate", default=0.0, type=float, valid=BELOW_ONE, help="dropout before the head")
    add("--init_scale", default=0.001, type=float, help="scale of the head's initial weights")
    add("--use_mean_pooling", default=True, action="store_true", help="classify the mean of all tokens")
    add("--use_cls", dest="use_mean_pooling", action="store_false", help="classify the first token")
    add("--slot_pooling", action="store_true", help="classify the concatenated means of the time slots")
    add("--use_checkpoint", action="store_true", help="recompute activations: less memory, more time")
    add("--model_ema", action="store_true", help="keep a moving average of the weights, and evaluate it too")
    add("--model_ema_decay", default=0.9999, type=float, valid=SHARE, help="decay of the moving average per step")
    add("--model_ema_force_cpu", action="store_true", help="keep it in the host's memory, not on the GPU")

    add = parser.group("initial weights")
    add("--finetune", default="",
        help="checkpoint of the encoder (also org/name on the Hugging Face hub), or timm:NAME, an image ViT of timm "
             "(default: train from scratch)")
    add("--model_key", default="model|module", help="key of the weights in the checkpoint; the first one present")
    add("--model_prefix", default="", help="prefix of the weights to take")
    add("--inflate", default="mean", choices=list(INFLATIONS),
        help="an image's patch embedding in time: spread over the frames of a tubelet, or in its middle one")
    add("--linear_probe", action="store_true", help="train a linear layer on the frozen encoder")
    add("--attentive_probe", action="store_true", help="train attention pooling and a linear layer on it")
    add("--probe_blocks", default=1, type=int, valid=AT_LEAST_ONE,
        help="blocks of attention pooling, the last a cross-attention (V-JEPA: 1, V-JEPA 2: 4)")
    add("--probe_lrs", default=None, type=float, nargs="+",
        help="train probes with each of these peak rates at once, instead of --lr, and test the best in validation")
    add("--probe_weight_decays", default=None, type=float, nargs="+",
        help="likewise with each of these weight decays, instead of --weight_decay, and each of the rates")
    add("--probe_batch_norm", action="store_true", help="standardise the features of a probe (MAE)")

    add = parser.group("training")
    add("--layer_decay", default=0.75, type=float, help="layer-wise decay of the learning rate")
    add("--smoothing", default=0.1, type=float, valid=SHARE, help="label smoothing")
    add("--aa", default="rand-m7-n4-mstd0.5-inc1", help="RandAugment policy, or none")
    add("--train_short_side", default=None, type=int, valid=AT_LEAST_ONE,
        help="short side in pixels before RandAugment and crop (default: as decoded; MAE-ST: 256)")
    add("--crop_scale", default=[0.08, 1.0], type=float, nargs=2, help="range of the random crop's area")
    add("--reprob", default=0.25, type=float, valid=SHARE, help="probability of random erasing")
    add("--remode", default="pixel", choices=["pixel", "rand", "const"], help="what fills the erased box")
    add("--recount", default=1, type=int, valid=AT_LEAST_ONE, help="maximum number of erased boxes")
    add("--mixup", default=0.8, type=float, valid=AT_LEAST_ZERO, help="alpha of Mixup; 0: off")
    add("--cutmix", default=1.0, type=float, valid=AT_LEAST_ZERO, help="alpha of CutMix; 0: off")
    add("--cutmix_minmax", default=None, type=float, nargs=2, help="range of CutMix's box side, instead of alpha")
    add("--mixup_prob", default=1.0, type=float, valid=SHARE, help="probability of Mixup or CutMix")
    add("--mixup_switch_prob", default=0.5, type=float, valid=SHARE, help="probability of CutMix if both are on")
    add("--mixup_mode", default="batch", choices=["batch", "pair", "elem"],
        help="share one draw across the batch, a pair, or nothing")
    add("--save_ckpt", default=True, action="store_true", help="write checkpoints")
    add("--no_save_ckpt", dest="save_ckpt", action="store_false", help="write none, test the last weights")

    add = parser.group("data set")
    add("--data_set", default="Kinetics-400", choices=list(DATA_SETS),
        help="sets classes, frame rule, flip and views")
    add("--nb_classes", default=None, type=int,
        help="number of classes (default: the data set's, or as many as have names)")
    add("--sampling", default=None, choices=list(FRAME_RULES), help="frame rule (default: the data set's)")
    add("--flip", default=None, **ON_OFF, help="flip clips horizontally (default: the data set's)")
    add("--num_segments", default=1, type=int, valid=AT_LEAST_ONE, help="multiplies --num_frames")
    add("--label_fraction", default=1.0, type=float, valid=SOME,
        help="share of each class's training videos to train on, at least one, drawn with --seed")
    add("--labels", default=None, neutral=True,
        help="file of class names, one per line from class 0 (default: the checkpoint's under --eval, or the lists')")

    add = parser.group("evaluation")
    add("--eval", action="store_true",
        help="only test --finetune, --resume or the best in --output_dir; model, data set, clips and views are those "
             "of its training, as far as it says, unless a flag says otherwise")
    add("--disable_eval_during_finetuning", action="store_true", help="no validation; test the last weights")
    add("--dist_eval", default=True, action="store_true", neutral=True, help="validate and test on all processes")
    add("--no_dist_eval", dest="dist_eval", action="store_false", neutral=True, help="only on the first process")
    add("--test_last", default=False, **ON_OFF, help="test the last epoch's weights, as published, not the best ones")
    add("--short_side_size", default=None, type=int, valid=AT_LEAST_ONE,
        help="short side in pixels (default: --input_size)")
    add("--test_num_segment", default=None, type=int, help="temporal views (default: the data set's)")
    add("--test_num_crop", default=None, type=int, help="spatial views (default: the data set's)")
    add("--random_validation", action="store_true", help="validate on random clips, as AdaMAE and VideoMAE do")
    add("--view_fusion", default="softmax", choices=FUSIONS,
        help="what is averaged over views for predictions (AdaMAE: logits); test.json has both accuracies")
    add("--skip_unreadable", action="store_true", help="leave out unreadable test videos, and exit with 0")
    return parser
# fmt: on


@dataclass
class Settings:
    """What the flags say, validated: the arguments of `build_classifier`, the data, and the weights to load."""

    model: dict
    data_set: DataSet
    lists: dict[str, VideoList]
    whole: int | None  # number of the training videos of which those of the list were drawn
    class_names: tuple[str, ...]  # by number; () where only numbers are known
    weights: Weights | None


def check_settings(args: argparse.Namespace, given: Collection[str] = ()) -> Settings:
    """Validates the settings before anything is built, and reads the lists and the checkpoint.

    Args:
        given: flags that --eval does not take from the checkpoint.

    Raises:
        SettingError, CheckpointError: says what to change.
    """
    check_common(args)
    weights = find_weights(args) if args.eval else None
    if weights is not None:
        take_trained(args, set(given), weights)
    check_probe_flags(args)
    for name in ("crop_scale", "cutmix_minmax"):
        low, high = getattr(args, name) or (1, 1)
        if not 0 < low <= high <= 1:
            raise SettingError(f"--{name} {low} {high} must be two numbers in ascending order, above 0 and at most 1")
    if not args.data_path:
        raise SettingError("--data_path is missing: a folder of train.csv, val.csv and test.csv (DATASET.md)")
    weights = weights or find_weights(args)
    lists, names = read_lists(args, weights)
    counted = len(names.names) if args.data_set == "custom" and args.nb_classes is None else 0
    data_set = resolve_data_set(
        args.data_set,
        num_classes=counted or args.nb_classes,
        sampling=args.sampling,
        flip=args.flip,
        test_segments=args.test_num_segment,
        test_crops=args.test_num_crop,
    )
    check_classes(lists, names, data_set.num_classes)
    model = model_settings(args, data_set.num_classes, weights)
    if args.eval:
        check_tested(weights, model)
    whole = None
    if args.label_fraction < 1 and not args.eval:
        whole, lists["train"] = len(lists["train"]), draw_fraction(lists["train"], args.label_fraction, args.seed)
    return Settings(model, data_set, lists, whole, names.names, weights)


def read_lists(args: argparse.Namespace, weights: Weights | None) -> tuple[dict[str, VideoList], ClassNames]:
    """The lists that the run needs, with numbers for labels, and the names of their classes."""
    splits = ["test"] if args.eval else ["train", "val", "test"]
    if args.disable_eval_during_finetuning and not args.eval:
        splits.remove("val")
    lists = read_splits(args.data_path, splits=splits, data_root=args.data_root)
    trained = ClassNames(weights.class_names, str(weights.path)) if args.eval else ClassNames()
    names, entry = number_lists(lists, labels=args.labels, trained=trained), DATA_SETS.get(args.data_set)
    classes = args.nb_classes or (entry.num_classes if entry else None)
    return lists, names if names.names else names_beside(args.data_path, classes)


def find_weights(args: argparse.Namespace) -> Weights | None:
    """The weights to test or to start from; None trains from scratch. The file is read once, here."""
    place = {"model_key": args.model_key, "prefix": args.model_prefix}
    if args.eval:
        folder = {"output_dir": args.output_dir, "last": args.test_last}
        return find_tested(finetune=args.finetune, resume=args.resume, **folder, **place)
    if args.finetune.startswith(TIMM):
        return load_timm(args.finetune)
    return load_weights(args.finetune, **place) if args.finetune else None


def model_settings(args: argparse.Namespace, num_classes: int, weights: Weights | None) -> dict:
    """The arguments of `build_classifier`."""
    _, patch, img = parse_model_name(args.model, CLASSIFIERS)
    num_frames, size = args.num_frames * args.num_segments, args.input_size or img
    token_grid(num_frames, size, patch, args.tubelet_size)
    settings = {
        "name": args.model,
        "num_classes": num_classes,
        "num_frames": num_frames,
        "input_size": size,
        "tubelet": args.tubelet_size,
        "pos_embed": args.pos_embed or (weights and weights.settings.get("pos_embed")),
        "class_token": weights and weights.settings.get("class_token"),
        "mean_pooling": args.use_mean_pooling,
        "slot_pooling": args.slot_pooling,
        "drop": args.drop,
        "attn_drop": args.attn_drop_rate,
        "drop_path": args.drop_path,
        "fc_drop": args.fc_drop_rate,
        "init_scale": args.init_scale,
        "checkpoint_activations": args.use_checkpoint,
    }
    if args.linear_probe or args.attentive_probe:
        settings["probe"] = probe_settings(args)
    return settings


def build_loaders(session: Session, settings: Settings) -> dict[str, DataLoader]:
    args, size, data_set = session.args, settings.model["input_size"], settings.data_set
    return build_finetuning_loaders(
        splits=settings.lists,
        data_set=data_set,
        transform=build_finetune_transform(
            size=size,
            flip=data_set.flip,
            aa=args.aa,
            interpolation=args.train_interpolation,
            color_jitter=args.color_jitter,
            scale=tuple(args.crop_scale),
            short_side=args.train_short_side,
        ),
        settings=session.clips(sampling=data_set.sampling, num_frames=settings.model["num_frames"], share_frames=True),
        loading=session.loading,
        input_size=size,
        short_side=args.short_side_size or size,
        random_validation=args.random_validation,
        dist_eval=args.dist_eval,
    )


def build_model(args: argparse.Namespace, settings: Settings, report: Callable[[str], None]) -> nn.Module:
    """The classifier or probe with the weights to test or to start from."""
    weights, start = settings.weights, lambda model: None
    if weights and not args.eval:
        start = lambda model: load_classifier_weights(model, inflate(weights, model, args.inflate), report)  # noqa: E731
    model = build_classifier(settings.model, start)
    if args.eval:
        load_tested(weights, model, report)
    return model


def build_augmentation(args: argparse.Namespace, num_classes: int) -> BatchAugmentation:
    statistics = colour_statistics(CLASSIFIERS[args.model].statistics, imagenet=args.imagenet_default_mean_and_std)
    return BatchAugmentation(
        COLOUR_STATISTICS[statistics],
        ClipErasing(prob=args.reprob, mode=args.remode, count=args.recount),
        ClipMixup(
            num_classes=num_classes,
            mixup=args.mixup,
            cutmix=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            smoothing=args.smoothing,
        ),
    )


def train(
    session: Session,
    settings: Settings,
    engine: Engine,
    loaders: dict[str, DataLoader],
    augmentation: BatchAugmentation,
) -> BestCheckpoint:
    """Trains from where the run was left off; returns the best checkpoint."""
    args, loader = session.args, loaders["train"]
    if args.data_set == "custom":
        warn_of_empty_classes(settings.lists, settings.data_set.num_classes, session.console.warn_once)
    run = build_run(
        session,
        engine,
        loader.sampler,
        model_settings=settings.model,
        class_names=settings.class_names,
        videos=loader.dataset.videos,
        num_read=sum(len(loaders[split].dataset) for split in ("train", "val") if split in loaders),
        save=args.save_ckpt,
    )
    best = resume_best(run, resumed_from=args.resume)
    finetune(
        run,
        engine,
        loaders,
        augmentation=augmentation,
        schedule=build_schedule(args, session.world, loader.sampler.steps_per_epoch),
        seed=args.seed,
        best=best,
        stop=lambda: bool(session.signals.status),
    )
    return best


def train_and_test(session: Session, settings: Settings) -> int:
    """Assembles everything, trains unless --eval, and tests; returns the exit status."""
    args, world, console = session.args, session.world, session.console
    loaders = build_loaders(session, settings)
    seed_all(args.seed)
    model = build_model(args, settings, console.say).to(world.device)
    tested = str(settings.weights.path) if args.eval else "the last weights"
    if args.eval:
        check_same_on_all_ranks(tested, model, world)  # before DDP makes them the same
    settings.weights = None  # as large as the model
    average = {"ema_decay": args.model_ema_decay, "ema_force_cpu": args.model_ema_force_cpu} if args.model_ema else {}
    engine = build_engine(args, model, world, layer_decay=args.layer_decay, **average)
    session.to_close.callback(engine.close)
    videos = ", ".join(f"{len(loader.dataset)} {split}" for split, loader in loaders.items()) + " videos"
    if settings.whole is not None:
        videos += f" (--label_fraction {args.label_fraction:g} of {settings.whole}, drawn with --seed {args.seed}),"
    classes = f"{settings.data_set.num_classes} classes of {args.data_set}"
    classes += f", {len(engine.module.names)} probes" if isinstance(engine.module, ProbeGrid) else ""
    session.describe(engine, model=classes, videos=videos)

    augmentation = build_augmentation(args, settings.data_set.num_classes)
    if not args.eval:
        best = train(session, settings, engine, loaders, augmentation)
        if not (args.disable_eval_during_finetuning or args.test_last):
            tested = best.load_into(engine) or tested
        check_same_on_all_ranks(tested, engine.module, world)
    return test(
        engine,
        loaders["test"],
        tested=tested,
        num_classes=settings.data_set.num_classes,
        class_names=settings.class_names,
        colours=augmentation.colours,
        fusion=args.view_fusion,
        clips_at_once=max(1, 3 * args.batch_size // 2),
        skip_unreadable=args.skip_unreadable,
        output_dir=args.output_dir,
        signals=session.signals,
        world=world,
        log=session.log,
    )


def main(argv: list[str] | None = None) -> int:
    """The program; see `run_program` for how it ends."""
    flags = get_args_parser()
    args = flags.parse_args(argv)

    def work(signals: StopSignals, to_close: ExitStack) -> int:
        flags.check(args)
        settings = check_settings(args, flags.given)
        session = open_session(args, flags, signals, to_close, most_workers=10)
        for videos in settings.lists.values():
            check_readable(videos, args.decoder, decode_timeout=args.decode_timeout)
        return train_and_test(session, settings)

    return run_program("run_class_finetuning.py", work)


if __name__ == "__main__":
    sys.exit(main())
