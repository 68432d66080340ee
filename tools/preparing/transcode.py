"""One video -> one that trains fast: small, upright, constant frame rate, many key frames, H.264 in MP4.

PyAV does it all, on one core: many videos are made side by side.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path, PurePath
from typing import NamedTuple

import av
import numpy as np

from clips.video import open_video
from clips.video_index import VideoError, VideoIndex, index_video

ABANDONED = 24 * 3600  # seconds after which no other run can still be at an unfinished file
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


class Encoding(NamedTuple):
    """How videos are written.

    short_side: even, in pixels; a smaller video keeps its size unless `enlarge`. gop: the most frames from one
    key frame to the next. crf, preset: x264's quality, lower is better, and effort.
    """

    short_side: int = 320
    enlarge: bool = False
    gop: int = 16
    crf: int = 20
    preset: str = "veryfast"

    @property
    def options(self) -> dict[str, str]:
        """For x264. "fastdecode" leaves out arithmetic coding and deblocking, half of what decoding takes."""
        return {
            "g": str(self.gop),
            "bf": "0",
            "crf": str(self.crf),
            "preset": self.preset,
            "tune": "fastdecode",
            "threads": "1",
        }


def convert(source: str | Path, target: str | Path, encoding: Encoding) -> None:
    """Write `target` anew from `source`, flushed to the disk, and read it back.

    `target` is not complete before this returns; frames keep their stored proportions, as decoders give them.

    Raises VideoError where the source can't be read from the first to the last frame, or the new file has not
    its frames, size or rate; OSError where writing fails, av.FFmpegError where encoding does.
    """
    index = index_video(source)
    size = output_size(*index.size, encoding.short_side, enlarge=encoding.enlarge)
    rate = frame_rate(index)
    frames = at_constant_rate(timed_frames(source, index, rate), rate, index.num_frames)
    count = encode(frames, target, size=size, turns=index.turns, rate=rate, options=encoding.options)
    with open(target, "rb") as f:
        os.fsync(f.fileno())
    try:
        read_back(target, count=count, size=size, rate=rate)
    except VideoError as error:
        raise VideoError(source, f"the new file is not right: {error.reason}") from error


def output_size(height: int, width: int, short_side: int, *, enlarge: bool = False) -> tuple[int, int]:
    """Even (H,W) of which the smaller is `short_side`, or that of the source, less 1 if odd, if it's smaller."""
    scale = short_side / min(height, width)
    if scale >= 1 and not enlarge:
        return max(2, height // 2 * 2), max(2, width // 2 * 2)
    return tuple(2 * round(side * scale / 2) for side in (height, width))


def frame_rate(index: VideoIndex) -> Fraction:
    """The mean frame rate in 1/s; 25 where the file tells none.

    Times in a file may be rounded: a usual rate (n, n * 1000 / 1001) near to it is meant where that changes the
    end of the video by less than half a frame.
    """
    mean = Fraction(index.fps).limit_denominator(10_000) or Fraction(25)
    usual = min(
        (round(mean) * factor for factor in (Fraction(1), Fraction(1000, 1001))), key=lambda r: abs(r - mean)
    )
    return usual if usual and abs(usual / mean - 1) * index.num_frames < 0.5 else mean


# --- reading ------------------------------------------------------------------------------------------------


def timed_frames(path: str | Path, index: VideoIndex, rate: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Every frame and the seconds from the first frame to it. Raises VideoError for a damaged or missing one."""
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


def at_constant_rate(
    timed: Iterator[tuple[Fraction, av.VideoFrame]], rate: Fraction, count: int
) -> Iterator[av.VideoFrame]:
    """`count` frames, at k / rate seconds the one shown then.

    That is the last one that starts before (k + 1/2) / rate: times that waver by less than half a frame, as
    where they are rounded to milliseconds, give every frame once.
    """
    shown, k = None, 0
    for start, frame in timed:
        while shown is not None and k < count and (2 * k + 1) <= 2 * rate * start:
            yield shown
            k += 1
        shown = frame
    for _ in range(k, count):
        yield shown


# --- writing ------------------------------------------------------------------------------------------------


def encode(
    frames: Iterator[av.VideoFrame],
    path: str | Path,
    *,
    size: tuple[int, int],
    turns: int,
    rate: Fraction,
    options: dict[str, str],
) -> int:
    """Write frames, each turned by quarter turns counter-clockwise to the upright (H,W); returns how many."""
    height, width = size
    stored = size if turns % 2 == 0 else (width, height)
    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            if count == 0:
                copy_colours(frame, stream.codec_context)
            picture = frame.reformat(
                width=stored[1], height=stored[0], format="yuv420p",
                dst_color_range="MPEG", interpolation="BICUBIC", threads=1,
            )  # fmt: skip
            picture = turn(picture, turns) if turns else picture
            picture.pts, picture.time_base = count, 1 / rate
            picture.pict_type = 0  # else x264 takes over where the source has its key and B-frames
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode())
    return count


def copy_colours(frame: av.VideoFrame, encoder: av.VideoCodecContext) -> None:
    """Say of the new video what the old one says about its colours; their range is always the limited one."""
    encoder.colorspace, encoder.color_range = frame.colorspace, 1
    encoder.color_primaries, encoder.color_trc = frame.color_primaries, frame.color_trc


def turn(frame: av.VideoFrame, turns: int) -> av.VideoFrame:
    """A yuv420p frame of even size by quarter turns counter-clockwise."""
    h, w = frame.height, frame.width
    planes = np.split(frame.to_ndarray().ravel(), [h * w, h * w * 5 // 4])
    shapes = (h, w), (h // 2, w // 2), (h // 2, w // 2)
    turned = [np.rot90(plane.reshape(shape), turns) for plane, shape in zip(planes, shapes, strict=True)]
    packed = np.concatenate([plane.ravel() for plane in turned]).reshape(-1, turned[0].shape[1])
    return av.VideoFrame.from_ndarray(packed, format="yuv420p")


def read_back(path: str | Path, *, count: int, size: tuple[int, int], rate: Fraction) -> None:
    """Raises VideoError unless a file has so many frames of this size and rate, and three can be decoded."""
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


# --- files --------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A video to make: where it is, its path below the output, and where that is."""

    source: str
    name: PurePath
    target: str


class WritingFailed(NamedTuple):
    """No fault of a video: the disk is full, or the like."""

    reason: str


def make_video(job: Job, *, encoding: Encoding, tag: str) -> str | WritingFailed | None:
    """Make one video, under another name until it's complete. Returns why the source is bad; None: it's done."""
    target = Path(job.target)
    temporary = target.with_name(f".{target.name}.{tag}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(job.source, temporary, encoding)
        temporary.replace(target)
    except VideoError as error:
        return error.reason
    except OSError as error:
        return WritingFailed(f"{target}: {error.strerror or error}")
    except av.FFmpegError as error:
        return f"can't be encoded: {error}"
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, tag: str) -> None:
    """Remove the unfinished files of this run, and those of others that are long since over."""
    for path in folder.rglob(".*.part"):
        try:
            if f".{tag}." in path.name or time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
        except FileNotFoundError:  # another run was quicker
            continue


def target_names(paths: Sequence[PurePath]) -> list[PurePath]:
    """Each path with the suffix .mp4 in place of its own; or behind it, where two differ in nothing else."""
    count = Counter(path.with_suffix("") for path in paths)
    stems = [path if count[path.with_suffix("")] > 1 else path.with_suffix("") for path in paths]
    return [stem.with_name(f"{stem.name}.mp4") for stem in stems]


def refuse_overwriting(jobs: Sequence[Job], output: Path) -> None:
    top, sources = os.path.realpath(output), {os.path.realpath(job.source) for job in jobs}
    taken = {}
    for job in jobs:
        if job.name in taken:
            raise ValueError(f"{taken[job.name]} and {job.source} would both become {job.name}: rename one")
        if os.path.join(top, job.name) in sources:
            raise ValueError(f"{job.target} is one of the videos to read: choose another --output")
        taken[job.name] = job.source
