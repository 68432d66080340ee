"""Damages small videos at random, reads each, and prints the outcomes as one line of JSON.

    python tests/fuzz.py pyav 0 80    # the mutations 0 to 79

A separate program, so that a decoder's crash, hang or use of memory is measured and survived. Mutation k is the
same in every run.
"""

import collections
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import videos

from clips.isolation import Isolated
from clips.video import open_video
from clips.video_index import VideoError

NUM_FRAMES, SIZE = 24, (48, 64)
TIMEOUT = 10.0  # seconds for one file that is read in some ten milliseconds

SEEDS = {
    "h264.mp4": {"bf": "2", "g": "8"},
    "h264_fast.mp4": {"bf": "2", "g": "8", "movflags": "faststart"},
    "h264.mkv": {"bf": "2", "g": "8"},
    "h264.ts": {"bf": "2", "g": "8"},
    "hevc.mp4": {"codec": "libx265", "g": "8"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "8"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "8"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


def flip_bytes(data, rng):
    for i in rng.integers(0, len(data), rng.integers(1, 30)):
        data[i] = rng.integers(256)


def flip_header_bytes(data, rng):
    """In the first or the last kilobyte, where most containers keep their tables."""
    start = 0 if rng.integers(2) else max(0, len(data) - 1024)
    for i in rng.integers(start, min(len(data), start + 1024), rng.integers(1, 8)):
        data[i] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])


def zero_a_run(data, rng):
    i, length = rng.integers(len(data)), rng.integers(1, len(data) // 4)
    data[i : i + length] = bytes(len(data[i : i + length]))


def truncate(data, rng):
    del data[rng.integers(len(data)) :]


def insert_block(data, rng):
    i = rng.integers(len(data))
    data[i:i] = rng.bytes(rng.integers(1, 2000))


def delete_block(data, rng):
    i = rng.integers(len(data))
    del data[i : i + rng.integers(1, len(data) // 4)]


def shuffle_blocks(data, rng):
    size = int(rng.integers(16, len(data) // 3))
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    data[:] = b"".join(blocks[i] for i in rng.permutation(len(blocks)))


def swap_names(data, rng):
    """Exchanges the names of two boxes or chunks: runs of four small letters."""
    text = np.frombuffer(bytes(data), np.uint8)
    letters = np.lib.stride_tricks.sliding_window_view((text >= 97) & (text <= 122), 4).all(1)
    i, j = sorted(rng.choice(np.flatnonzero(letters), 2))
    if j - i >= 4:
        data[i : i + 4], data[j : j + 4] = data[j : j + 4], data[i : i + 4]


def grow_numbers(data, rng):
    """Makes four-byte numbers of the header huge: sizes, counts, durations, pictures 32768 wide."""
    for i in rng.integers(0, min(len(data), 2048) - 4, 3):
        data[i : i + 4] = rng.choice([b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x80\x00\x80\x00"])


MUTATIONS = [
    *(flip_bytes, flip_header_bytes, zero_a_run, truncate, insert_block),
    *(delete_block, shuffle_blocks, swap_names, grow_numbers),
]


def mutated(seeds: dict[str, bytes], number: int) -> tuple[str, bytes]:
    """Returns file name and content of a mutation; the numbers run over all pairs of file and damage."""
    name = list(seeds)[number % len(seeds)]
    rng = np.random.default_rng([0, number])
    data = bytearray(seeds[name])
    MUTATIONS[number // len(seeds) % len(MUTATIONS)](data, rng)
    return f"{number}_{name}", bytes(data)


def read(path: str, decoder: str) -> tuple[int, ...]:
    """Reads some frames as training does, checks what callers rely on, and returns their shape."""
    with open_video(path, decoder) as video:
        indices = np.unique(np.linspace(0, video.num_frames - 1, 6).astype(int))[::-1]
        frames = video.get_frames(indices)
        assert frames.shape == (len(indices), 3, *video.size), (frames.shape, video.size)
        assert str(frames.dtype) == "torch.uint8"
        assert np.isfinite(video.fps) and video.fps >= 0, video.fps
        return tuple(frames.shape)


def outcome(load: Isolated, path: Path, decoder: str) -> tuple[str, str]:
    """Returns (outcome, reason): "read" or "refused", as expected; "crashed" or "hung", survived; or "wrong"."""
    try:
        load(str(path), decoder)
        return "read", ""
    except VideoError as error:
        if "crashed" in error.reason:
            return "crashed", error.reason
        return "hung" if "--decode_timeout" in error.reason else "refused", error.reason
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}\n{error.__cause__}"


def main(decoder: str, start: int, stop: int):
    counts, wrong, slowest = collections.Counter(), {}, 0.0
    load = Isolated(read, TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        seeds = {
            name: videos.write_video(Path(folder) / name, NUM_FRAMES, size=SIZE, **settings).read_bytes()
            for name, settings in SEEDS.items()
        }
        for number in range(start, stop):
            name, data = mutated(seeds, number)
            path = Path(folder) / name
            path.write_bytes(data)
            began = time.perf_counter()
            what, reason = outcome(load, path, decoder)
            slowest = max(slowest, time.perf_counter() - began)
            counts[what] += 1
            if what in ("wrong", "crashed", "hung"):
                wrong.setdefault(what, {})[name] = reason
            path.unlink()
    load.stop()
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10  # MiB on Linux
    print(json.dumps({"counts": counts, "slowest_s": slowest, "memory_mib": memory, **wrong}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
