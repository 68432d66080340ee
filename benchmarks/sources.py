"""Videos for benchmarks, made here, that are as hard to decode as real ones: moving textures with grain."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np

FPS = 30
PREPARE = Path(__file__).resolve().parent.parent / "tools" / "prepare_videos.py"


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


def write_source(path: Path, *, seed: int, seconds: float, height: int, width: int) -> None:
    """Writes H.264 with B-frames and a key frame every 250 frames, as x264 does by default, and AAC, in MP4."""
    with av.open(str(path), "w") as container:
        options = {"crf": "26", "preset": "medium", "g": "250", "bf": "3"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        for frame in moving_frames(np.random.default_rng(seed), int(seconds * FPS), height, width):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        tone = np.sin(np.arange(int(seconds * 44100), dtype=np.float32)[None] / 16)
        piece = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        piece.rate = 44100
        for stream, last in ((sound, piece), (sound, None), (video, None)):
            container.mux(stream.encode(last))


def write_sources(folder: Path, count: int, *, seconds: float, height: int, width: int) -> Path:
    """Writes `count` different videos; returns their list."""
    folder.mkdir()
    for seed in range(count):
        write_source(folder / f"{seed}.mp4", seed=seed, seconds=seconds, height=height, width=width)
    videos = folder / "videos.csv"
    videos.write_text("".join(f"{seed}.mp4\n" for seed in range(count)))
    return videos


def prepare(videos: Path, folder: Path, *flags: object) -> Path:
    """Runs tools/prepare_videos.py on a list of videos; returns the list of the prepared ones."""
    command = [sys.executable, PREPARE, "--input", videos, "--output", folder, *flags]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return folder / videos.name


def bit_rate(videos: Path, seconds: float) -> str:
    """Mean size and bit rate of the videos beside a list, in words."""
    size = np.mean([file.stat().st_size for file in videos.parent.glob("*.mp4")])
    return f"{size / 1e6:.2f} MB, {8 * size / seconds / 1e3:.0f} kbit/s"
