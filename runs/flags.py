"""The flags that both programs have. Names are VideoMAE's."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from clips.decoders import DECODERS, resolve_decoder
from runs.reporters import REPORTERS, import_wandb
from utils import SettingError, plain


class Range(NamedTuple):
    """Valid values of a numeric flag, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Range("must be at least 1", lambda value: value >= 1)
AT_LEAST_ZERO = Range("must be at least 0", lambda value: value >= 0)
POSITIVE = Range("must be positive", lambda value: value > 0)
SHARE = Range("must be from 0 to 1", lambda value: 0 <= value <= 1)
SOME = Range("must be above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_ONE = Range("must be from 0 to below 1", lambda value: 0 <= value < 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is one to show, and where the text does not name it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, "") or action.const is False or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Flags(argparse.ArgumentParser):
    """A parser whose flags also say which values are valid, and whether they matter to what a run computes.

    Attributes:
        ranges: the valid values of a flag, by name.
        neutral: names of flags that may change when a run is resumed without changing what is computed.
        given: names of the flags on the command line that was parsed last.
        words: that command line, without the program.
    """

    def __init__(self, program: str, description: str):
        super().__init__(program, description=description, formatter_class=HelpFormatter)
        self.ranges: dict[str, Range] = {}
        self.neutral: set[str] = set()
        self.given: set[str] = set()
        self.words: list[str] = []

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the command line; a short run without --warmup_epochs gets the published share, not epochs."""
        self.words = list(sys.argv[1:] if argv is None else argv)
        args, nothing = super().parse_args(argv), object()
        absent = argparse.Namespace(**dict.fromkeys(vars(args), nothing))  # argparse keeps what a flag doesn't set
        self.given = {n for n, value in vars(super().parse_args(argv, absent)).items() if value is not nothing}
        if "warmup_epochs" not in self.given:
            share = args.warmup_epochs / self.get_default("epochs")
            args.warmup_epochs = min(args.warmup_epochs, share * args.epochs)
        return args

    def group(self, title: str) -> Callable[..., None]:
        """A group of flags, as the function that adds one; it takes `valid` and `neutral` too."""
        group = self.add_argument_group(title)

        def add(*names: str, valid: Range | None = None, neutral: bool = False, **settings) -> None:
            name = group.add_argument(*names, **settings).dest
            if valid:
                self.ranges[name] = valid
            if neutral:
                self.neutral.add(name)

        return add

    def check(self, args: argparse.Namespace) -> None:
        """Validates the values of numeric flags; a flag that is not given is not checked.

        Raises:
            SettingError: names the flag, its value and the valid ones.
        """
        for name, valid in self.ranges.items():
            value = getattr(args, name)
            if value is not None and not valid.holds(value):
                raise SettingError(f"--{name} {plain(value)} {valid.words}")


def boolean(text: str) -> bool:
    """A flag's true or false, in any common spelling."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


ON_OFF = {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}


# fmt: off
def common_parser(program: str, description: str) -> Flags:
    """A parser with the shared flags; each program sets the defaults in which the two differ."""
    parser = Flags(program, description)

    add = parser.group("run")
    add("--batch_size", default=64, type=int, valid=AT_LEAST_ONE, neutral=True,  # a change is reported in full
        help="videos per process and forward pass")
    add("--epochs", type=int, valid=AT_LEAST_ONE, help="number of epochs (the published scripts pass one more)")
    add("--update_freq", default=1, type=int, valid=AT_LEAST_ONE, neutral=True,  # as --batch_size
        help="batches accumulated into one optimiser step")
    add("--save_ckpt_freq", type=int, valid=AT_LEAST_ONE, neutral=True,
        help="epochs between checkpoints; the last epoch is always saved")
    add("--save_ckpt_minutes", default=15.0, type=float, valid=AT_LEAST_ZERO, neutral=True,
        help="minutes between writes of checkpoint-last.pth; 0: only on a stop signal")
    add("--keep_ckpts", default=0, type=int, valid=AT_LEAST_ZERO, neutral=True,
        help="number of epoch checkpoints to keep; 0: all")
    add("--max_bad_steps", default=10, type=int, valid=AT_LEAST_ONE, neutral=True,
        help="steps in a row with a non-finite loss or gradient that end the run")
    add("--seed", default=0, type=int, valid=AT_LEAST_ZERO, help="seed of all random numbers")
    add("--deterministic", action="store_true",
        help="repeat every bit on GPUs of one model too, which is slower (the CPU always does)")
    add("--start_epoch", default=0, type=int, valid=AT_LEAST_ZERO, neutral=True,
         help="first epoch of a run that resumes nothing")
    add("--resume", default="", neutral=True, help="checkpoint to resume")
    add("--auto_resume", default=True, action="store_true", neutral=True,
        help="resume the newest checkpoint in --output_dir")
    add("--no_auto_resume", dest="auto_resume", action="store_false", neutral=True, help="start from scratch")

    add = parser.group("optimiser")
    add("--opt", default="adamw", help="any optimiser of timm, by name")
    add("--opt_eps", default=1e-8, type=float, help="epsilon")
    add("--opt_betas", default=None, type=float, nargs="+", help="betas (default: the optimiser's)")
    add("--clip_grad", default=None, type=float, valid=POSITIVE, help="maximum gradient norm (default: no clipping)")
    add("--momentum", default=0.9, type=float, help="momentum of SGD")
    add("--weight_decay", default=0.05, type=float, help="weight decay")
    add("--weight_decay_end", default=None, type=float,
        help="weight decay at the end of its cosine (default: constant)")
    add("--lr", type=float, help="peak learning rate; multiplied by total batch / 256")
    add("--warmup_lr", default=0.0, type=float, help="learning rate at the start of warm-up, scaled likewise")
    add("--min_lr", type=float, help="learning rate at the end of the cosine, scaled likewise")
    add("--warmup_epochs", type=float, valid=AT_LEAST_ZERO,
        help="epochs of linear warm-up (default: as published, 40 in pre-training and 5 in fine-tuning, but at most "
             "1/20 and 1/6 of --epochs)")
    add("--warmup_steps", default=-1, type=int, help="optimiser steps of warm-up; overrides --warmup_epochs")
    add("--schedule", default=None, choices=["steps", "epochs"],
        help="end of warm-up: at its last step (AdaMAE, VideoMAE) or the step after it (MAE-ST; default: the model's)")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--enable_deepspeed", action="store_true", help="shard the optimiser state across processes (ZeRO)")
    add("--zero_stage", default=1, type=int, choices=[0, 1, 2], help="ZeRO stage; 2 shards the gradients too")

    add = parser.group("data")
    add("--data_path", default="", help="list of videos, or the folder of three lists (DATASET.md)")
    add("--data_root", default=None, help="folder that relative paths start from (default: the list's)")
    add("--decoder", default="auto", choices=["auto", *DECODERS], help="video decoder")
    add("--num_frames", default=16, type=int, valid=AT_LEAST_ONE, help="frames of a clip")
    add("--sampling_rate", default=4, type=int, valid=AT_LEAST_ONE, help="stride between frames of a clip")
    add("--num_sample", type=int, valid=AT_LEAST_ONE, help="clips per video and decoding (repeated augmentation)")
    add("--train_interpolation", choices=["bilinear", "bicubic"], help="interpolation of training transforms")
    add("--color_jitter", default=0.0, type=float, valid=AT_LEAST_ZERO,
        help="strength of brightness, contrast and saturation jitter")
    add("--imagenet_default_mean_and_std", default=True, **ON_OFF, help="false: mean and std of 0.5")
    add("--decode_timeout", default=60.0, type=float, valid=AT_LEAST_ZERO, neutral=True,
        help="seconds to read one video; 0: no limit")
    add("--max_bad_videos", default=0.01, type=float, valid=SHARE, neutral=True,
        help="share of the list that may be unreadable")
    add("--num_workers", default=None, type=int, valid=AT_LEAST_ZERO, neutral=True,
        help="data workers per process (default: the cores that SLURM gives it, else its share of the machine's, "
             "up to 4 in pre-training and 10 in fine-tuning)")
    add("--pin_mem", default=True, action="store_true", neutral=True, help="pinned memory for CUDA")
    add("--no_pin_mem", dest="pin_mem", action="store_false", neutral=True, help="pageable memory")

    add = parser.group("output")
    add("--output_dir", default="", neutral=True,
        help="checkpoints, log.txt, args.json and pictures (default: write nothing)")
    add("--log_dir", default=None, neutral=True, help="TensorBoard (default: --output_dir)")
    add("--report_to", default=["tensorboard"], nargs="*", choices=REPORTERS, neutral=True,
        help="who shows curves and pictures; wandb: Weights & Biases, set by its environment variables")
    add("--log_freq", default=20, type=int, valid=AT_LEAST_ONE, neutral=True,
        help="optimiser steps between log lines")

    add = parser.group("processes")
    add("--device", default="auto", neutral=True, help="auto, cuda, cuda:1, cpu")
    add("--dist_url", default="env://", neutral=True, help="rendezvous of the processes")
    add("--world_size", default=1, type=int, neutral=True, help="expected number of processes (default: any)")
    add("--local_rank", "--local-rank", default=-1, type=int, neutral=True, help="set by torch.distributed.launch")
    add("--dist_timeout", default=600.0, type=float, valid=POSITIVE, neutral=True,
        help="seconds after which a silent process ends the job")
    add("--compress_gradients", action="store_true", help="all-reduce gradients in bfloat16")
    add("--dist_on_itp", action="store_true", neutral=True, help="read Open MPI's environment variables")
    return parser
# fmt: on


def check_common(args: argparse.Namespace) -> None:
    """Validates the shared flags where a number's range is not enough, before anything is built.

    Raises:
        SettingError: names the flag and says what to change.
    """
    if args.warmup_steps < 0 and args.warmup_epochs > args.epochs:
        raise SettingError(f"--warmup_epochs {plain(args.warmup_epochs)} is more than --epochs {args.epochs}")
    if args.output_dir:
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=args.output_dir).close()
        except OSError as error:
            raise SettingError(f"--output_dir {args.output_dir} can't be written to: {error}") from error
    resolve_decoder(args.decoder)
    if "wandb" in args.report_to:
        import_wandb()
