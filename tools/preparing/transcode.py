"""Transcodes a video for fast loading: small, upright, constant frame rate, many key frames, H.264 in MP4.

PyAV does all of it on one core; other processes transcode other videos meanwhile.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av import VideoFrame

from clips.video import open_video
from clips.video_index import VideoError, VideoIndex, index_video
from tools.preparing.planning import Job
from tools.preparing.workers import Failure

ABANDONED = 24 * 3600  # age in seconds at which no other run can still be writing an unfinished file
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
# "fastdecode" drops arithmetic coding and deblocking, half the cost of decoding.
X264 = {"bf": "0", "tune": "fastdecode", "threads": "1"}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How videos are encoded."""

    short_side: int = 320  # even, in pixels; a smaller video keeps its size unless `enlarge`
    enlarge: bool = False
    gop: int = 16  # largest distance between key frames, in frames
    crf: int = 20  # x264's quality, lower is better
    preset: str = "veryfast"  # x264's effort


def convert(source: str | Path, target: Path, encoding: Encoding) -> None:
    """Writes `target` from `source`, flushes it to disk and reads three of its frames back.

    Pixel proportions stay those of the stored frames, which are what decoders return.

    Raises:
        VideoError: the source can't be read from its first to its last frame, or the new file is wrong.
        OSError: writing failed.
        av.FFmpegError: encoding failed.
    """
    index = index_video(source)
    size = output_size(*index.size, encoding.short_side, enlarge=encoding.enlarge)
    rate = frame_rate(index)
    frames = at_constant_rate(timed_frames(source, index, rate), rate, index.num_frames)
    encode(frames, target, size=size, turns=index.turns, rate=rate, encoding=encoding)
    with open(target, "rb") as f:
        os.fsync(f.fileno())
    try:
        read_back(target, count=index.num_frames, size=size, rate=rate)
    except VideoError as error:
        raise VideoError(source, f"the new file is wrong: {error.reason}") from error


def output_size(height: int, width: int, short_side: int, *, enlarge: bool = False) -> tuple[int, int]:
    """Even (H,W) in the source's proportions; the shorter side is `short_side`, or the source's if smaller."""
    scale = short_side / min(height, width)
    if scale >= 1 and not enlarge:
        return max(2, height // 2 * 2), max(2, width // 2 * 2)
    return tuple(2 * round(side * scale / 2) for side in (height, width))


def frame_rate(index: VideoIndex) -> Fraction:
    """The mean frame rate in 1/s; 25 if the file has none.

    Times in a file may be rounded. So a common rate close to the mean (n or n * 1000 / 1001) is taken instead
    where that shifts the end of the video by less than half a frame.
    """
    mean = Fraction(index.fps).limit_denominator(10_000) or Fraction(25)
    usual = min((round(mean) * factor for factor in (Fraction(1), Fraction(1000, 1001))), key=lambda r: abs(r - mean))
    return usual if usual and abs(usual / mean - 1) * index.num_frames < 0.5 else mean


def timed_frames(path: str | Path, index: VideoIndex, rate: Fraction) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Yields every frame with its time in seconds from the first frame.

    Raises:
        VideoError: a frame is damaged or missing.
    """
    first, k = None, -1
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_count = 1
            for k, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise VideoError(path, f"is damaged at frame {k}")
                if "no times" in index.traits or frame.pts is None:
                    yield k / rate, frame
                    continue
                first = frame.pts if first is None else first
                yield (frame.pts - first) * stream.time_base, frame
    except av.FFmpegError as error:
        raise VideoError(path, f"frame {k + 1} can't be decoded: {error.strerror}") from error
    if k + 1 < index.num_frames:
        raise VideoError(path, f"only {k + 1} of {index.num_frames} frames can be decoded")


def at_constant_rate(timed: Iterator[tuple[Fraction, VideoFrame]], rate: Fraction, count: int) -> Iterator[VideoFrame]:
    """Yields `count` frames; frame k is the one on display k / rate seconds after the first.

    That is the last one that starts before (k + 1/2) / rate. So times that are off by less than half a frame,
    such as those rounded to milliseconds, still give every frame once.
    """
    shown, k = None, 0
    for start, frame in timed:
        while shown is not None and k < count and (2 * k + 1) <= 2 * rate * start:
            yield shown
            k += 1
        shown = frame
    for _ in range(k, count):
        yield shown


def encode(
    frames: Iterator[VideoFrame], path: Path, *, size: tuple[int, int], turns: int, rate: Fraction, encoding: Encoding
) -> None:
    """Writes frames as H.264 in MP4.

    Args:
        size: even (H,W) of the upright video.
        turns: quarter turns, counter-clockwise, that make a frame upright.
        rate: in 1/s.
    """
    options = {**X264, "g": str(encoding.gop), "crf": str(encoding.crf), "preset": encoding.preset}
    h, w = size if turns % 2 == 0 else size[::-1]  # as stored
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        (stream.height, stream.width), stream.pix_fmt, context = size, "yuv420p", stream.codec_context
        for k, frame in enumerate(frames):
            if k == 0:  # the source's colours, except that the range is always limited
                context.colorspace, context.color_range = frame.colorspace, 1
                context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
            picture = frame.reformat(w, h, "yuv420p", dst_color_range="MPEG", interpolation="BICUBIC", threads=1)
            picture = turn(picture, turns) if turns else picture
            picture.pts, picture.time_base = k, 1 / rate
            picture.pict_type = 0  # else x264 copies the source's frame types, key and B-frames included
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def turn(frame: VideoFrame, turns: int) -> VideoFrame:
    """Rotates a yuv420p frame of even size by quarter turns counter-clockwise."""
    h, w = frame.height, frame.width
    planes = np.split(frame.to_ndarray().ravel(), [h * w, h * w * 5 // 4])
    shapes = (h, w), (h // 2, w // 2), (h // 2, w // 2)
    turned = [np.rot90(plane.reshape(shape), turns) for plane, shape in zip(planes, shapes, strict=True)]
    packed = np.concatenate([plane.ravel() for plane in turned]).reshape(-1, turned[0].shape[1])
    return VideoFrame.from_ndarray(packed, format="yuv420p")


def read_back(path: str | Path, *, count: int, size: tuple[int, int], rate: Fraction) -> None:
    """Checks the number of frames, their size (H,W) and rate of a file, and decodes three of them.

    Raises:
        VideoError: something is wrong.
    """
    with open_video(path, "pyav") as video:
        if (video.num_frames, video.size) != (count, size) or abs(video.fps / float(rate) - 1) > 1e-3:
            raise VideoError(
                path,
                f"{video.num_frames} frames of {video.size} at {video.fps:.3f}/s, "
                f"not {count} of {size} at {float(rate):.3f}/s",
            )
        video.get_frames(three_frames(count))


def three_frames(count: int) -> list[int]:
    """The first, the middle and the last frame."""
    return [0, count // 2, count - 1]


class WritingFailed(Failure):
    """A failure that is not the video's fault, such as a full disk."""


def make_video(job: Job, *, encoding: Encoding, tag: str) -> Failure | None:
    """Makes one video and returns why that failed, if it did."""
    target = Path(job.target)
    # Not utils.whole_file: the MP4 writer and the check afterwards need a path, and `sweep` finds the files of
    # killed workers by the run's tag.
    temporary = target.with_name(f".{target.name}.{tag}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(job.source, temporary, encoding)
        temporary.replace(target)
    except VideoError as error:
        return Failure(error.reason)
    except OSError as error:
        return WritingFailed(f"{target}: {error.strerror or error}")
    except av.FFmpegError as error:
        return Failure(f"can't be encoded: {error}")
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, tag: str) -> None:
    """Removes the unfinished files of this run, and those that other runs abandoned."""
    for path in folder.rglob(".*.part"):
        with suppress(FileNotFoundError):  # another run was quicker
            if f".{tag}." in path.name or time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
