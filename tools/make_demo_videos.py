"""Makes a small video data set in which only motion tells the classes apart, never appearance.

    python tools/make_demo_videos.py --output output/demo_videos

Ten motions, as in Something-Something: left, right, up, down, rotate clockwise or counter-clockwise, approach,
recede, together, apart. One or two bright, textured sprites move over a soft, muted background that sometimes
pans; often there is also a sprite that stays still. Sprites, colours, sizes and positions have the same
distribution for every motion.

Written below --output:

    train.csv val.csv test.csv     lines `path label`, with paths relative to the list
    labels.txt                     the names of the labels 0, 1, ...
    train/00000.mp4 ...            H.264, --num_frames frames of --size x --size pixels
    train/00000.npz ...            `mask`: bool (T,H,W), True on the moving sprites
    settings.json                  --seed, --num_frames, --size and --crf of the videos

Video i of a split depends only on (--seed, split, i). A run that was stopped continues where it was, since videos
are written whole or not at all.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the top of the repository

from tools.preparing.planning import record_settings
from utils import SettingError, UserError, whole_file

MOTIONS = ("left", "right", "up", "down", "rotate_cw", "rotate_ccw", "approach", "recede", "together", "apart")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x right, y down
SPLITS = ("train", "val", "test")

# Looks of sprites: number and depth of the outline's lobes, texture, dark and light colour.
LOOKS = (
    (5, 0.16, "sectors", (232, 72, 85), (255, 214, 170)),  # a red flower
    (3, 0.10, "stripes", (20, 140, 170), (190, 245, 225)),  # a teal pebble
    (0, 0.00, "halves", (245, 150, 20), (255, 240, 150)),  # an orange ball
    (4, 0.12, "swirl", (110, 80, 215), (225, 205, 255)),  # a violet cushion
    (6, 0.10, "halves", (30, 160, 90), (210, 250, 150)),  # a green gear
    (2, 0.20, "stripes", (220, 60, 150), (255, 205, 230)),  # a pink bean
    (5, 0.22, "halves", (240, 190, 30), (255, 250, 215)),  # a yellow star
    (0, 0.00, "sectors", (40, 100, 225), (195, 230, 255)),  # a blue beach ball
)
# Muted backgrounds: dark and light tone.
TONES = (
    ((38, 50, 78), (176, 188, 208)),
    ((66, 46, 70), (206, 184, 200)),
    ((34, 66, 62), (176, 204, 190)),
    ((76, 60, 42), (210, 196, 172)),
)


def mix(deep: tuple, light: tuple, amount: np.ndarray) -> np.ndarray:
    """Blends two RGB colours by `amount` (...) in [0,1]; returns float32 (...,3)."""
    deep, light = np.float32(deep), np.float32(light)
    return deep + (light - deep) * amount[..., None]


def texture(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Lightness of a sprite, in [0,1], in its own coordinates (the outline is near radius 1)."""
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    wave = {
        "halves": lambda: np.tanh(3 * x),
        "stripes": lambda: np.sin(4.2 * x + 0.6),
        "sectors": lambda: np.sin(2 * angle) * np.minimum(1, 2 * radius),
        "swirl": lambda: np.sin(angle + 3 * radius) * np.minimum(1, 2 * radius),
    }[kind]()
    return 0.5 + 0.42 * wave


def paint_sprite(look: tuple, pose: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws one sprite in every frame.

    Args:
        pose: (T,4), centre x, centre y, radius and angle; lengths are fractions of the frame's side.
        x: (1,H,W), the pixels' centres, and so is y.

    Returns:
        Colour (T,H,W,3) and coverage (T,H,W) in [0,1], antialiased.
    """
    lobes, depth, kind, deep, light = look
    cx, cy, radius, angle = (pose[:, k, None, None] for k in range(4))
    dx, dy = (x - cx) / radius, (y - cy) / radius
    c, s = np.cos(angle), np.sin(angle)
    u, v = c * dx + s * dy, c * dy - s * dx  # the sprite's own coordinates
    reach = np.hypot(dx, dy)
    rim = 1 + depth * np.cos(lobes * np.arctan2(v, u))
    pixel = (x[0, 0, 1] - x[0, 0, 0]) / radius
    coverage = np.clip((rim - reach) / (1.5 * pixel) + 0.5, 0, 1)
    glow = np.exp(-3 * ((dx + 0.35) ** 2 + (dy + 0.4) ** 2))  # lit from the upper left
    shade = 1.02 - 0.32 * np.minimum(reach / rim, 1.2) ** 2 + 0.12 * glow
    return mix(deep, light, texture(kind, u, v)) * shade[..., None], coverage


def paint_background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, progress: np.ndarray) -> np.ndarray:
    """A soft pattern in two muted tones, float32 (T,H,W,3); one in eight pans slowly."""
    deep, light = TONES[rng.integers(len(TONES))]
    heading, pan = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.16) * (rng.random() < 0.12)
    shift = (pan * progress)[:, None, None]
    x, y = x + np.cos(heading) * shift, y + np.sin(heading) * shift
    field = np.zeros_like(x + y)
    for _ in range(3):
        direction, waves, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.2), rng.uniform(0, 2 * np.pi)
        field += np.sin(2 * np.pi * waves * (np.cos(direction) * x + np.sin(direction) * y) + phase)
    return mix(deep, light, 0.5 + 0.65 * np.tanh(0.65 * field))


def poses(motion: str, rng: np.random.Generator, progress: np.ndarray) -> list[np.ndarray]:
    """The paths of the moving sprites: one or two arrays (T,4) of centre x, centre y, radius, angle."""
    pair = motion in ("together", "apart") or rng.random() < 0.4
    count, radius = (2, rng.uniform(0.135, 0.17)) if pair else (1, rng.uniform(0.18, 0.24))
    axis, middle = rng.uniform(0, 2 * np.pi), 0.5 + rng.uniform(-0.12, 0.12, 2)
    speed, swing = rng.uniform(0.30, 0.42), np.radians(rng.uniform(110, 170))
    when = progress - 0.5
    out = []
    for k in range(count):
        away = np.array([np.cos(axis), np.sin(axis)]) * (1 - 2 * k) * pair
        centre = np.tile(middle, (len(progress), 1))
        size, angle = np.full_like(progress, radius), np.full_like(progress, rng.uniform(0, 2 * np.pi))
        gap = np.full_like(progress, 1.7 * radius)
        if motion in DIRECTIONS:
            centre = centre + np.outer(when, DIRECTIONS[motion]) * speed
        elif motion in ("rotate_cw", "rotate_ccw"):
            angle = angle + when * swing * (1 if motion == "rotate_cw" else -1)
        elif motion in ("approach", "recede"):
            size = size * np.exp(when * 0.7 * (1 if motion == "approach" else -1))
        else:
            near, far = 1.05 * radius, 1.05 * radius + 0.6 * speed
            gap = near + (far - near) * (progress if motion == "apart" else 1 - progress)
        out.append(np.column_stack([centre + np.outer(gap, away), size, angle]).astype(np.float32))
    return out


def render(seed: int, split: str, index: int, num_frames: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Draws a video: frames uint8 (T,H,W,3), mask of the moving sprites bool (T,H,W), label."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = index % len(MOTIONS)
    progress = np.linspace(0, 1, num_frames, dtype=np.float32)
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.array(np.meshgrid(ticks, ticks))[:, None]  # (1,H,W) each

    movers = poses(MOTIONS[label], rng, progress)
    looks = rng.permutation(len(LOOKS))
    canvas = np.broadcast_to(paint_background(rng, x, y, progress), (num_frames, size, size, 3)).copy()
    layers = [(pose, True) for pose in movers]
    if rng.random() < 0.4:
        still = [*rng.uniform(0.12, 0.88, 2), rng.uniform(0.09, 0.13), rng.uniform(0, 2 * np.pi)]
        layers.insert(0, (np.float32([still]), False))
    mask = np.zeros(canvas.shape[:3], bool)
    for (pose, moves), look in zip(layers, looks):
        colour, coverage = paint_sprite(LOOKS[look], pose, x, y)
        canvas += coverage[..., None] * (colour - canvas)
        if moves:
            mask |= coverage > 0.5
    return canvas.clip(0, 255).round().astype(np.uint8), mask, label


def encode(file: IO[bytes], frames: np.ndarray, crf: int) -> None:
    """Writes frames uint8 (T,H,W,3) as H.264 in MP4 with one key frame and no B-frames."""
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "g": str(len(frames)), "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_video(split: str, index: int, *, output: Path, seed: int, num_frames: int, size: int, crf: int) -> None:
    """Writes a video and its mask unless they are there."""
    stem = output / split / f"{index:05d}"
    video, mask = stem.with_suffix(".mp4"), stem.with_suffix(".npz")
    if not (video.exists() and mask.exists()):
        frames, foreground, _ = render(seed, split, index, num_frames, size)
        with whole_file(mask) as file:
            np.savez_compressed(file, mask=foreground)
        with whole_file(video) as file:
            encode(file, frames, crf)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the lists and videos")
    parser.add_argument("--num_train", type=int, default=2000, help="number of training videos")
    parser.add_argument("--num_val", type=int, default=200, help="number of validation videos")
    parser.add_argument("--num_test", type=int, default=400, help="number of test videos")
    parser.add_argument("--num_frames", type=int, default=16, help="frames per video")
    parser.add_argument("--size", type=int, default=64, help="side of the frames in pixels, an even number")
    parser.add_argument("--crf", type=int, default=16, help="H.264 quality: lower is better, with larger files")
    parser.add_argument("--seed", type=int, default=0, help="seed of all videos")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes")
    return parser


def make_data_set(args: argparse.Namespace) -> None:
    """Makes the videos of all splits that are not there yet, and the lists.

    Raises:
        SettingError: a setting is wrong, or the folder has videos made with other settings.
    """
    if args.size % 2 or args.size < 16 or args.num_frames < 2 or args.workers < 1:
        raise SettingError("--size must be even and at least 16, --num_frames at least 2, --workers at least 1")
    counts = {"train": args.num_train, "val": args.num_val, "test": args.num_test}
    for split in SPLITS:
        (args.output / split).mkdir(parents=True, exist_ok=True)
    how = {"seed": args.seed, "num_frames": args.num_frames, "size": args.size, "crf": args.crf}
    record_settings(args.output / "settings.json", how)
    videos = [(split, index) for split in SPLITS for index in range(counts[split])]
    make = partial(make_video, output=args.output, **how)
    with ProcessPoolExecutor(args.workers) as pool:
        made = pool.map(make, *zip(*videos, strict=True), chunksize=16)
        list(tqdm(made, total=len(videos), desc="demo videos", mininterval=2))
    for split, count in counts.items():
        with whole_file(args.output / f"{split}.csv", "w") as file:
            file.writelines(f"{split}/{index:05d}.mp4 {index % len(MOTIONS)}\n" for index in range(count))
    with whole_file(args.output / "labels.txt", "w") as file:
        file.writelines(f"{motion}\n" for motion in MOTIONS)


def main() -> None:
    args = get_args_parser().parse_args()
    try:
        make_data_set(args)
    except (UserError, OSError) as error:
        raise SystemExit(f"make_demo_videos.py: error: {error}") from error


if __name__ == "__main__":
    main()
