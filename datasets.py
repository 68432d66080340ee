"""The table of data sets, the frame rules, and samples: uint8 clips and their labels.

    list file -> VideoList -> dataset[key] -> collate -> batch

What happens to video `index` in an epoch depends on (seed, epoch, index) alone: not on the worker or process that
loads it, nor on the order. So a run can be resumed anywhere and spread over any number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clips import frame_indices as rules
from clips.index_table import IndexTable
from clips.isolation import Isolated
from clips.lists import VideoList
from clips.transforms import ClipTransform, EvenCrops
from clips.video import Video, open_video
from clips.video_index import VideoError
from utils import SettingError, UserError


class FrameRule(NamedTuple):
    """Which frames make a clip: two functions that return frame numbers, int64.

    clip: (video, T, stride, rng) -> (T,); the middle clip where rng is None.
    views: (video, T, stride, V) -> (V,T), the temporal views of a test.
    """

    clip: Callable[[Video, int, int, np.random.Generator | None], np.ndarray]
    views: Callable[[Video, int, int, int], np.ndarray]
    round_up: bool = False  # of the positions of spatial views, see `EvenCrops`


# Segments take one frame from each of T equal parts and have no stride. In a video of fewer frames than parts
# the published rule repeats frame 0 for training and validation; ours repeats each frame.
FRAME_RULES = {
    "pretrain": FrameRule(
        lambda video, length, stride, rng: rules.pretrain_clip(video.num_frames, length, stride, rng),
        lambda video, length, stride, views: rules.dense_views(video.num_frames, length, stride, views),
    ),
    "dense": FrameRule(
        lambda video, length, stride, rng: rules.dense_clip(video.num_frames, length, stride, rng),
        lambda video, length, stride, views: rules.dense_views(video.num_frames, length, stride, views),
    ),
    "segments": FrameRule(
        lambda video, length, stride, rng: rules.segment_clip(video.num_frames, length, rng),
        lambda video, length, stride, views: rules.segment_views(video.num_frames, length, views),
    ),
    "segments_published": FrameRule(
        lambda video, length, stride, rng: rules.segment_clip(video.num_frames, length, rng, still_if_short=True),
        lambda video, length, stride, views: rules.segment_views(video.num_frames, length, views),
    ),
    "mae_st": FrameRule(
        lambda video, length, stride, rng: rules.mae_st_clip(video.num_frames, length, stride, video.fps, rng),
        lambda video, length, stride, views: rules.mae_st_views(video.num_frames, length, stride, video.fps, views),
        round_up=True,
    ),
}


class DataSet(NamedTuple):
    """What fine-tuning needs to know about a data set.

    sampling: a key of FRAME_RULES.
    flip: whether training mirrors clips; False where left and right matter.
    test_segments, test_crops: temporal and spatial views of a test, as published.
    """

    num_classes: int | None
    sampling: str
    flip: bool
    test_segments: int
    test_crops: int


DATA_SETS = {
    "Kinetics-400": DataSet(400, "dense", True, 5, 3),
    "Kinetics-600": DataSet(600, "dense", True, 5, 3),
    "Kinetics-700": DataSet(700, "dense", True, 5, 3),
    "Kinetics-710": DataSet(710, "dense", True, 5, 3),
    "SSV2": DataSet(174, "segments", False, 2, 3),
    "UCF101": DataSet(101, "dense", True, 5, 3),
    "HMDB51": DataSet(51, "dense", True, 5, 3),
    "Diving48": DataSet(48, "segments", True, 2, 3),  # this row and the next: a choice, no paper here reports them
    "Jester": DataSet(27, "segments", False, 2, 3),
    "custom": DataSet(None, "dense", True, 5, 3),  # as many classes as --nb_classes says, or as have names
}


def resolve_data_set(name: str, **changes) -> DataSet:
    """Returns the table's entry for a name, with those of its fields replaced that `changes` has, None apart.

    Raises:
        SettingError: the name or the frame rule is unknown, the number of classes is missing or not the table's,
            or there would be no views.
    """
    if name not in DATA_SETS:
        raise SettingError(f"--data_set {name}: choose one of {', '.join(DATA_SETS)}")
    entry = DATA_SETS[name]
    data_set = entry._replace(**{field: value for field, value in changes.items() if value is not None})
    if data_set.sampling not in FRAME_RULES:
        raise SettingError(f"--sampling {data_set.sampling}: choose one of {', '.join(FRAME_RULES)}")
    if entry.num_classes not in (None, data_set.num_classes):
        raise SettingError(
            f"--nb_classes {data_set.num_classes}, but {name} has {entry.num_classes} classes: leave the flag "
            "out, or use --data_set custom for a part of a data set"
        )
    if data_set.num_classes is None or data_set.num_classes < 1:
        raise SettingError(
            f"--data_set {name} needs --nb_classes, the number of classes, at least 1, or lists of `path,class name`"
        )
    if data_set.test_segments < 1 or data_set.test_crops < 1:
        raise SettingError("--test_num_segment and --test_num_crop must be at least 1")
    return data_set


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Which T frames of a video its clips show, and how they are decoded.

    Args:
        sampling: a key of FRAME_RULES.
        sampling_rate: stride, the step from one frame of a clip to the next, in frames of the video.
        num_sample: clips that training takes of one video, out of one decoding.
        share_frames: whether those clips show the same frames, each augmented on its own (repeated augmentation,
            Hoffer et al., 2020); otherwise each has a start of its own.
        decoder: as `open_video` takes it.
        decode_timeout: seconds after which a video counts as unreadable, as does one that crashes its decoder;
            0 decodes in the calling process, without a limit.
    """

    sampling: str
    num_frames: int = 16
    sampling_rate: int = 4
    num_sample: int = 1
    share_frames: bool = False
    seed: int = 0
    decoder: str = "auto"
    decode_timeout: float = 0


class NoReadableVideoError(UserError, RuntimeError):
    """One video and all the others tried in its place cannot be read."""


class TrainDataset(Dataset):
    """Clips to train on, by (epoch, index); `max_tries` videos in all are tried for one sample."""

    def __init__(self, *, videos: VideoList, transform: ClipTransform, settings: ClipSettings, max_tries: int = 10):
        self.videos, self.transform, self.settings, self.max_tries = videos, transform, settings, max_tries
        self.indexes = IndexTable(len(videos))
        self.load = Isolated(self._load, settings.decode_timeout)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Loads a sample; an unreadable video is replaced by one drawn from (seed, epoch, index, attempt).

        Returns:
            `clips` uint8 (num_sample,C,T,S,S); `index` and `label` (NO_LABEL: unknown) of the video shown; `bad`,
            the (path, reason) of the videos that were replaced.

        Raises:
            NoReadableVideoError: `max_tries` videos have failed.
        """
        epoch, index = key
        bad = []
        for attempt in range(self.max_tries):
            rng, shown = self._draw(epoch, index, attempt)
            try:
                clips = self.load(self.videos[shown].path, shown, rng)
                return {"clips": clips, "index": shown, "label": int(self.videos.labels[shown]), "bad": bad}
            except VideoError as error:
                bad.append((str(error.path), str(error.reason)))
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in bad)
        raise NoReadableVideoError(
            f"{len(bad)} videos of {self.videos.list_path}, drawn in a row, cannot be read; are they where "
            f"--data_root says, and is the storage available? The last checkpoint is untouched.{reasons}"
        )

    def _draw(self, epoch: int, index: int, attempt: int) -> tuple[np.random.Generator, int]:
        """Returns the generator of an attempt, and the video to show: first `index` itself, then any other."""
        if attempt == 0:
            return np.random.default_rng([self.settings.seed, epoch, index]), index
        rng = np.random.default_rng([self.settings.seed, epoch, index, attempt])
        others = max(1, len(self) - 1)
        return rng, (index + 1 + int(rng.integers(others))) % len(self)

    def _load(self, path: str, number: int, rng: np.random.Generator) -> Tensor:
        """Makes the clips of one video from the arguments alone, so that a child process may do it."""
        with open_video(path, self.settings.decoder, self.indexes.find(number, path)) as video:
            clips = self.load_clips(video, rng)  # (num_sample,T,C,H,W)
        return torch.stack([self.transform(clip, rng).transpose(0, 1) for clip in clips])  # (num_sample,C,T,S,S)

    def load_clips(self, video: Video, rng: np.random.Generator) -> Tensor:
        """Returns uint8 (num_sample,T,C,H,W), decoded in one go."""
        s, rule = self.settings, FRAME_RULES[self.settings.sampling]
        starts = 1 if s.share_frames else s.num_sample
        indices = np.stack([rule.clip(video, s.num_frames, s.sampling_rate, rng) for _ in range(starts)])
        clips = video.get_frames(indices.ravel()).unflatten(0, indices.shape)  # (starts,T,C,H,W)
        return clips.expand(s.num_sample, -1, -1, -1, -1)


@dataclass(kw_only=True, eq=False)
class EvalDataset(Dataset):
    """All views of one video, by index, from one decoding.

    Args:
        num_segments: temporal views of a test; None for the single clip of a validation: the middle one.
        random_clips: whether that clip is drawn from (seed, index) instead, as in the published validation.
    """

    videos: VideoList
    crops: EvenCrops
    settings: ClipSettings
    num_segments: int | None
    random_clips: bool = False

    def __post_init__(self):
        self.indexes = IndexTable(len(self.videos))
        self.load = Isolated(self._load, self.settings.decode_timeout)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def views(self) -> list[tuple[int, int]]:
        """(segment, crop) of each view, in the order of `clips`."""
        return [(s, c) for s in range(self.num_segments or 1) for c in range(self.crops.num_crops)]

    def __getitem__(self, index: int) -> dict:
        """Loads the views of a video.

        Returns:
            `clips` uint8 (V,C,T,S,S); `index`; `label` (NO_LABEL: unknown); `bad`, empty. For an unreadable video
            `clips` is None and `bad` holds its (path, reason): nothing replaces it.
        """
        sample = {"clips": None, "index": index, "label": int(self.videos.labels[index]), "bad": []}
        path = self.videos[index].path
        try:
            sample["clips"] = self.load(path, index)
        except VideoError as error:
            sample["bad"] = [(path, str(error.reason))]
        return sample

    def _load(self, path: str, index: int) -> Tensor:
        with open_video(path, self.settings.decoder, self.indexes.find(index, path)) as video:
            indices = self._frame_indices(video, index)  # (segments,T)
            frames = video.get_frames(indices.ravel())  # (segments*T,C,H,W)
        clips = self.crops(frames).unflatten(1, indices.shape)  # (crops,segments,T,C,S,S)
        return clips.transpose(0, 1).flatten(0, 1).transpose(1, 2)  # (V,C,T,S,S)

    def _frame_indices(self, video: Video, index: int) -> np.ndarray:
        s, rule = self.settings, FRAME_RULES[self.settings.sampling]
        if self.num_segments is not None:
            return rule.views(video, s.num_frames, s.sampling_rate, self.num_segments)
        rng = np.random.default_rng([s.seed, index]) if self.random_clips else None
        return rule.clip(video, s.num_frames, s.sampling_rate, rng)[None]
