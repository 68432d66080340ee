"""Milliseconds of a training clip before and after tools/prepare_videos.py, for each decoder.

    python benchmarks/decoding.py

The sources are made here: 10 s of moving textures with grain, as cameras and video sites deliver them, that is
with B-frames, a key frame every 250 frames and sound. A clip is 16 frames, 4 apart, from a random place.
"decode" opens the file and reads them; "clip" is all that a data worker does for pre-training, both once the file's
index is known. Milliseconds are CPU time of one thread, so that other programs on the machine disturb little; the
median over the clips counts.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clips.decoders import DECODERS, resolve_decoder
from clips.frame_indices import pretrain_clip
from clips.lists import read_list
from clips.transforms import build_pretrain_transform
from clips.video import open_video
from datasets import ClipSettings, TrainDataset
from utils import SettingError

TOOL = Path(__file__).resolve().parent.parent / "tools" / "prepare_videos.py"
FPS, CLIP, STRIDE = 30, 16, 4


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise with the spectrum of natural images, amplitude 1/f: uint8 (side,side,3)."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = rng.normal(size=(3, *frequency.shape, 2)) @ [1, 1j] / frequency
    spectrum[1:] = 0.7 * spectrum[:1] + 0.3 * spectrum[1:]  # colours go together
    picture = np.fft.irfft2(spectrum, s=(side, side))
    picture = 128 + 50 * (picture - picture.mean()) / picture.std()
    return picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def moving_frames(rng: np.random.Generator, num_frames: int, height: int, width: int):
    """Yields frames uint8 (H,W,3): a camera that sways over a texture, four pieces that move across, grain."""
    background = texture(rng, 2 ** int(np.ceil(np.log2(max(height, width) + 256))))
    sprites = [texture(rng, 2 ** int(np.log2(height / 3))) for _ in range(4)]
    grain = rng.integers(-5, 6, (8, height, width, 1), dtype=np.int16)
    phase, speed = rng.uniform(0, 2 * np.pi, (5, 2)), rng.uniform(0.01, 0.05, (5, 2))
    for k in range(num_frames):
        places = 0.5 + 0.5 * np.sin(phase + speed * k)  # (5,2) in 0..1
        y, x = (255 * places[0]).astype(int)
        frame = background[y : y + height, x : x + width].astype(np.int16)
        for sprite, place in zip(sprites, places[1:], strict=True):
            y, x = (place * (height - len(sprite), width - len(sprite))).astype(int)
            frame[y : y + len(sprite), x : x + len(sprite)] = sprite
        yield (frame + grain[k % len(grain)]).clip(0, 255).astype(np.uint8)


def write_source(path: Path, *, seed: int, seconds: int, height: int, width: int) -> None:
    """Writes H.264 with B-frames and a key frame every 250 frames, and AAC, in MP4."""
    with av.open(str(path), "w") as container:
        options = {"crf": "23", "preset": "veryfast", "g": "250", "keyint_min": "25", "bf": "3"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        for frame in moving_frames(np.random.default_rng(seed), seconds * FPS, height, width):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        tone = np.sin(np.arange(seconds * 44100, dtype=np.float32)[None] / 16)
        piece = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        piece.rate = 44100
        for stream, last in ((sound, piece), (sound, None), (video, None)):
            container.mux(stream.encode(last))


def milliseconds(work: Callable[[int], object], repeats: int) -> float:
    """Median CPU time of work(0), work(1), ..., after one for warming up."""
    work(repeats)
    taken = []
    for k in range(repeats):
        started = time.process_time()
        work(k)
        taken.append(time.process_time() - started)
    return 1e3 * float(np.median(taken))


def measure(folder: Path, decoder: str, repeats: int) -> tuple[float, float]:
    """Milliseconds of decoding a clip, and of all that a data worker does for one."""
    videos = read_list(folder / "videos.csv")
    crop = build_pretrain_transform("multi_scale", size=224)
    settings = ClipSettings(sampling="pretrain", num_frames=CLIP, sampling_rate=STRIDE, decoder=decoder)
    dataset = TrainDataset(videos=videos, transform=crop, settings=settings, max_tries=1)

    def decode(k):
        number = k % len(videos)
        rng, path = np.random.default_rng([0, k, number]), videos[number].path
        with open_video(path, decoder, dataset.indexes.find(number, path)) as video:
            return video.get_frames(pretrain_clip(video.num_frames, CLIP, STRIDE, rng))

    return milliseconds(decode, repeats), milliseconds(lambda k: dataset[k, k % len(videos)], repeats)


def report(sources: Path, prepared: Path, repeats: int) -> None:
    print("\n| decoder | decode: before | after | ratio | clip: before | after | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for decoder in DECODERS:
        try:
            resolve_decoder(decoder)
        except SettingError as error:
            print(f"| {decoder} | not measured: {error.__cause__} | | | | | |")
            continue
        pairs = zip(*(measure(folder, decoder, repeats) for folder in (sources, prepared)), strict=True)
        cells = [f"{before:.1f} | {after:.1f} | {before / after:.1f}" for before, after in pairs]
        print(f"| {decoder} | {' | '.join(cells)} |", flush=True)
    sizes = [np.mean([file.stat().st_size for file in folder.glob("*.mp4")]) for folder in (sources, prepared)]
    print(f"\nSize of a video: {sizes[0] / 1e6:.2f} MB before, {sizes[1] / 1e6:.2f} MB after.")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_videos", type=int, default=3, help="sources to make (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=10, help="length of each (default: %(default)s)")
    parser.add_argument("--height", type=int, default=720, help="of the sources (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1280, help="of the sources (default: %(default)s)")
    parser.add_argument("--short_side", type=int, default=320, help="of the prepared (default: %(default)s)")
    parser.add_argument("--gop", type=int, default=16, help="of the prepared (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=24, help="clips of a measurement (default: %(default)s)")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sources, prepared = Path(scratch, "sources"), Path(scratch, "prepared")
        sources.mkdir()
        names = [f"{k}.mp4" for k in range(args.num_videos)]
        for seed, name in enumerate(names):
            write_source(sources / name, seed=seed, seconds=args.seconds, height=args.height, width=args.width)
        (sources / "videos.csv").write_text("".join(f"{name}\n" for name in names))
        flags = {"input": sources / "videos.csv", "output": prepared, "short_side": args.short_side, "gop": args.gop}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, str(TOOL), *words], check=True)
        print(f"Before: {args.num_videos} videos of {args.seconds} s, {args.width} x {args.height}, {FPS} a second.")
        print(f"After: short side {args.short_side}, --gop {args.gop}. Clips of {CLIP} frames, {STRIDE} apart.")
        report(sources, prepared, args.repeats)


if __name__ == "__main__":
    main()
