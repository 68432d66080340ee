"""Clips in a sliding window over many videos, for extract_features.py."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clips.video import Video, VideoError, open_video
from datasets import FRAME_RULES
from tools.inference.trained import TrainedClips

FRAME_BYTES = 2**28  # of uncropped frames of one video in memory at a time


def sliding_windows(num_frames: int, clip_len: int, rate: int, stride: int) -> np.ndarray:
    """Returns the frames of the clips that start at 0, stride, 2*stride, ... and end within the video: int64 (W,T).

    In a video shorter than a clip the only one repeats the last frame.

    Args:
        clip_len: frames per clip, T.
        rate: frames of the video per frame of the clip.
    """
    span = (clip_len - 1) * rate + 1
    starts = np.arange(0, max(num_frames - span, 0) + 1, stride)
    return np.minimum(starts[:, None] + rate * np.arange(clip_len), num_frames - 1)


class Window(NamedTuple):
    """One clip of a video."""

    video: int  # its number
    frames: np.ndarray  # int64 (T,)
    clip: Tensor | None  # uint8 (3,T,S,S)
    last: bool  # of this video


class Unreadable(NamedTuple):
    """A video without further windows, and why."""

    video: int
    reason: str


class Windows(IterableDataset):
    """Iterates over the windows of many videos, or the middle clips if `stride` is None, split among the workers."""

    def __init__(self, *, paths: Sequence[str], clips: TrainedClips, stride: int | None, decoder: str):
        self.paths, self.clips, self.stride, self.decoder = list(paths), clips, stride, decoder
        self.crop = clips.make_crops(1)

    def __iter__(self) -> Iterator[Window | Unreadable]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.paths), step):
            try:
                with open_video(self.paths[number], self.decoder) as video:
                    yield from self._windows(number, video)
            except VideoError as error:
                yield Unreadable(number, str(error.reason))

    def _windows(self, number: int, video: Video) -> Iterator[Window]:
        c = self.clips
        if self.stride is None:
            frames = FRAME_RULES[c.sampling].views(video, c.num_frames, c.sampling_rate, 1)  # (1,T)
        else:
            frames = sliding_windows(video.num_frames, c.num_frames, c.sampling_rate, self.stride)  # (W,T)
        at_once = max(1, FRAME_BYTES // (3 * video.size[0] * video.size[1] * frames.shape[1]))
        for start in range(0, len(frames), at_once):
            part = frames[start : start + at_once]
            distinct, inverse = np.unique(part, return_inverse=True)  # (U,), (n*T,)
            shown = self.crop(video.get_frames(distinct))[0]  # (U,3,S,S)
            for k, where in enumerate(torch.from_numpy(inverse.reshape(part.shape))):
                yield Window(number, part[k], shown[where].transpose(0, 1), last=start + k + 1 == len(frames))


def collate(items: list[Window | Unreadable]) -> tuple[list[Window | Unreadable], Tensor | None]:
    """Returns the items without their clips, and the clips stacked: uint8 (n,3,T,S,S), or None for n = 0."""
    clips = [item.clip for item in items if isinstance(item, Window)]
    items = [item._replace(clip=None) if isinstance(item, Window) else item for item in items]
    return items, torch.stack(clips) if clips else None  # (n,3,T,S,S)
