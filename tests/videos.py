"""Small videos whose frames say which frame they are, encoded through PyAV, and ways to damage them.

Every frame is a board of 3 x 4 bright and dark cells. The first cell is always bright and the last one always
dark; the ten between them spell the frame number in binary. So a decoded frame tells its own number, whatever
the codec did to it, and a frame that is not upright reads as no number.
"""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

ROWS, COLUMNS = 3, 4
BITS = ROWS * COLUMNS - 2
TINT = np.array([[0, 30, 60], [60, 0, 30], [30, 60, 0], [20, 20, 20]])  # one per column of cells

GOOD_QUALITY = {
    "libx264": {"crf": "10"},
    "libx265": {"crf": "10", "x265-params": "log-level=error"},
    "libvpx-vp9": {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    "mpeg4": {"qscale": "2"},
}


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """The picture of frame `number` (below 1024), uint8 (H,W,3): tinted cells over a gradient."""
    bits = [1] + [(number >> k) & 1 for k in reversed(range(BITS))] + [0]
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    cells = np.array(bits).reshape(ROWS, COLUMNS)[rows][:, columns, None]  # (H,W,1)
    gradient = np.linspace(-10, 10, height)[:, None, None]
    return (np.where(cells == 1, 230 - TINT[columns], 30 + TINT[columns]) + gradient).astype(np.uint8)


def read_number(frame) -> int | None:
    """The number that a decoded frame, uint8 (3,H,W), shows; None if it is not upright or not one of ours."""
    light = np.asarray(frame, dtype=np.float64).mean(0)  # (H,W)
    height, width = light.shape
    y = [(2 * row + 1) * height // (2 * ROWS) for row in range(ROWS)]
    x = [(2 * column + 1) * width // (2 * COLUMNS) for column in range(COLUMNS)]
    bits = [int(light[i - 1 : i + 2, j - 1 : j + 2].mean() > 128) for i in y for j in x]
    if bits[0] != 1 or bits[-1] != 0:
        return None
    return int("".join(map(str, bits[1:-1])), 2)


def read_numbers(frames) -> list[int | None]:
    """`read_number` of every frame of a clip, uint8 (T,3,H,W)."""
    return [read_number(frame) for frame in frames]


def write_video(
    path,
    num_frames: int = 30,
    *,
    size: tuple[int, int] = (48, 64),
    fps: int = 30,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    times: list[int] | None = None,
    frames: np.ndarray | None = None,
    **options: str,
) -> Path:
    """Encode a video and return its path, whose suffix chooses the container. Skips where `codec` is missing.

    size: (H,W) of the upright picture. rotation (mp4 only): degrees by which players are told to turn the
    stored picture clockwise. times: presentation time of each frame, in units of 1/fps, for a variable frame
    rate. frames: uint8 (T,H,W,3) to encode instead of numbered frames. options: FFmpeg's, for the encoder or,
    with `movflags`, the container.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")
    if frames is not None:
        num_frames, size = len(frames), frames.shape[1:3]
    movflags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", container_options=movflags) as container:
        stream = container.add_stream(codec, rate=fps, options={**GOOD_QUALITY.get(codec, {}), **options})
        stream.height, stream.width = size if rotation % 180 == 0 else size[::-1]
        stream.pix_fmt = pix_fmt
        for k in range(num_frames):
            picture = numbered_frame(k, *size) if frames is None else frames[k]
            picture = np.ascontiguousarray(np.rot90(picture, k=rotation // 90))
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = k if times is None else times[k]
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if rotation:
        _write_rotation(path, rotation)
    return Path(path)


def _write_rotation(path, degrees: int):
    """Put a clockwise rotation into the track header of an mp4 file (ISO/IEC 14496-12, 8.3.2)."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    data = bytearray(Path(path).read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + len(matrix)] = matrix
    Path(path).write_bytes(data)


def write_trimmed(source, path, first: int, fps: int = 30) -> Path:
    """Copy a video's packets so that an edit list hides the frames before `first`, as cutting without
    re-encoding does."""
    with (
        av.open(str(source)) as old,
        av.open(str(path), "w", container_options={"avoid_negative_ts": "disabled"}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                shift = int(first / fps / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                new.mux(packet)
    return Path(path)


def write_audio(path) -> Path:
    """A file with one second of silence and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_cut(source, path, share: float) -> Path:
    """The first `share` of a file's bytes, as an interrupted download leaves them."""
    data = Path(source).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])
    return Path(path)


def write_damaged(source, path, start: float = 0.4, stop: float = 0.6) -> Path:
    """A file whose bytes between two shares of its length are random."""
    data = bytearray(Path(source).read_bytes())
    i, j = int(len(data) * start), int(len(data) * stop)
    data[i:j] = np.random.default_rng(0).bytes(j - i)
    Path(path).write_bytes(data)
    return Path(path)
