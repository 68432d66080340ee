"""Extract features of videos with a pre-trained or fine-tuned model.

    python tools/extract_features.py --model output/checkpoint-799.pth --output features folder
    python tools/extract_features.py --model output/checkpoint-799.pth --output features --window 16 video.mp4

Of each video the middle clip is shown to the model, as in a test on one view; with --window all clips of
--num_frames frames, --sampling_rate apart, that start --window frames after one another and end within the
video (one, its last frame repeated, if the video is shorter). The central square is shown. --pool says what is
kept of each of the W clips:

    mean      (W,D)          the vector that the head classifies: the mean of all tokens, normalised (the first
                             token in a model that classifies that, all slots in one with --slot_pooling,
                             what the linear layer sees in a probe)
    frame     (W,T',D)       the same for each time slot of a tubelet, commonly 2 frames
    tokens    (W,T',H',W',D) every token after the last block, not normalised, without the class token

AdaMAE and VideoMAE normalise tokens in pre-training and their mean in a classifier. So the final norm of their
pre-training checkpoints is new: it standardises the mean, without weights.

Written below --output for each video, by its path below the folder that all arguments share: as safetensors
`features` and `frames`, the frames (W,T) int64 that each clip shows, with the settings as JSON in the metadata
`about`; or as `.npy`, with settings and frames in a `.json` beside it.

A run that was stopped goes on where it was: a file is written whole or not at all, and videos that have one are
passed over. A file made with other settings or weights is refused, unless --overwrite. A video that can't be
read is reported and the others go on; the exit status is then 1.
"""

import argparse
import json
import os
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from clips.video import Video, open_video
from clips.video_index import VideoError
from datasets import FRAME_RULES
from runs.checkpoints import CheckpointError
from tools.inference.trained import (
    ClipSettings,
    Trained,
    check_flags,
    encoder_of,
    find_videos,
    inference_parser,
    load_trained,
)

POOLS = ("mean", "frame", "tokens")
FRAME_BYTES = 2**28  # frames of one video held at a time, before they are cropped


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = inference_parser("extract_features.py", __doc__)
    add = parser.add_argument_group("features").add_argument
    add("--output", required=True, metavar="DIR", help="folder for the files")
    add("--window", type=int, metavar="FRAMES",
        help="frames from the start of a clip to the start of the next (default: the middle clip only)")
    add("--pool", choices=POOLS, default="mean", help="what to keep of a clip (default: %(default)s)")
    add("--format", choices=["safetensors", "npy"], default="safetensors", help="of files (default: %(default)s)")
    add("--dtype", choices=["float32", "float16"], default="float32", help="of features (default: %(default)s)")
    add("--overwrite", action="store_true", help="make every file anew")
    return parser
# fmt: on


# --- clips --------------------------------------------------------------------------------------------------


def sliding_windows(num_frames: int, clip_len: int, rate: int, stride: int) -> np.ndarray:
    """Frames of the clips that start at 0, stride, 2*stride, ... and end within the video: int64 (W,T).

    There is one at least: in a video shorter than a clip it ends in copies of the last frame.
    """
    span = (clip_len - 1) * rate + 1
    starts = np.arange(0, max(num_frames - span, 0) + 1, stride)
    return np.minimum(starts[:, None] + rate * np.arange(clip_len), num_frames - 1)


class Window(NamedTuple):
    """One clip uint8 (3,T,S,S) of a video: the video's number, the frames shown, and whether it's the last."""

    video: int
    frames: np.ndarray
    clip: Tensor | None
    last: bool


class Unreadable(NamedTuple):
    """A video that has no more windows, and why."""

    video: int
    reason: str


class Windows(IterableDataset):
    """The windows of many videos, one after the other, each video's in order; workers share out the videos.

    stride: see `sliding_windows`; None for the middle clip alone.
    """

    def __init__(self, *, paths: Sequence[str], clips: ClipSettings, stride: int | None, decoder: str):
        self.paths = list(paths)
        self.clips = clips
        self.stride = stride
        self.decoder = decoder
        self.crop = clips.make_crops(1)

    def __iter__(self) -> Iterator[Window | Unreadable]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.paths), step):
            try:
                with open_video(self.paths[number], self.decoder) as video:
                    yield from self._windows(number, video)
            except VideoError as error:
                yield Unreadable(number, str(error.reason))

    def _windows(self, number: int, video: Video) -> Iterator[Window]:
        frames = self._frame_indices(video)  # (W,T)
        at_once = max(1, FRAME_BYTES // (3 * video.size[0] * video.size[1] * frames.shape[1]))
        for start in range(0, len(frames), at_once):
            part = frames[start : start + at_once]
            distinct, place = np.unique(part, return_inverse=True)
            shown = self.crop(video.get_frames(distinct))[0]  # (U,3,S,S)
            for k, where in enumerate(torch.from_numpy(place.reshape(part.shape))):
                last = start + k + 1 == len(frames)
                yield Window(number, part[k], shown[where].transpose(0, 1), last)

    def _frame_indices(self, video: Video) -> np.ndarray:
        c = self.clips
        if self.stride is None:
            return FRAME_RULES[c.sampling].views(video, c.num_frames, c.sampling_rate, 1)
        return sliding_windows(video.num_frames, c.num_frames, c.sampling_rate, self.stride)


def collate(items: list[Window | Unreadable]) -> tuple[list[Window | Unreadable], Tensor | None]:
    """Items -> the same without their clips, and the n clips stacked: uint8 (n,3,T,S,S), None for n = 0."""
    clips = [item.clip for item in items if isinstance(item, Window)]
    items = [item._replace(clip=None) if isinstance(item, Window) else item for item in items]
    return items, torch.stack(clips) if clips else None


# --- features -----------------------------------------------------------------------------------------------


def clip_features(clips: Tensor, *, model: nn.Module, pool: str) -> Tensor:
    """Normalised clips (B,3,T,H,W) -> features, as the program says: (B,D), (B,T',D) or (B,T',H',W',D)."""
    if pool == "mean":
        return model.forward_features(clips)
    encoder = encoder_of(model)
    tokens = encoder.forward_tokens(clips).unflatten(1, encoder.window)  # (B,T',H',W',D)
    return tokens if pool == "tokens" else encoder.final_norm(tokens.mean((2, 3)))


class Features(NamedTuple):
    """The features of the W clips of one video, and the frames int64 (W,T) that each shows."""

    features: np.ndarray
    frames: np.ndarray


def extract(
    trained: Trained, loader: DataLoader, *, pool: str, dtype: str
) -> Iterator[tuple[int, Features | str]]:
    """For each video its number and its features, or the reason why it can't be read."""
    function = partial(clip_features, model=trained.model, pool=pool)
    under_way = defaultdict(list)  # (frames, features) of the windows so far, by video
    for items, clips in loader:
        rows = iter(() if clips is None else trained.run(function, clips).numpy().astype(dtype))
        for item in items:
            if isinstance(item, Unreadable):
                under_way.pop(item.video, None)
                yield item.video, item.reason
                continue
            under_way[item.video].append((item.frames, next(rows)))
            if item.last:
                frames, features = zip(*under_way.pop(item.video))
                yield item.video, Features(np.stack(features), np.stack(frames))


def checksum(model: nn.Module) -> str:
    """CRC-32 of all weights: tells a checkpoint from another that was later written under its name."""
    crc = 0
    for value in model.state_dict().values():
        crc = zlib.crc32(value.cpu().contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


# --- files --------------------------------------------------------------------------------------------------


def file_names(videos: Sequence[Path], kind: str) -> list[Path]:
    """The file of each video: its path with another suffix, or one more where two differ in nothing else."""
    count = Counter(video.with_suffix("") for video in videos)
    stems = [video if count[video.with_suffix("")] > 1 else video.with_suffix("") for video in videos]
    return [stem.with_name(f"{stem.name}.{kind}") for stem in stems]


@contextmanager
def whole_file(path: Path):
    """A binary file to write to, that stands under its name only once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_features(path: Path, found: Features, about: dict) -> None:
    """Writes safetensors or, by the suffix, npy: last, so that where it is the JSON beside it is its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        arrays = {k: np.ascontiguousarray(v) for k, v in found._asdict().items()}  # save() takes memory as it lies
        with whole_file(path) as f:
            f.write(save(arrays, metadata={"about": json.dumps(about)}))
        return
    path.unlink(missing_ok=True)
    with whole_file(path.with_suffix(".json")) as f:
        f.write((json.dumps({**about, "frames": found.frames.tolist()}) + "\n").encode())
    with whole_file(path) as f:
        np.save(f, found.features)


def read_about(path: Path) -> dict | None:
    """The settings that a file of features was made with; None where it is missing or not whole."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as f:
                return json.loads((f.metadata() or {}).get("about", "{}"))
        np.load(path, mmap_mode="r")
        return json.loads(path.with_suffix(".json").read_text())
    except (FileNotFoundError, SafetensorError, ValueError, EOFError):
        return None


def is_done(path: Path, settings: dict) -> bool:
    """Whether a whole file is there. Raises ValueError for one that was made with other settings."""
    about = read_about(path)
    for name in settings if about is not None else ():
        if about.get(name) != settings[name]:
            raise ValueError(
                f"{path} was made with {name} = {about.get(name)}, this run has {name} = {settings[name]}: "
                "choose another --output, or --overwrite"
            )
    return about is not None


# --- the program --------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Extracts what is missing; returns how many videos could not be read."""
    check_flags(args, "window")
    videos, output = find_videos(args.videos), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    trained = load_trained(args, lambda text: print(text, file=sys.stderr), headless=True)
    settings = {
        "pool": args.pool,
        "window": args.window,
        "dtype": args.dtype,
        "amp": str(trained.amp or torch.float32).removeprefix("torch."),
        "weights": checksum(trained.model),
        **{name: value for name, value in trained.clips._asdict().items() if name not in ("segments", "crops")},
    }
    files = file_names(list(videos.values()), args.format)
    todo = []
    for (path, name), file in zip(videos.items(), files, strict=True):
        own = {"video": name.as_posix(), **settings}
        if args.overwrite or not is_done(output / file, own):
            todo.append((path, output / file, own))

    dataset = Windows(
        paths=[path for path, _, _ in todo], clips=trained.clips, stride=args.window, decoder=args.decoder
    )
    workers = min(args.num_workers, len(todo)) if len(todo) > 1 else 0
    loader = DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate, num_workers=workers)
    failed = 0
    extracted = extract(trained, loader, pool=args.pool, dtype=args.dtype)
    for number, found in tqdm(extracted, total=len(todo), unit="video", disable=None):
        path, target, own = todo[number]
        if isinstance(found, str):
            failed += 1
            tqdm.write(f"extract_features.py: {path}: {found}", file=sys.stderr)
            continue
        write_features(target, found, {"model": args.model, **own})
    there = len(videos) - len(todo)
    print(f"{len(videos)} videos: {len(todo) - failed} written, {there} there already, {failed} unreadable")
    return failed


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    try:
        failed = run(args)
    except (CheckpointError, ValueError, OSError) as error:
        raise SystemExit(f"extract_features.py: error: {error}") from error
    if failed:
        raise SystemExit(f"extract_features.py: error: {failed} of the videos could not be read, see above")


if __name__ == "__main__":
    main()
