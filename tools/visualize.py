"""Draw what a pre-trained model does with videos: video | prediction | error | probability | mask.

    python tools/visualize.py --model output/checkpoint-799.pth --video a.mp4 b.mp4 --output output/pictures
    python tools/visualize.py --model output/checkpoint-799.pth --list val.csv --output output/pictures

Takes checkpoints of this repository and of the published AdaMAE and VideoMAE code. Of each video the middle
is shown: a clip of the model's length, its central square resized to the model's input. Written below
--output, named after the video, with the folders that tell it from the others:

    <video>.gif          the five panels side by side, frame by frame
    <video>.png          the same as rows, with a column for every time slot of two frames
    <video>_masks.png    with --compare_masks: random, tube, frame and adaptive masks at one ratio

A model trained on normalised patches does not tell their mean and deviation. The picture takes both from the
original, so brightness and contrast of the prediction are not the model's work.

A video that can't be read is reported and the others go on; the exit status is then 1.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from augment import COLOUR_STATISTICS, to_pixels
from clips.frame_indices import pretrain_clip
from clips.lists import read_list
from clips.transforms import View, apply_view
from clips.video import VideoError, open_video, resolve_decoder
from masking_generator import visible_count
from modeling_blocks import TUBELET
from modeling_pretrain import PretrainVisionTransformer
from pictures import panels
from runs.checkpoints import CheckpointError, read_checkpoint
from utils import choose_device
from weights.names import load_weights
from weights.pretraining import load_pretrain_model


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("visualize.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT", help="pre-training checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", nargs="+", metavar="FILE", help="videos to draw")
    source.add_argument("--list", metavar="FILE", help="list of videos, `path [label]` a line")
    add("--data_root", metavar="DIR", help="folder that paths in the list start from (default: the list's)")
    add("--num_clips", type=int, default=8, help="videos of the list, spread evenly (default: %(default)s)")
    add("--output", required=True, metavar="DIR", help="folder for the pictures")
    add("--mask_ratio", type=float, help="share of tokens hidden (default: as in the checkpoint)")
    add("--visible", choices=panels.SHOW_VISIBLE, default="pasted",
        help="what the prediction shows at visible patches: the original, or what the decoder gives there, "
             "which no loss has trained (default: %(default)s)")
    add("--compare_masks", nargs="?", type=float, const=0.8, metavar="RATIO",
        help="compare the masking rules, at this ratio (0.8 where none is given)")
    add("--error_top", type=float,
        help="end of the error's colour scale (default: 2 for normalised targets, else the largest error)")
    add("--normalize_target", choices=["true", "false"],
        help="whether the model predicts normalised patches (default: as trained, true if not known)")
    add("--sampling_rate", type=int, help="frames of the video from one to the next (default: as trained, 4)")
    add("--fps", type=float, default=8, help="frames per second of the GIF (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    add("--decoder", choices=["auto", "torchcodec", "decord", "pyav"], default="auto", help="video decoder")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    return parser
# fmt: on


class Training(NamedTuple):
    """What a picture has to know of how a model was trained."""

    normalize_target: bool
    sampling_rate: int
    normalization: panels.Normalization


def read_training(path: str) -> Training:
    """How a checkpoint was trained, by the flags in it; the published code's defaults where it has none."""
    flags = read_checkpoint(path).get("args") or {}
    flags = flags if isinstance(flags, dict) else vars(flags)
    statistics = "imagenet" if flags.get("imagenet_default_mean_and_std", True) else "half"
    return Training(
        normalize_target=flags.get("normalize_target", flags.get("normlize_target", True)),
        sampling_rate=flags.get("sampling_rate", 4),
        normalization=COLOUR_STATISTICS[statistics],
    )


def check_settings(args: argparse.Namespace) -> None:
    """Raises ValueError with a message that says what to change."""
    for name in ("num_clips", "sampling_rate"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if not 0 < args.fps <= 50:
        raise ValueError(f"--fps {args.fps:g} must lie between 0 and 50, which is as fast as players show a GIF")
    if args.error_top is not None and args.error_top <= 0:
        raise ValueError(f"--error_top {args.error_top:g} must be above 0")
    try:
        resolve_decoder(args.decoder)
    except RuntimeError as error:
        raise ValueError(f"--decoder {args.decoder}: {error}") from error


def list_videos(args: argparse.Namespace) -> list[str]:
    """The videos to draw, each once. Raises ListError for a list that can't be used."""
    if args.video:
        return list(dict.fromkeys(args.video))
    videos = read_list(args.list, args.data_root)
    chosen = np.linspace(0, len(videos) - 1, min(args.num_clips, len(videos)), dtype=int)
    return list(dict.fromkeys(videos[i].path for i in chosen.tolist()))


def picture_names(paths: Sequence[str]) -> list[Path]:
    """Where the pictures of each video go: its path below the folder that all share, without the suffix.

    The suffix stays where two videos differ in nothing else.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    names = [path.relative_to(shared) for path in whole]
    count = Counter(name.with_suffix("") for name in names)
    return [name if count[name.with_suffix("")] > 1 else name.with_suffix("") for name in names]


def load_clip(path: str, model: PretrainVisionTransformer, *, sampling_rate: int, decoder: str) -> Tensor:
    """The middle of a video as the model takes it: pixels (1,3,T,S,S) in [0,1]. Raises VideoError."""
    num_frames, size = model.window[0] * TUBELET, model.window[1] * model.patch
    with open_video(path, decoder) as video:
        middle = pretrain_clip(video.num_frames, num_frames, sampling_rate)
        frames = video.get_frames(middle)  # (T,3,H,W)
    height, width = frames.shape[-2:]
    side = min(height, width)
    view = View((width - side) // 2, (height - side) // 2, side, side)
    return to_pixels(apply_view(frames, view, size)).transpose(0, 1)[None]  # (1,3,T,S,S)


def to_palette(frame: np.ndarray) -> Image.Image:
    """A picture (H,W,3) uint8 in the 256 colours of a GIF, chosen for it.

    Of Pillow's ways to choose them the octree alone keeps the colour scales true, and its palette serves
    better when the pixels are assigned to it anew, each to the nearest colour.
    """
    picture = Image.fromarray(frame)
    palette = picture.quantize(method=Image.Quantize.FASTOCTREE)
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def save_gif(path: str, frames: np.ndarray, fps: float) -> None:
    """Writes pictures (T,H,W,3) uint8 as an endless GIF; the format counts time in hundredths of a second."""
    first, *others = map(to_palette, frames)
    first.save(path, save_all=True, append_images=others, duration=10 * round(100 / fps), loop=0)


def draw_clip(
    model: PretrainVisionTransformer,
    pixels: Tensor,
    target: Path,
    heading: str,
    *,
    error_top: float | None,
    fps: float,
    compare_masks: float | None,
    **settings,
) -> list[str]:
    """Writes the pictures of one clip (1,3,T,H,W) to `target` plus their endings; returns the files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [f"{target}.gif", f"{target}.png"]
    five = panels.five_panels(panels.reconstruct(model, pixels, **settings), error_top=error_top)
    save_gif(files[0], panels.animation(five, heading=heading), fps)
    Image.fromarray(panels.filmstrip(five, heading=heading)).save(files[1])
    if compare_masks is not None:
        files.append(f"{target}_masks.png")
        compared = panels.mask_panels(model, pixels, mask_ratio=compare_masks, **settings)
        heading = f"{heading}, {compare_masks:.4g} of the patches masked by each rule"
        Image.fromarray(panels.filmstrip(compared, heading=heading)).save(files[2])
    return files


def draw(args: argparse.Namespace) -> int:
    """Draws every video; returns how many could not be read."""
    check_settings(args)
    device, paths = choose_device(args.device), list_videos(args)
    training = read_training(args.model)
    changes = {} if args.mask_ratio is None else {"mask_ratio": args.mask_ratio}
    model = load_pretrain_model(load_weights(args.model), **changes).to(device)
    if args.compare_masks is not None:
        for rule in panels.COMPARED:
            visible_count(rule, args.compare_masks, model.window)
    settings = {
        "error_top": args.error_top,
        "fps": args.fps,
        "compare_masks": args.compare_masks,
        "show_visible": args.visible,
        "seed": args.seed,
        "normalization": training.normalization,
        "normalize_target": training.normalize_target,
    }
    if args.normalize_target is not None:
        settings["normalize_target"] = args.normalize_target == "true"

    failed, rate = 0, args.sampling_rate or training.sampling_rate
    for path, name in zip(tqdm(paths, unit="video", disable=None), picture_names(paths), strict=True):
        try:
            pixels = load_clip(path, model, sampling_rate=rate, decoder=args.decoder)
        except VideoError as error:
            failed += 1
            tqdm.write(f"visualize.py: {error}", file=sys.stderr)
            continue
        files = draw_clip(model, pixels.to(device), Path(args.output) / name, str(name), **settings)
        tqdm.write(f"{path} -> {', '.join(files)}")
    return failed


def main() -> None:
    args = get_args_parser().parse_args()
    try:
        failed = draw(args)
    except (CheckpointError, ValueError, OSError) as error:
        raise SystemExit(f"visualize.py: error: {error}") from error
    if failed:
        raise SystemExit(f"visualize.py: error: {failed} of the videos could not be read, see above")


if __name__ == "__main__":
    main()
