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
from av.stream import Disposition

ROWS, COLUMNS = 3, 4
BITS = ROWS * COLUMNS - 2
TINT = np.array([[0, 30, 60], [60, 0, 30], [30, 60, 0], [20, 20, 20]])  # one per column of cells

GOOD_QUALITY = {
    "libx264": {"crf": "10"},
    "libx265": {"crf": "10", "x265-params": "log-level=error"},
    "libvpx-vp9": {"crf": "10", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"crf": "10", "preset": "8", "svtav1-params": "lookahead=0:enable-tf=0"},
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


def write_videos(folder, lengths, **settings) -> list[str]:
    """Videos of these numbers of frames, by their place in `lengths`; returns their names, 0.mp4 and so on."""
    return [write_video(folder / f"{i}.mp4", length, **settings).name for i, length in enumerate(lengths)]


def write_list(path, *lines: str) -> Path:
    """A list of videos with these lines."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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


def write_audio(path, *, cover: bool = False) -> Path:
    """A file with one second of silence and no video; `cover` adds the picture that music files have."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = 48, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(numbered_frame(0, 48, 64))))
            container.mux(picture.encode())
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


# --- what can be read, and what can't -----------------------------------------------------------------------

MPEG4_B = {"codec": "mpeg4", "bf": "2", "g": "12"}
X265_OPEN = {"codec": "libx265", "x265-params": "log-level=error:keyint=12:min-keyint=12:open-gop=1"}
STEPS = [1, 1, 3, 1, 2, 5]  # frame durations of the variable-rate video

# kinds of videos that are read: file name, frames, what write_video is given
KINDS = {
    "H.264 with B-frames": ("a.mp4", 60, {"bf": "3", "g": "12"}),
    "H.264, one key frame": ("b.mp4", 60, {"bf": "3", "g": "250"}),
    "H.264, open GOP": ("c.mp4", 60, {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "H.264 in Matroska": ("d.mkv", 60, {"bf": "3", "g": "12"}),
    "H.264 in AVI": ("e.avi", 30, {"bf": "0", "g": "12"}),
    "H.264 in MPEG-TS": ("f.ts", 30, {"bf": "3", "g": "12"}),
    "HEVC": ("g.mp4", 40, {"codec": "libx265"}),
    "HEVC, open GOP": ("h.mp4", 40, X265_OPEN),
    "VP9 in WebM": ("i.webm", 40, {"codec": "libvpx-vp9", "g": "12"}),
    "VP9 in mp4": ("j.mp4", 40, {"codec": "libvpx-vp9", "g": "12"}),
    "MPEG-4 in AVI": ("k.avi", 30, {"codec": "mpeg4", "g": "12"}),
    "MPEG-4 with B-frames in AVI": ("l.avi", 30, MPEG4_B),
    "MPEG-4 with B-frames": ("m.mp4", 30, MPEG4_B),
    "odd size, VP9": ("n.webm", 20, {"codec": "libvpx-vp9", "size": (37, 51)}),
    "odd size, MPEG-4": ("o.avi", 20, {"codec": "mpeg4", "size": (37, 51)}),
    "variable frame rate": ("p.mp4", 30, {"times": np.cumsum(STEPS * 5).tolist(), "bf": "3"}),
    "rotated by 90": ("q.mp4", 20, {"rotation": 90}),
    "rotated by 180": ("r.mp4", 20, {"rotation": 180}),
    "rotated by 270": ("s.mp4", 20, {"rotation": 270}),
    "BT.709": ("t.mp4", 20, {"x264-params": "colormatrix=bt709"}),
    "full range": ("u.mp4", 20, {"x264-params": "fullrange=on"}),
    "ten bits": ("v.mp4", 20, {"pix_fmt": "yuv420p10le"}),
    "one frame": ("w.mp4", 1, {}),
    "AV1": ("x.mp4", 20, {"codec": "libsvtav1"}),
    "MJPEG in AVI": ("y.avi", 20, {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "VP8 in WebM": ("z.webm", 20, {"codec": "libvpx"}),
    "MPEG-2 in MPEG-PS": ("0.mpg", 20, {"codec": "mpeg2video"}),
    "Windows Media": ("1.wmv", 20, {"codec": "wmv2"}),
    "ProRes": ("2.mov", 20, {"codec": "prores", "pix_fmt": "yuv422p10le"}),
    "H.264 in Flash": ("3.flv", 20, {"bf": "2"}),
}


def write_kind(folder, kind: str) -> Path:
    """A video of one of KINDS."""
    name, num_frames, settings = KINDS[kind]
    return write_video(folder / name, num_frames, **settings)


BROKEN = [
    "missing",
    "a folder",
    "zero bytes",
    "not a video",
    "audio only",
    "audio and a cover picture",
    "cut, header at the end",
    "cut, header in front",
    "damaged in the middle",
]


def write_broken(folder, defect: str) -> Path:
    """The path of a file with one of the BROKEN defects."""
    path = folder / f"{defect}.mp4"
    if defect == "a folder":
        path.mkdir()
    elif defect == "zero bytes":
        path.touch()
    elif defect == "not a video":
        path.write_text("no video at all\n" * 200)
    elif "audio" in defect:
        write_audio(path, cover="cover" in defect)
    elif defect != "missing":
        front = {"movflags": "faststart"} if "front" in defect else {}
        good = write_video(folder / "good.mp4", 60, size=(96, 128), g="20", bf="2", **front)
        write_damaged(good, path) if "damaged" in defect else write_cut(good, path, 0.6 if front else 0.5)
        good.unlink()
    return path


def write_resized(path) -> Path:
    """Motion JPEG of ten frames, of which the last five are twice as large."""
    small, large = ((path.with_name(f"{k}.avi"), (48 * k, 64 * k)) for k in (1, 2))
    parts = [write_video(p, 5, size=s, codec="mjpeg", pix_fmt="yuvj420p") for p, s in (small, large)]
    with av.open(str(path), "w") as new, av.open(str(parts[0])) as first, av.open(str(parts[1])) as second:
        stream = new.add_stream_from_template(first.streams.video[0])
        for k, packet in enumerate(p for old in (first, second) for p in old.demux(video=0) if p.size):
            packet.pts = packet.dts = k
            packet.stream = stream
            new.mux(packet)
    return path
