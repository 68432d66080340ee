"""A trained model and the videos to show it: flags, loading, clip settings and file names.

For predict.py and extract_features.py; visualize.py ends by the same `run_tool`.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from augment import COLOUR_STATISTICS, normalize, to_pixels
from clips.decoders import DECODERS, resolve_decoder
from clips.lists import SUFFIXES
from clips.lists import find_videos as find_below
from clips.transforms import EvenCrops
from datasets import DATA_SETS, FRAME_RULES
from modeling_finetune import CLASSIFIERS, VisionTransformer, colour_statistics
from probes import Probe
from runs.engine import resolve_amp
from utils import SettingError, UserError, choose_device, keep_freed_memory
from weights.classifier import classifier_settings, load_classifier
from weights.names import Weights, load_weights


# fmt: off
def inference_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags for the model, the videos and their clips."""
    parser = argparse.ArgumentParser(program, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files, and folders to search for them")

    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, metavar="CKPT",
        help="checkpoint: a file, a folder of DeepSpeed or Hugging Face, or a repository of its hub")
    add("--model_key", default="model|module", help="key of the weights in it, e.g. model_ema (default: %(default)s)")
    add("--model_prefix", default="", help="prefix of the weights to load")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    add("--amp", default="off", choices=["auto", "bf16", "fp16", "off"],
        help="mixed precision (default: off, so that numbers do not depend on the device)")
    add("--batch_size", type=int, default=16, help="clips per forward pass (default: %(default)s)")

    add = parser.add_argument_group("clips (default: as the model was trained)").add_argument
    add("--num_frames", type=int, help="frames per clip")
    add("--input_size", type=int, help="side of a clip in pixels")
    add("--short_side_size", type=int, help="short side of the resized video in pixels")
    add("--sampling", choices=list(FRAME_RULES), help="frame rule")
    add("--sampling_rate", type=int, help="frames of the video per frame of the clip")
    add("--statistics", choices=list(COLOUR_STATISTICS), help="mean and standard deviation of the colours")
    add("--decoder", choices=["auto", *DECODERS], default="auto", help="video decoder")
    add("--num_workers", type=int, default=2, help="decoding processes (default: %(default)s)")
    return parser
# fmt: on


def check_flags(args: argparse.Namespace, *more_counts: str) -> None:
    """Validates the decoder and numbers of `inference_parser`; `more_counts` names other flags of at least 1.

    Raises:
        SettingError: a flag is wrong.
    """
    counts = ("batch_size", "num_frames", "input_size", "short_side_size", "sampling_rate", *more_counts)
    for name, least in {**dict.fromkeys(counts, 1), "num_workers": 0}.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise SettingError(f"--{name} {value} must be at least {least}")
    resolve_decoder(args.decoder)


def run_tool(program: str, work: Callable[[], int]) -> None:
    """Runs `work`, which returns the number of unreadable videos; ends with status 1 where there are any.

    Raises:
        SystemExit: in one line, for unreadable videos and for what the user can correct.
    """
    keep_freed_memory()
    try:
        failed = work()
    except (UserError, OSError) as error:
        raise SystemExit(f"{program}: error: {error}") from error
    if failed:
        raise SystemExit(f"{program}: error: {failed} of the videos could not be read, see above")


class TrainedClips(NamedTuple):
    """The clips of a model and the views of its test."""

    num_frames: int
    sampling: str  # a key of `FRAME_RULES`
    sampling_rate: int  # frames of the video per frame of the clip
    input_size: int  # side of the clip in pixels
    short_side: int  # of the resized video in pixels
    statistics: str  # a key of `COLOUR_STATISTICS`
    segments: int  # temporal views
    crops: int  # spatial views

    def make_crops(self, num_crops: int) -> EvenCrops:
        """Returns the spatial views of a test, as `build_finetuning_loaders` makes them."""
        round_up = FRAME_RULES[self.sampling].round_up
        return EvenCrops(short_side=self.short_side, size=self.input_size, num_crops=num_crops, round_up=round_up)


class Trained(NamedTuple):
    """A model in evaluation mode on its device, its clips, the type of its mixed precision, its class names or ()."""

    model: nn.Module
    clips: TrainedClips
    device: torch.device
    amp: torch.dtype | None
    class_names: tuple[str, ...]

    @torch.inference_mode()
    def run(self, function: Callable[[Tensor], Tensor], clips: Tensor) -> Tensor:
        """Applies `function` to normalised clips: uint8 (B,3,T,S,S) -> its result as float32 on the host."""
        clips = clips.to(self.device, non_blocking=True)
        pixels = normalize(to_pixels(clips), *COLOUR_STATISTICS[self.clips.statistics])  # (B,3,T,S,S)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return function(pixels).float().cpu()


def encoder_of(model: nn.Module) -> VisionTransformer:
    """Returns the ViT of a classifier or probe."""
    return model.encoder if isinstance(model, Probe) else model


def load_trained(args: argparse.Namespace, report: Callable[[str], None], *, headless: bool) -> Trained:
    """Loads the model that the flags of `inference_parser` name, as `load_classifier` does.

    Raises:
        SettingError: the device or a size does not work.
        CheckpointError: as `load_weights` and `load_classifier`.
    """
    device = choose_device(args.device)
    found = load_weights(args.model, model_key=args.model_key, prefix=args.model_prefix)
    changes = {name: value for name in ("num_frames", "input_size") if (value := getattr(args, name)) is not None}
    model = load_classifier(found, headless=headless, report=report, **changes)
    clips = trained_clips(found, encoder_of(model), vars(args))
    clips.make_crops(1)  # refuses sizes that do not go together
    return Trained(model.to(device), clips, device, resolve_amp(args.amp, device), found.class_names)


def trained_clips(found: Weights, encoder: VisionTransformer, given: dict) -> TrainedClips:
    """Returns a model's clips: as the flags in `given` that are not None say, else its checkpoint, else its paper."""
    flags, name = found.flags, classifier_settings(found)["name"]
    data_set = DATA_SETS.get(flags.get("data_set"), DATA_SETS["custom"])
    rule = data_set.sampling if "data_set" in flags else CLASSIFIERS[name].sampling
    size = encoder.window[1] * encoder.patch
    short_side = given.get("short_side_size")
    if short_side is None and flags.get("input_size") in (None, size):  # it was chosen for this size
        short_side = flags.get("short_side_size")
    return TrainedClips(
        num_frames=encoder.window[0] * encoder.patch_embed.proj.kernel_size[0],
        sampling=given.get("sampling") or flags.get("sampling") or rule,
        sampling_rate=given.get("sampling_rate") or flags.get("sampling_rate") or 4,
        input_size=size,
        short_side=short_side or size,
        statistics=given.get("statistics")
        or colour_statistics(CLASSIFIERS[name].statistics, imagenet=flags.get("imagenet_default_mean_and_std", True)),
        segments=given.get("segments") or flags.get("test_num_segment") or data_set.test_segments,
        crops=given.get("crops") or flags.get("test_num_crop") or data_set.test_crops,
    )


def find_videos(arguments: Sequence[str]) -> dict[str, Path]:
    """Finds the videos that were named or lie in or below a named folder, each once, sorted in each folder.

    Returns:
        Their paths, each with its path below the folder that all arguments share: `a.mp4` and `b/c.mp4` for
        the argument `folder`, and `1.mp4` for the only argument `folder/1.mp4`.

    Raises:
        SettingError: a folder holds no video.
    """
    whole = [Path(os.path.abspath(argument)) for argument in arguments]
    shared = os.path.commonpath([path if path.is_dir() else path.parent for path in whole])
    videos = {}
    for argument, path in zip(arguments, whole, strict=True):
        inside = [path / below for below in find_below(path)] if path.is_dir() else [path]
        if not inside:
            raise SettingError(f"{argument}: no videos in this folder ({SUFFIXES.replace('|', ', ')})")
        for video in inside:
            as_given = os.path.join(argument, video.relative_to(path)) if video != path else argument
            videos.setdefault(video, as_given)
    return {as_given: video.relative_to(shared) for video, as_given in videos.items()}
