"""The index of a video file, from one pass over its packets: frame times, key frames, size, special traits.

The pass makes all decoders agree on which frame is frame k, and shows which files a decoder is known to misread. It
takes 4 to 8 milliseconds for a ten-second clip, so training keeps the result (`index_table`).
"""

import marshal
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.stream import Disposition

MAX_SIDE, MAX_PIXELS = 16384, 8192 * 4320  # of a frame; only a damaged header promises more than 8K


class VideoError(RuntimeError):
    """A video that can't be opened or decoded, with its path and the reason in one line."""

    def __init__(self, path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@contextmanager
def video_errors(path) -> Iterator[None]:
    """Turns whatever the libraries raise about one file into a VideoError."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # this machine is out of memory; FFmpeg's own means that a damaged file asks for too much
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise VideoError(path, f"{type(error).__name__}: {first_line}") from error


@dataclass(frozen=True)
class VideoIndex:
    """The result of one pass over the packets of a file.

    Attributes:
        fps: mean frame rate, 1/s.
        size: (H,W) of the upright picture in pixels.
        turns: quarter turns counter-clockwise from the stored picture to the upright one.
        times: presentation time of every frame, ascending, in the stream's time base.
        keys: times of the frames at which decoding can start, ascending.
        traits: what some decoders get wrong. "rotated"; "open GOP": frames shown before a key frame but decoded
            after it; "trimmed": an edit list hides frames; "no seek table": e.g. MPEG-TS; "no times": AVI stores
            none, so with B-frames only counting from the beginning finds frame k; "chroma": odd height or more
            than 8 bits, where FFmpeg versions upsample the colours up to 68 levels apart.
    """

    num_frames: int
    fps: float
    size: tuple[int, int]
    turns: int
    times: list[int]
    keys: list[int]
    traits: frozenset[str]

    def pack(self) -> bytes:
        """Returns all this in some 100 bytes, unless frame times or key frames are many and irregular."""
        steps = (np.diff(times, prepend=0).tobytes() for times in (self.times, self.keys))
        return zlib.compress(marshal.dumps((self.fps, self.size, self.turns, *steps, tuple(self.traits))))

    @classmethod
    def unpack(cls, packed: bytes) -> "VideoIndex":
        """The inverse of `pack`; bytes after the packed ones are ignored."""
        fps, size, turns, *steps, traits = marshal.loads(zlib.decompressobj().decompress(packed))
        times, keys = (np.cumsum(np.frombuffer(deltas, np.int64)).tolist() for deltas in steps)
        return cls(len(times), fps, size, turns, times, keys, frozenset(traits))


def open_stream(path):
    """Opens PyAV's container and video stream, decoding in the calling thread: data workers run in parallel."""
    container = av.open(str(path))
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        container.close()
        raise VideoError(path, f"has no video stream{', only a cover picture' if stream is not None else ''}")
    stream.codec_context.thread_count = 1
    return container, stream


def _check_size(path, height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise VideoError(path, f"has frames of {width} x {height} pixels, more than 8K: a damaged header")


def index_video(path) -> VideoIndex:
    """Indexes a video file.

    Raises:
        VideoError: the file is missing, empty, cut off or unreadable, or has no video.
    """
    with video_errors(path):
        if os.path.getsize(path) == 0:
            raise VideoError(path, "is empty (0 bytes)")
        container, stream = open_stream(path)
        with container:
            _check_size(path, stream.codec_context.height, stream.codec_context.width)
            times, keys, end, first, traits = _scan(path, container, stream)
            span = 0 if "no times" in traits else float((end - times[0]) * stream.time_base)
            promised = _promised_seconds(container, stream)
            rate = float(stream.average_rate or stream.guessed_rate or 0)
    _check_size(path, first.height, first.width)
    if span and promised - span > 0.5:
        raise VideoError(path, f"is cut off: {span:.1f} s of video, its header says {promised:.1f} s")
    if first.height % 2 or first.format.components[0].bits > 8:
        traits.add("chroma")
    turns = round(first.rotation / 90) % 4
    if turns:
        traits.add("rotated")
    size = (first.height, first.width) if turns % 2 == 0 else (first.width, first.height)
    return VideoIndex(len(times), len(times) / span if span else rate, size, turns, times, keys, frozenset(traits))


def _promised_seconds(container, stream) -> float:
    """The duration that the header gives, in seconds; 0 where it gives none."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    # Matroska gives that of the whole file, which another stream may make longer than the video.
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _scan(path, container, stream):
    """Reads all packets: frame times, key frame times, end of the last frame, first picture, traits."""
    times, keys, end, first = [], [], 0, None
    tabled = any(name in container.format.name for name in ("mp4", "matroska", "avi"))
    traits = set() if tabled else {"no seek table"}
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError(path, f"is damaged or cut off at frame {len(times)}")
        if first is None:
            first = next(iter(stream.codec_context.decode(packet if packet.size else None)), None)
        if packet.size == 0:  # the end
            continue
        time = len(times) if packet.pts is None else packet.pts
        if packet.pts is None or (container.format.name == "avi" and packet.pts != packet.dts):
            traits.add("no times")
        if packet.is_keyframe:
            keys.append(time)
        elif keys and time < keys[-1]:
            traits.add("open GOP")
        if packet.is_discard:
            traits.add("trimmed")
        else:
            times.append(time)
            end = max(end, time + (packet.duration or 0))
    if not times or not keys or first is None:
        raise VideoError(path, "holds no frame that can be decoded")
    times.sort()
    if end <= times[-1]:  # ASF stores no frame durations
        end = times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)
    return times, sorted(keys), end, first, traits
