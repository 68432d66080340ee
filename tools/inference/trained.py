"""A trained model and videos of one's own: what it takes, which files, and the pass over their clips.

For the programs in tools/ that predict and extract features.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from augment import COLOUR_STATISTICS, normalize, to_pixels
from clips.decoders import resolve_decoder
from clips.lists import SUFFIXES
from clips.lists import find_videos as find_below
from clips.transforms import EvenCrops
from datasets import DATA_SETS, FRAME_RULES
from modeling_finetune import VisionTransformer
from optim import resolve_amp
from probes import Probe
from runs.checkpoints import Weights, load_weights
from weights.classifier import load_classifier


# fmt: off
def inference_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that say which model sees which videos, and how."""
    parser = argparse.ArgumentParser(program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files, and folders to search for them")

    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, metavar="CKPT", help="checkpoint: a file, or a folder of DeepSpeed")
    add("--model_key", default="model|module",
        help="where the weights are in it, e.g. model_ema (default: %(default)s)")
    add("--model_prefix", default="", help="prefix of the weights to take")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--amp", default="off", choices=["auto", "bf16", "fp16", "off"],
        help="mixed precision (default: off, so that numbers do not depend on the device)")
    add("--batch_size", type=int, default=16, help="clips in one forward pass (default: %(default)s)")

    add = parser.add_argument_group("clips (default: as the model was trained)").add_argument
    add("--num_frames", type=int, help="frames of a clip")
    add("--input_size", type=int, help="side of a clip in pixels")
    add("--short_side_size", type=int, help="short side of the resized video in pixels")
    add("--sampling", choices=list(FRAME_RULES), help="frame rule")
    add("--sampling_rate", type=int, help="frames of the video from one frame of a clip to the next")
    add("--statistics", choices=list(COLOUR_STATISTICS), help="mean and deviation of the colours")
    add("--decoder", choices=["auto", "torchcodec", "decord", "pyav"], default="auto", help="video decoder")
    add("--num_workers", type=int, default=2, help="decoding processes (default: %(default)s)")
    return parser
# fmt: on


def check_flags(args: argparse.Namespace, *more_counts: str) -> None:
    """What can be told wrong before anything is read; `more_counts` are at least 1 too, where they are given.

    Raises:
        ValueError: names the flag and says what to change.
    """
    counts = ("batch_size", "num_frames", "input_size", "short_side_size", "sampling_rate", *more_counts)
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.num_workers < 0:
        raise ValueError(f"--num_workers {args.num_workers} must be at least 0")
    resolve_decoder(args.decoder)


def find_device(name: str) -> torch.device:
    """The device of a name, "auto" being CUDA where there is one. Raises ValueError for one not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; CUDA that isn't there
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} can't be used ({reason}); use --device auto or cpu") from error


# --- the model ----------------------------------------------------------------------------------------------


class ClipSettings(NamedTuple):
    """The clips that a model takes: T frames by a rule, squares of S pixels, and the views of its test.

    sampling: a key of FRAME_RULES. statistics: a key of COLOUR_STATISTICS. short_side: see `EvenCrops`.
    """

    num_frames: int
    sampling: str
    sampling_rate: int
    input_size: int
    short_side: int
    statistics: str
    segments: int
    crops: int

    def make_crops(self, num_crops: int) -> EvenCrops:
        """The spatial views of a test, as `build_finetuning_loaders` makes them."""
        return EvenCrops(
            short_side=self.short_side,
            size=self.input_size,
            num_crops=num_crops,
            round_up=self.sampling == "mae_st",
        )


class Trained(NamedTuple):
    """A model in evaluation mode on its device, the clips it takes, and its mixed precision."""

    model: nn.Module
    clips: ClipSettings
    device: torch.device
    amp: torch.dtype | None

    @torch.inference_mode()
    def run(self, function: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
        """`function` of the normalised pixels of clips uint8 (B,3,T,S,S): float32 on the host."""
        pixels = to_pixels(clips.to(self.device))
        pixels = normalize(pixels, *COLOUR_STATISTICS[self.clips.statistics])
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return function(pixels).float().cpu()


def encoder_of(model: nn.Module) -> VisionTransformer:
    """The ViT of a classifier or of a probe."""
    return model.encoder if isinstance(model, Probe) else model


def load_trained(args: argparse.Namespace, report: Callable[[str], None], *, headless: bool) -> Trained:
    """The model of the flags of `inference_parser`, and how it was trained.

    headless: as in `load_classifier`. `segments` and `crops` are taken from the flags where these have them.

    Raises:
        ValueError: the device or a size does not work. CheckpointError: as `load_classifier`.
    """
    device = find_device(args.device)
    amp = resolve_amp(args.amp, device)
    place = {"model_key": args.model_key, "prefix": args.model_prefix}
    changes = {"num_frames": args.num_frames, "input_size": args.input_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    model = load_classifier(args.model, headless=headless, report=report, **place, **changes)
    clips = trained_clips(load_weights(args.model, **place), encoder_of(model), vars(args))
    clips.make_crops(1)  # refuses sizes that do not go together
    return Trained(model.to(device), clips, device, amp)


def trained_clips(found: Weights, encoder: VisionTransformer, given: dict) -> ClipSettings:
    """The clips that a model was trained on, by the flags in its checkpoint, where `given` has nothing else.

    Without flags they are dense ones at rate 4 in ImageNet's colours, or MAE-ST's for its models.
    """

    def told(name: str, default):
        values = (given.get(name), found.flags.get(name))
        return next((value for value in values if value is not None), default)

    is_mae_st = found.kind.startswith("MAE-ST")
    data_set = DATA_SETS.get(found.flags.get("data_set"), DATA_SETS["custom"])
    rule = "mae_st" if is_mae_st and "data_set" not in found.flags else data_set.sampling
    statistics = "imagenet" if found.flags.get("imagenet_default_mean_and_std", True) else "half"
    size = encoder.window[1] * encoder.patch
    short_side = given.get("short_side_size")
    if short_side is None and found.flags.get("input_size") in (None, size):  # it was chosen for this size
        short_side = found.flags.get("short_side_size")
    return ClipSettings(
        num_frames=encoder.window[0] * encoder.patch_embed.proj.kernel_size[0],
        sampling=told("sampling", rule),
        sampling_rate=told("sampling_rate", 4),
        input_size=size,
        short_side=short_side or size,
        statistics=given.get("statistics") or ("mae_st" if is_mae_st else statistics),
        segments=given.get("segments") or found.flags.get("test_num_segment") or data_set.test_segments,
        crops=given.get("crops") or found.flags.get("test_num_crop") or data_set.test_crops,
    )


# --- the videos ---------------------------------------------------------------------------------------------


def find_videos(arguments: Sequence[str]) -> dict[str, Path]:
    """The videos that were named or lie in a named folder or below it, each once, sorted in each folder.

    Returns:
        Their paths, and as values the paths below the folder that all arguments share: `a.mp4` and `b/c.mp4`
        for the argument `folder`, `1.mp4` for `folder/1.mp4` alone.

    Raises:
        ValueError: a folder holds no video.
    """
    whole = [Path(os.path.abspath(argument)) for argument in arguments]
    shared = os.path.commonpath([path if path.is_dir() else path.parent for path in whole])
    videos = {}
    for argument, path in zip(arguments, whole, strict=True):
        inside = [path]
        if path.is_dir():
            inside = [path / below for below in find_below(path)]
        if not inside:
            raise ValueError(f"{argument}: no videos in this folder ({SUFFIXES.replace('|', ', ')})")
        for video in inside:
            as_given = os.path.join(argument, video.relative_to(path)) if video != path else argument
            videos.setdefault(video, as_given)
    return {as_given: video.relative_to(shared) for video, as_given in videos.items()}
