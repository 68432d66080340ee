"""Videos: reading chosen frames of a file, with torchcodec, decord or PyAV behind one function.

    with open_video("clip.mp4") as video:
        frames = video.get_frames([0, 4, 8])  # uint8 (3,3,H,W)

A file is indexed first: one pass over its packets, two or three milliseconds for a ten-second clip, tells the
time of every frame. So all decoders agree on what frame k is, and the files that a decoder is known to read
wrongly are left to PyAV.
"""

import functools
import importlib
import os
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.stream import Disposition

MAX_SIDE, MAX_PIXELS = 16384, 8192 * 4320  # of a frame; only a damaged header promises more than 8K


class VideoError(RuntimeError):
    """A video that can't be opened or decoded. Attributes: path, reason (one line)."""

    def __init__(self, path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


@contextmanager
def _video_errors(path):
    """Turn whatever the libraries raise about one file into a VideoError."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # this machine's; FFmpeg's says that a damaged file asks for too much
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise VideoError(path, f"{type(error).__name__}: {first_line}") from error


# ------------------------------------------------------------------------------------- the index of a file


@dataclass(frozen=True)
class VideoIndex:
    """What a pass over a file's packets tells.

    times: presentation time of every frame, ascending, in the stream's time base.
    keys: times of the frames at which decoding can start, ascending.
    size: (H,W) of the upright picture; turns: quarter turns counter-clockwise from the stored one to it.
    traits: what some decoders can't cope with. "rotated"; "open GOP": frames shown before, but decoded
        after, a key frame; "trimmed": an edit list cuts frames away; "no seek table": e.g. MPEG-TS;
        "no times": AVI stores none, so with B-frames only counting from the beginning finds frame k;
        "chroma": odd height or more than 8 bits, which FFmpeg versions enlarge up to 68 levels apart.
    """

    num_frames: int
    fps: float
    size: tuple[int, int]
    turns: int
    times: list[int]
    keys: list[int]
    traits: frozenset[str]


def _open_stream(path):
    """PyAV's container and video stream, decoding in the calling thread (data workers run in parallel)."""
    container = av.open(str(path))
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise VideoError(path, "has no video stream")
    if stream.disposition & Disposition.attached_pic:
        container.close()
        raise VideoError(path, "has no video stream, only a cover picture")
    stream.codec_context.thread_count = 1
    return container, stream


def _check_size(path, height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise VideoError(path, f"has frames of {width} x {height} pixels, more than 8K: not a sound header")


def index_video(path) -> VideoIndex:
    """Index a video file. Raises VideoError where it is empty, cut off, unreadable or without video."""
    with _video_errors(path):
        if os.path.getsize(path) == 0:
            raise VideoError(path, "is empty (0 bytes)")
        container, stream = _open_stream(path)
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
    return VideoIndex(
        num_frames=len(times),
        fps=len(times) / span if span else rate,
        size=(first.height, first.width) if turns % 2 == 0 else (first.width, first.height),
        turns=turns,
        times=times,
        keys=keys,
        traits=frozenset(traits),
    )


def _promised_seconds(container, stream) -> float:
    """How long the header says that the video is; 0 where it doesn't.

    Matroska tells it of the whole file, which another stream may make longer than the video.
    """
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _scan(path, container, stream):
    """Times of frames and of key frames, end of the last frame, the first picture, VideoIndex's traits."""
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
    if end <= times[-1]:  # ASF does not tell how long a frame lasts
        end = times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1)
    return times, sorted(keys), end, first, traits


# -------------------------------------------------------------------------------------------- the decoders


class PyAV:
    """Reads frames with PyAV, which brings its own FFmpeg."""

    misreads = frozenset()

    def __init__(self, path, index: VideoIndex):
        self.path, self.index = path, index
        self.stored_size = index.size if index.turns % 2 == 0 else index.size[::-1]
        self.container, self.stream = _open_stream(path)

    @staticmethod
    def load():
        return av

    def read(self, indices: list[int]) -> torch.Tensor:
        """The frames at ascending, distinct indices, uint8 (T,H,W,3)."""
        pictures = {}
        if "no times" not in self.index.traits:
            self._read_from_keys(indices, pictures)
        if len(pictures) < len(indices):  # also where a seek landed too late
            self._read_in_order(indices, pictures)
        return torch.from_numpy(np.stack([pictures[i] for i in indices]))

    def close(self):
        self.container.close()

    def _picture(self, frame) -> np.ndarray:
        if frame.is_corrupt:
            raise VideoError(self.path, f"is damaged at {frame.time} s")
        if (frame.height, frame.width) != self.stored_size:
            raise VideoError(self.path, f"changes its size to {frame.width} x {frame.height} at {frame.time} s")
        return np.rot90(frame.to_ndarray(format="rgb24", threads=1), self.index.turns)

    def _read_from_keys(self, indices, pictures: dict[int, np.ndarray]):
        """Decode each group of frames that hang on one key frame, from that key frame on."""
        times, keys, groups = self.index.times, self.index.keys, {}
        for i in indices:
            key = keys[max(bisect_right(keys, times[i]) - 1, 0)]
            groups.setdefault(key, {})[times[i]] = i
        for key, wanted in groups.items():
            self.container.seek(key, stream=self.stream)
            for frame in self._decode_towards(wanted):
                if frame.pts in wanted:
                    pictures[wanted[frame.pts]] = self._picture(frame)
                if frame.pts is not None and frame.pts >= max(wanted):
                    break

    def _decode_towards(self, wanted):
        """Frames from here on; one that no other frame refers to only where its time is in `wanted`."""
        context = self.stream.codec_context
        for packet in self.container.demux(self.stream):
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from context.decode(packet if packet.size else None)

    def _read_in_order(self, indices, pictures: dict[int, np.ndarray]):
        """Decode from the beginning, counting."""
        self.close()
        self.container, self.stream = _open_stream(self.path)
        wanted = set(indices)
        for k, frame in enumerate(self.container.decode(self.stream)):
            if k in wanted:
                pictures[k] = self._picture(frame)
            if k == indices[-1]:
                return
        raise VideoError(self.path, f"frame {indices[-1]} could not be decoded")


class TorchCodec:
    """Reads frames with torchcodec, which needs the system's FFmpeg libraries."""

    misreads = frozenset({"no times", "no seek table", "chroma"})

    def __init__(self, path, index: VideoIndex):
        self.decoder = self.load()(str(path), num_ffmpeg_threads=1, seek_mode="exact", device="cpu")
        if len(self.decoder) != index.num_frames:
            raise VideoError(path, f"torchcodec counts {len(self.decoder)} frames, PyAV {index.num_frames}")

    @staticmethod
    def load():
        if getattr(importlib.import_module("torchcodec"), "ffmpeg_major_version", "unknown") is None:
            raise ImportError("torchcodec finds no FFmpeg libraries on this system")
        return importlib.import_module("torchcodec.decoders").VideoDecoder

    def read(self, indices: list[int]) -> torch.Tensor:
        return self.decoder.get_frames_at(indices).data.permute(0, 2, 3, 1)

    def close(self):
        self.decoder = None


class Decord:
    """Reads frames with decord, as the published code does. It is no longer maintained."""

    misreads = TorchCodec.misreads | {"open GOP", "trimmed", "rotated"}

    def __init__(self, path, index: VideoIndex):
        decord = self.load()
        # fault_tol: an error, rather than a copy of a neighbour, for any frame that can't be decoded
        self.reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
        if len(self.reader) != index.num_frames:
            raise VideoError(path, f"decord counts {len(self.reader)} frames, PyAV {index.num_frames}")

    @staticmethod
    def load():
        return importlib.import_module("decord")

    def read(self, indices: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.reader.get_batch(indices).asnumpy())

    def close(self):
        self.reader = None


DECODERS = {"torchcodec": TorchCodec, "decord": Decord, "pyav": PyAV}  # "auto" tries them in this order


@functools.cache
def resolve_decoder(name: str) -> str:
    """The decoder that `name` means here: itself, or for "auto" the first one that works.

    Raises ValueError for an unknown name, RuntimeError for a decoder whose libraries can't be loaded.
    """
    if name != "auto" and name not in DECODERS:
        raise ValueError(f"unknown video decoder {name!r}: choose one of auto, {', '.join(DECODERS)}")
    for candidate in DECODERS if name == "auto" else [name]:
        try:
            DECODERS[candidate].load()
            return candidate
        except Exception as error:  # a broken library may raise anything on import
            problem = error
    raise RuntimeError(
        f"the video decoder {name} can't be used here ({str(problem).strip().splitlines()[0]}): install it "
        "(torchcodec needs FFmpeg's shared libraries too), or choose auto or pyav"
    ) from problem


class Video:
    """An open video: num_frames, fps (mean, 1/s), size (H,W) and get_frames. Use it in a `with`."""

    def __init__(self, path, decoder: str = "auto"):
        reader = DECODERS[resolve_decoder(decoder)]
        index = index_video(path)
        if reader.misreads & index.traits:
            reader = PyAV
        self.path, self.num_frames, self.fps, self.size = path, index.num_frames, index.fps, index.size
        self._index = index
        with _video_errors(path):
            self._reader = self._open(reader)

    def _open(self, reader):
        """What another library refuses (decord: AV1) PyAV gets to read, or to refuse."""
        try:
            return reader(self.path, self._index)
        except Exception:
            if reader is PyAV:
                raise
            return PyAV(self.path, self._index)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._reader.close()

    def get_frames(self, indices) -> torch.Tensor:
        """Frames as uint8 (T,3,H,W), upright, RGB, for T indices in any order, repeats included.

        Every distinct frame is decoded once. Raises VideoError for an index out of range and for a frame
        that can't be decoded.
        """
        distinct, place = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if len(distinct) == 0 or distinct[0] < 0 or distinct[-1] >= self.num_frames:
            asked = f"{distinct[0]} to {distinct[-1]}" if len(distinct) else "none"
            raise VideoError(self.path, f"has frames 0 to {self.num_frames - 1}, asked for {asked}")
        with _video_errors(self.path):
            frames = self._read(distinct.tolist())  # (U,H,W,3)
            return frames[torch.from_numpy(place)].permute(0, 3, 1, 2)  # (T,3,H,W)

    def _read(self, indices: list[int]) -> torch.Tensor:
        """As `_open`, for what is refused only now (decord: frames 40 or 48 pixels wide)."""
        try:
            return self._reader.read(indices)
        except Exception:
            if isinstance(self._reader, PyAV):
                raise
            self._reader.close()
            self._reader = PyAV(self.path, self._index)
            return self._reader.read(indices)


def open_video(path, decoder: str = "auto") -> Video:
    """Open a video file. Raises VideoError where it is missing, cut off, unreadable or without video."""
    return Video(path, decoder)
