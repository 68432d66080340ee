"""Videos: reading chosen frames of a file, and the rules that choose them.

    with open_video("clip.mp4") as video:
        frames = video.get_frames(pretrain_clip(video.num_frames, 16, 4, rng))  # uint8 (16,3,H,W)

A file is indexed first: one pass over its packets, two or three milliseconds for a ten-second clip, tells the
time of every frame. So all decoders agree on what frame k is, and the files that a decoder is known to read
wrongly are left to PyAV. The rules, in the second half, are functions of integers: no file, no decoder.
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
    except (VideoError, MemoryError):
        raise
    except Exception as error:
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
    stream.codec_context.thread_count = 1
    return container, stream


def index_video(path) -> VideoIndex:
    """Index a video file. Raises VideoError where it is empty, cut off, unreadable or without video."""
    with _video_errors(path):
        if os.path.getsize(path) == 0:
            raise VideoError(path, "is empty (0 bytes)")
        container, stream = _open_stream(path)
        with container:
            times, keys, end, first, traits = _scan(path, container, stream)
            span = 0 if "no times" in traits else float((end - times[0]) * stream.time_base)
            promised = float((stream.duration or 0) * stream.time_base)
            rate = float(stream.average_rate or stream.guessed_rate or 0)
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
    return sorted(times), sorted(keys), end, first, traits


# -------------------------------------------------------------------------------------------- the decoders


class PyAV:
    """Reads frames with PyAV, which brings its own FFmpeg."""

    misreads = frozenset()

    def __init__(self, path, index: VideoIndex):
        self.path, self.index = path, index
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
        with _video_errors(path):
            self._reader = reader(path, index)

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
            frames = self._reader.read(distinct.tolist())  # (U,H,W,3)
            return frames[torch.from_numpy(place)].permute(0, 3, 1, 2)  # (T,3,H,W)


def open_video(path, decoder: str = "auto") -> Video:
    """Open a video file. Raises VideoError where it is missing, cut off, unreadable or without video."""
    return Video(path, decoder)


# -------------------------------------------------------------------------------- which frames make a clip
# For a video of D frames and clips of T: indices are int64, (T,) for a clip and (views,T) for test views.
# Where a rule leaves a choice, `rng` (a numpy Generator) makes it; without one the middle is taken, so that
# validation is repeatable (the published code draws its validation clips, too). A single test view is the
# middle one (the published code divides by zero).


def _pick(rng, low, high):
    """An integer from low..high, both included."""
    return (low + high) // 2 if rng is None else rng.integers(low, high, endpoint=True)


def pretrain_indices(start: int, num_frames: int, clip_len: int, stride: int) -> np.ndarray:
    """Every stride-th frame from `start`, the last one reached repeated; frame D-1 is never reached."""
    return start + stride * np.minimum(np.arange(clip_len), max((num_frames - 2 - start) // stride, 0))


def pretrain_clip(num_frames: int, clip_len: int, stride: int, rng=None) -> np.ndarray:
    """Pre-training clip of AdaMAE and VideoMAE: a start in 0..D - T*stride, or 0 in a shorter video."""
    start = _pick(rng, 0, max(num_frames - clip_len * stride, 0))
    return pretrain_indices(start, num_frames, clip_len, stride)


def dense_indices(start: int, num_frames: int, clip_len: int, stride: int) -> np.ndarray:
    """T frames spread over the window start..start + T*stride (they lie T*stride/(T-1) apart, as published).

    A video that is not longer than the window gives D/stride frames spread over all of it, then its last one.
    """
    window = clip_len * stride
    if num_frames > window:
        spread = np.linspace(start, start + window, clip_len)
        return np.clip(spread, start, start + window - 1).astype(np.int64)
    distinct = num_frames // stride
    padded = np.concatenate([np.linspace(0, num_frames, distinct), np.full(clip_len - distinct, num_frames)])
    return np.clip(padded, 0, num_frames - 1).astype(np.int64)


def dense_clip(num_frames: int, clip_len: int, stride: int, rng=None) -> np.ndarray:
    """Fine-tuning clip on Kinetics-400, UCF101 and HMDB51: a window starting in 0..D - 1 - T*stride."""
    start = _pick(rng, 0, max(num_frames - 1 - clip_len * stride, 0))
    return dense_indices(start, num_frames, clip_len, stride)


def dense_views(num_frames: int, clip_len: int, stride: int, num_views: int) -> np.ndarray:
    """Test views on the same sets: windows of T among every stride-th frame, from the first to the last."""
    pool = np.arange(0, num_frames, stride)
    pool = np.pad(pool, (0, max(clip_len - len(pool), 0)), mode="edge")
    starts = _even_starts(len(pool) - clip_len, num_views)
    return pool[starts[:, None] + np.arange(clip_len)]


def _even_starts(last: int, num_views: int) -> np.ndarray:
    """Integers from 0 to `last`, evenly spaced and rounded down; the middle one if only one is wanted."""
    return np.array([last // 2]) if num_views == 1 else np.arange(num_views) * last // (num_views - 1)


def segment_bounds(num_frames: int, num_segments: int, reference: bool = False):
    """First and last frame, both (T,), of each of T equal segments (the frames left over are not used).

    A video of fewer frames than segments gives one frame each, spread over it; with reference=True it gives
    frame 0 throughout, as the published code does: a still picture.
    """
    length, order = num_frames // num_segments, np.arange(num_segments)
    if length == 0:
        only = order * (0 if reference else num_frames) // num_segments
        return only, only
    return order * length, order * length + length - 1


def segment_clip(num_frames: int, num_segments: int, rng=None, reference: bool = False) -> np.ndarray:
    """Fine-tuning clip on Something-Something V2: one frame of each segment (Wang et al., TSN, 2016)."""
    return _pick(rng, *segment_bounds(num_frames, num_segments, reference))


def segment_views(num_frames: int, num_segments: int, num_views: int, reference: bool = False):
    """Test views on Something-Something V2: one frame per segment, V views interleaved; int64 (V,T).

    With reference=True as published: always two interleaved views, whose sorted frames are, for V > 2, filled
    up with copies of one frame to V*T; returns a list then, since these views differ in length.
    """
    length = num_frames / num_segments
    first = length * np.arange(num_segments)
    if not reference:
        shifts = np.arange(num_views) / num_views if num_views > 1 else np.array([0.5])
        return np.floor(first + length * shifts[:, None]).astype(np.int64)
    pool = np.concatenate([first, first + length / 2, np.full((num_views - 2) * num_segments, first[-1])])
    pool = np.sort(pool.astype(np.int64))
    return [pool[view::2] for view in range(num_views)]


def mae_st_span(clip_len: int, stride: int, fps: float) -> float:
    """Frames of a video of `fps` in the time that T*stride frames take at 30 frames per second."""
    return clip_len * stride / 30 * fps


def mae_st_indices(start: float, num_frames: int, clip_len: int, span: float) -> np.ndarray:
    """T frames spread over start..start + span - 1, the last frame of the video repeated beyond its end."""
    return np.clip(np.linspace(start, start + span - 1, clip_len), 0, num_frames - 1).astype(np.int64)


def mae_st_clip(num_frames: int, clip_len: int, stride: int, fps: float, rng=None) -> np.ndarray:
    """Clip of MAE-ST (Feichtenhofer et al., 2022): a real-valued start in [0, D - span]."""
    span = mae_st_span(clip_len, stride, fps)
    slack = max(num_frames - span, 0.0)
    start = slack // 2 if rng is None else rng.uniform(0, slack)
    return mae_st_indices(start, num_frames, clip_len, span)


def mae_st_views(num_frames: int, clip_len: int, stride: int, fps: float, num_views: int = 10) -> np.ndarray:
    """Test views of MAE-ST: evenly placed, their distance rounded down to whole frames."""
    span = mae_st_span(clip_len, stride, fps)
    slack = max(num_frames - span, 0.0)
    starts = [slack // 2] if num_views == 1 else np.arange(num_views) * (slack // (num_views - 1))
    return np.stack([mae_st_indices(start, num_frames, clip_len, span) for start in starts])
