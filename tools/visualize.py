"""Draws what a pre-trained model does with videos: video | probability | mask | prediction | error.

    python tools/visualize.py --model output/checkpoint-799.pth --output output/pictures a.mp4 folder
    python tools/visualize.py --model output/checkpoint-799.pth --list val.csv --output output/pictures

Takes checkpoints of this repository and of the published AdaMAE, VideoMAE and MAE-ST code. It shows the middle of each
video: a clip of the model's length, its central square resized to the model's input. The files are written below
--output and named after the video, with as many of its folders as it takes to keep names apart:

    <video>.gif          the five panels side by side, frame by frame (or .webp, --animation)
    <video>.png          the same as rows, with a column for every time slot of two frames
    <video>_rows.png     with --three_rows: original, masked, reconstruction, as in the papers
    <video>_masks.png    with --compare_masks: random, tube, frame and adaptive masks at one ratio

A model trained on normalised patches does not predict their mean and deviation. The picture takes both from the
original, so brightness and contrast of the prediction are not the model's work. Where predictions can't be drawn,
because the model was trained on another target, the panel says so.

A video that can't be read is reported and skipped; the exit status is then 1.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from augment import COLOUR_STATISTICS, to_pixels
from clips.class_names import ClassNames, number_lists
from clips.decoders import DECODERS, resolve_decoder
from clips.lists import ListError, read_list
from clips.transforms import View, apply_view
from clips.video import open_video
from clips.video_index import VideoError
from datasets import FRAME_RULES
from masking_generator import visible_count
from modeling_blocks import TUBELET
from modeling_finetune import colour_statistics
from modeling_pretrain import PRETRAIN_MODELS, PretrainVisionTransformer
from pictures import panels
from pictures.drawing import ANIMATIONS, animation, filmstrip, save_animation
from pictures.reconstruction import SHOW_VISIBLE, PictureSettings, reconstruct
from tools.inference.trained import find_videos, run_tool
from utils import SettingError, UserError, choose_device, counted, whole_file
from weights.names import Weights, load_weights
from weights.pretraining import load_pretrain_model, pretrain_settings, trained_target
from weights.teachers import load_same


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("visualize.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="CKPT",
        help="pre-training checkpoint: a file, a folder of DeepSpeed or Hugging Face, or a repository of its hub")
    add("videos", nargs="*", metavar="VIDEO", help="video files, and folders to search for them")
    add("--list", metavar="FILE", help="instead of them, a list of videos, `path [label]` a line")
    add("--data_root", metavar="DIR", help="folder that paths in the list start from (default: the list's)")
    add("--labels", metavar="FILE", help="class names of the list, one a line, for the headings (default: the list's)")
    add("--num_clips", type=int, default=8, help="videos of the list, spread evenly (default: %(default)s)")
    add("--output", required=True, metavar="DIR", help="folder for the pictures")
    add("--teacher", default="", metavar="FILE",
        help="--teacher that the model was trained with, for the error (default: the file that its run had)")
    add("--tokenizer", default="", metavar="FILE", help="the same of a model that was trained with --tokenizer")
    add("--mask_ratio", type=float, help="share of tokens hidden (default: as in the checkpoint)")
    add("--visible", choices=SHOW_VISIBLE, default="pasted",
        help="what the prediction shows at visible patches: the original, or the decoder's output there, "
             "which no loss has trained (default: %(default)s)")
    add("--compare_masks", nargs="?", type=ratio_or_video, const=0.8, metavar="RATIO",
        help="compare the masking rules, at this ratio (0.8 where none is given)")
    add("--three_rows", action="store_true", help="also draw the papers' figure: original, masked, reconstruction")
    add("--error_top", type=float,
        help="end of the error's colour scale (default: 2 for normalised pixels, else the largest error)")
    add("--normalize_target", choices=["true", "false"],
        help="whether the model predicts normalised targets (default: as trained, true if unknown)")
    add("--sampling", choices=list(FRAME_RULES), help="frame rule (default: as trained)")
    add("--sampling_rate", type=int, help="frames of the video from one to the next (default: as trained, 4)")
    add("--fps", type=float, default=8, help="frames per second of the moving picture (default: %(default)s)")
    add("--animation", choices=list(ANIMATIONS), default="gif",
        help="format of the moving picture; a WebP is a third as large (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the masks (default: %(default)s)")
    add("--decoder", choices=["auto", *DECODERS], default="auto", help="video decoder")
    add("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    return parser
# fmt: on


def ratio_or_video(text: str) -> float | str:
    """What follows --compare_masks: its ratio, or else the first video."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line; videos may stand anywhere in it."""
    args = get_args_parser().parse_intermixed_args(argv)
    if isinstance(args.compare_masks, str):
        args.videos.insert(0, args.compare_masks)
        args.compare_masks = 0.8
    return args


def read_training(settings: dict, flags: dict, *, patch: int, **target) -> tuple[PictureSettings, dict]:
    """What pictures must know of a model's training, and its frame rule and rate; missing flags get published defaults.

    `target` are further settings of `trained_target`.
    """
    family = PRETRAIN_MODELS[settings["name"]]
    statistics = colour_statistics(family.statistics, imagenet=flags.get("imagenet_default_mean_and_std", True))
    shown = PictureSettings(
        target=trained_target(settings, flags, patch=patch, **target), normalization=COLOUR_STATISTICS[statistics]
    )
    return shown, {"sampling": flags.get("sampling") or family.sampling, "sampling_rate": flags.get("sampling_rate", 4)}


def check_settings(args: argparse.Namespace) -> None:
    """Validates the flags.

    Raises:
        SettingError: the message says what to change.
    """
    if bool(args.videos) == bool(args.list):
        raise SettingError("name the videos to draw, or their --list, and not both")
    for name in ("num_clips", "sampling_rate"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SettingError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.labels and not args.list:
        raise SettingError("--labels names the classes of a --list, which is missing")
    if not 0 < args.fps <= 50:
        raise SettingError(f"--fps {args.fps:g} must lie between 0 and 50; players show a GIF no faster")
    if args.error_top is not None and args.error_top <= 0:
        raise SettingError(f"--error_top {args.error_top:g} must be above 0")
    resolve_decoder(args.decoder)


def list_videos(args: argparse.Namespace) -> list[str]:
    """The videos to draw, each once.

    Raises:
        ListError, SettingError: the list can't be used, or a folder holds no video.
    """
    if args.videos:
        return list(find_videos(args.videos))
    videos = read_list(args.list, args.data_root)
    chosen = np.linspace(0, len(videos) - 1, min(args.num_clips, len(videos)), dtype=int)
    return list(dict.fromkeys(videos[i].path for i in chosen.tolist()))


def list_classes(args: argparse.Namespace) -> dict[str, str]:
    """The name of each video's class by its path, from the list or by --labels; empty where there are no names.

    Raises:
        ListError: the names can't be read, or the list has a class without one.
    """
    if not args.list:
        return {}
    videos = read_list(args.list, args.data_root)
    names = number_lists({"list": videos}, labels=args.labels) if args.labels else ClassNames(videos.class_names)
    if names.names and videos.labels.max() >= len(names.names):
        raise ListError(f"{names.source} has {len(names.names)} names, but {args.list} the label {videos.labels.max()}")
    return {video.path: names.names[video.label] for video in videos if names.names and video.label is not None}


def picture_names(paths: Sequence[str]) -> list[Path]:
    """Names the pictures of each video: its path below the folder that all videos share, without the suffix.

    The suffix stays where two videos differ in nothing else.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    names = [path.relative_to(shared) for path in whole]
    count = Counter(name.with_suffix("") for name in names)
    return [name if count[name.with_suffix("")] > 1 else name.with_suffix("") for name in names]


def load_clip(
    path: str, model: PretrainVisionTransformer, *, sampling: str = "pretrain", sampling_rate: int, decoder: str
) -> Tensor:
    """The middle of a video as the model takes it: pixels (1,3,T,S,S) in [0,1]; `sampling` is a key of `FRAME_RULES`.

    Raises:
        VideoError: it can't be read.
    """
    num_frames, size = model.window[0] * TUBELET, model.window[1] * model.patch
    with open_video(path, decoder) as video:
        frames = video.get_frames(FRAME_RULES[sampling].clip(video, num_frames, sampling_rate, None))  # (T,3,H,W)
    height, width = frames.shape[-2:]
    side = min(height, width)
    view = View((width - side) // 2, (height - side) // 2, side, side)
    return to_pixels(apply_view(frames, view, size)).transpose(0, 1)[None]  # (1,3,T,S,S)


def save_png(path: str, picture: np.ndarray) -> None:
    with whole_file(path) as file:
        Image.fromarray(picture).save(file, format="png")


def draw_clip(
    model: PretrainVisionTransformer,
    pixels: Tensor,
    settings: PictureSettings,
    output: Path,
    heading: str,
    args: argparse.Namespace,
) -> list[str]:
    """Writes the pictures of one clip (1,3,T,H,W) to files that begin with `output`; returns them."""
    ratio = args.compare_masks
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [f"{output}.{args.animation}", f"{output}.png"]
    rec = reconstruct(model, pixels, settings)
    five = panels.five_panels(rec)
    save_animation(files[0], animation(five, heading=heading), args.fps)
    save_png(files[1], filmstrip(five, heading=heading))
    if args.three_rows:
        files.append(f"{output}_rows.png")
        save_png(files[-1], filmstrip(panels.three_rows(rec), heading=heading))
    if ratio is not None:
        files.append(f"{output}_masks.png")
        compared = panels.mask_panels(model, pixels, settings, mask_ratio=ratio)
        save_png(files[-1], filmstrip(compared, heading=f"{heading}, {ratio:.4g} of the patches masked by each rule"))
    return files


def find_frozen(args: argparse.Namespace, found: Weights, model: PretrainVisionTransformer) -> dict:
    """The frozen network of the model's target: that of the flags, else the file that the run had, if it is there."""
    named = {name: getattr(args, name) for name in ("teacher", "tokenizer")}
    had = {name: found.flags.get(name) or "" for name in named}
    try:
        if any(named.values()):
            network = load_same(pretrain_settings(found), model, **named)
        elif any(Path(file).exists() for file in had.values() if file):
            network = load_same(pretrain_settings(found), model, **had)
        else:
            return {}
    except UserError as error:
        if any(named.values()):
            raise
        print(f"visualize.py: {error}", file=sys.stderr)
        return {}
    return {"teacher": network.place(next(model.parameters()).device, None)}


def load_model(args: argparse.Namespace) -> tuple[PretrainVisionTransformer, PictureSettings, dict]:
    """The model of the flags on its device, what its pictures show, and the frame rule and rate of its clips.

    Raises:
        SettingError: the device, the target or a mask ratio can't be used.
        CheckpointError: as `load_pretrain_model`.
    """
    device, found = choose_device(args.device), load_weights(args.model)
    changes = {} if args.mask_ratio is None else {"mask_ratio": args.mask_ratio}
    model = load_pretrain_model(found, **changes).to(device)
    if args.compare_masks is not None:
        for rule in panels.COMPARED:
            visible_count(rule, args.compare_masks, model.window)
    given = {} if args.normalize_target is None else {"normalize_target": args.normalize_target == "true"}
    given |= {name: value for name in ("sampling", "sampling_rate") if (value := getattr(args, name)) is not None}
    frozen = find_frozen(args, found, model)
    settings, clips = read_training(pretrain_settings(found), found.flags | given, patch=model.patch, **frozen)
    return model, replace(settings, show_visible=args.visible, error_top=args.error_top, seed=args.seed), clips


def draw(args: argparse.Namespace) -> int:
    """Draws every video; returns how many could not be read."""
    check_settings(args)
    paths = list_videos(args)
    print(counted(len(paths), "video"), flush=True)
    classes = list_classes(args)
    model, settings, clips = load_model(args)
    failed = 0
    for path, name in zip(tqdm(paths, unit="video", disable=None), picture_names(paths), strict=True):
        try:
            pixels = load_clip(path, model, **clips, decoder=args.decoder)
        except VideoError as error:
            failed += 1
            tqdm.write(f"visualize.py: {error}", file=sys.stderr)
            continue
        heading = f"{name}: {classes[path]}" if path in classes else str(name)
        pixels = pixels.to(next(model.parameters()).device)
        files = draw_clip(model, pixels, settings, Path(args.output) / name, heading, args)
        tqdm.write(f"{path} -> {', '.join(files)}")
    return failed


def main() -> None:
    args = parse_args()
    run_tool("visualize.py", lambda: draw(args))


if __name__ == "__main__":
    main()
