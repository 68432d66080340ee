"""CPU milliseconds of a training clip, beside a plain loader on the same frames and crops.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --output benchmarks/results/loader.json
    OMP_NUM_THREADS=1 python benchmarks/loader.py --height 720 --width 1280 --num_videos 4

torchcodec may need `export LD_LIBRARY_PATH=$PWD/.venv/ffmpeg` (PRETRAIN.md).

A clip is 16 frames, every 4th, from a random place, cut by the multi-scale crop to 224 x 224 pixels, as
run_mae_pretraining.py loads it. The videos are made here: 10 s of moving textures with grain at 30 frames a second,
H.264 with B-frames, a key frame every 250 frames, and sound; and the same after tools/prepare_videos.py.

- "plain": decord and PIL, as training code commonly has it: VideoReader, get_batch, PIL images, crop and resize,
  float tensor, normalisation.
- "in process": our dataset, with `--decode_timeout 0`; "first": the first opening of a file, "again": a later one.
- "isolated": a later opening with a time limit, in the child process that each data worker has.

Milliseconds are CPU time, of all processes and threads involved, per clip: median and quartiles over the clips.
Ours returns uint8; normalisation happens on the device and is listed apart. "aa" is the share of RandAugment in
loading a fine-tuning clip.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from reports import Report, Spread
from sources import FPS, bit_rate, prepare, write_sources

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from augment import IMAGENET_MEAN, IMAGENET_STD, normalize, to_pixels
from clips.decoders import DECODERS, resolve_decoder
from clips.finetune_transforms import build_finetune_transform
from clips.frame_indices import pretrain_clip
from clips.lists import VideoList, read_list
from clips.transforms import ClipTransform, MultiScaleCrop, build_pretrain_transform
from datasets import ClipSettings, TrainDataset
from utils import SettingError

CLIP, STRIDE, SIZE = 16, 4, 224
CPU = torch.device("cpu")
PACKAGES = ("av", "decord", "torchcodec", "torchvision", "pillow")


def plain_clip(path: str, rng: np.random.Generator) -> torch.Tensor:
    """A clip as decord and PIL make it: float32 (3,T,S,S), normalised."""
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    frames = reader.get_batch(pretrain_clip(len(reader), CLIP, STRIDE, rng)).asnumpy()  # (T,H,W,3)
    pictures = [Image.fromarray(frame) for frame in frames]
    left, top, width, height, _ = MultiScaleCrop(size=SIZE).draw(*pictures[0].size, rng)
    box = (left, top, left + width, top + height)
    pictures = [p.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for p in pictures]
    clip = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))  # (T,S,S,3)
    clip = clip.permute(3, 0, 1, 2).contiguous().float().div_(255)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return clip.sub_(mean).div_(std)


def process_clock(pid: int) -> int:
    """The clock of the CPU time of a process, by Linux's rule for their numbers."""
    return (~pid << 3) | 2


def milliseconds(work: Callable[[int], object], numbers: range, pids: list[int] = ()) -> list[float]:
    """CPU time of work(number) for each number, in this process and others."""
    taken = []
    for number in numbers:
        before = time.process_time() + sum(time.clock_gettime(process_clock(pid)) for pid in pids)
        work(number)
        after = time.process_time() + sum(time.clock_gettime(process_clock(pid)) for pid in pids)
        taken.append(1e3 * (after - before))
    return taken


def ours(
    videos: VideoList, decoder: str, transform: ClipTransform, epochs: int, *, timeout: float = 0, **settings
) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of clips from files opened for the first time, and of the same clips again: one array each."""
    settings = {"sampling": "pretrain", "num_frames": CLIP, "sampling_rate": STRIDE, "num_sample": 1, **settings}
    clips = ClipSettings(decoder=decoder, decode_timeout=timeout, **settings)
    first, again = [], []
    for epoch in range(epochs):
        dataset = TrainDataset(videos=videos, transform=transform, settings=clips, max_tries=1)
        dataset[epoch, 0]  # starts the child, and loads what is loaded at first use
        pids = [dataset.load._child.pid] if timeout else []
        for taken in (first, again):
            taken += milliseconds(partial(load_ours, dataset, epoch), range(1, len(videos)), pids)
        dataset.load.stop()
    return tuple(np.array(taken) / clips.num_sample for taken in (first, again))


def load_ours(dataset: TrainDataset, epoch: int, number: int) -> None:
    dataset[epoch, number]


def load_plain(videos: VideoList, epoch: int, number: int) -> None:
    """The same frames and crop as the dataset takes."""
    plain_clip(videos[number].path, np.random.default_rng([0, epoch, number]))


def plain(videos: VideoList, epochs: int) -> Spread:
    """Milliseconds of a clip of the plain loader."""
    load_plain(videos, 0, 0)
    numbers = range(1, len(videos))
    return Spread.of([t for epoch in range(epochs) for t in milliseconds(partial(load_plain, videos, epoch), numbers)])


def pretraining_rows(kind: str, videos: VideoList, decoders: list[str], epochs: int) -> list[dict]:
    """The table's rows for one kind of files."""
    peer = plain(videos, epochs) if "decord" in decoders else None
    columns = ("first, in process", "again, in process", "again, isolated", "in process / plain", "isolated / plain")
    rows = [{"files": kind, "loader": "plain", "clips a decode": 1, **dict.fromkeys(columns), columns[1]: peer}]
    crop = build_pretrain_transform("multi_scale", size=SIZE)
    for decoder in decoders:
        for count in (1, 4):
            taken = [ours(videos, decoder, crop, epochs, num_sample=count, timeout=timeout) for timeout in (0, 600)]
            first, again, isolated = (Spread.of(one) for one in (*taken[0], taken[1][1]))
            ratios = [found.median / peer.median if peer else None for found in (again, isolated)]
            cells = dict(zip(columns, (first, again, isolated, *ratios), strict=True))
            rows.append({"files": kind, "loader": f"ours, {decoder}", "clips a decode": count, **cells})
    return rows


def finetuning_rows(videos: VideoList, policy: str, epochs: int) -> list[dict]:
    """Milliseconds of a fine-tuning clip with and without RandAugment, whose share compares means: clips vary."""
    rows, means = [], {}
    for aa in ("none", policy):
        transform = build_finetune_transform(size=SIZE, flip=True, aa=aa, color_jitter=0)
        _, taken = ours(videos, "auto", transform, epochs, sampling="dense")
        means[aa] = float(taken.mean())
        share = f"{1 - means['none'] / means[aa]:.0%}"
        rows.append({"aa": aa, "in process": Spread.of(taken), "mean": means[aa], "share of aa": share})
    return rows


def usable_decoders(report: Report) -> list[str]:
    """The decoders that work here; says why the others don't."""
    usable = []
    for decoder in DECODERS:
        try:
            usable.append(resolve_decoder(decoder))
        except SettingError as error:
            report.line(f"{decoder} not measured", str(error.__cause__))
    return usable


def measure(report: Report, args: argparse.Namespace, scratch: Path) -> None:
    size = {"seconds": args.seconds, "height": args.height, "width": args.width}
    lists = {"as made": write_sources(scratch / "made", args.num_videos, **size)}
    lists["prepared"] = prepare(lists["as made"], scratch / "prepared", "--short_side", args.short_side)
    for kind, path in lists.items():
        report.line(f"Videos {kind}", bit_rate(path, args.seconds))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    decoders, videos = usable_decoders(report), {kind: read_list(path) for kind, path in lists.items()}
    rows = [row for kind in videos for row in pretraining_rows(kind, videos[kind], decoders, args.epochs)]
    report.table("Milliseconds of CPU time per pre-training clip", rows)
    clips = torch.zeros(1, 3, CLIP, SIZE, SIZE, dtype=torch.uint8)
    apart = Spread.of(milliseconds(lambda _: normalize(to_pixels(clips)), range(20))[5:])
    report.line("Normalisation of one clip, on this CPU", f"{apart} ms")
    rows = finetuning_rows(videos["prepared"], args.aa, 4 * args.epochs)
    report.table(f"Milliseconds per fine-tuning clip of a prepared video, decoder {resolve_decoder('auto')}", rows)
    report.write()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_videos", type=int, default=13, help="one is for warming up (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="length of each (default: %(default)s)")
    parser.add_argument("--height", type=int, default=256, help="of the videos (default: %(default)s)")
    parser.add_argument("--width", type=int, default=340, help="of the videos (default: %(default)s)")
    parser.add_argument("--short_side", type=int, default=320, help="of prepared ones (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="clips of each video (default: %(default)s)")
    parser.add_argument("--aa", default="rand-m7-n4-mstd0.5-inc1", help="RandAugment's policy (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    clip = f"{CLIP} frames, every {STRIDE}th, {SIZE} x {SIZE} pixels"
    videos = f"{args.num_videos} of {args.seconds:g} s, {args.width} x {args.height}, {FPS} frames a second"
    report = Report(args.output, CPU, **versions, videos=videos, clips=clip, epochs=args.epochs)
    with tempfile.TemporaryDirectory() as scratch:
        measure(report, args, Path(scratch))


if __name__ == "__main__":
    main()
