"""From a list of videos to samples: uint8 clips and their labels. And the table of data sets.

    list file -> VideoList -> dataset[key] -> collate -> batch

What happens to video `index` in an epoch depends on (seed, epoch, index) alone, not on the worker or process
that does it nor on the order. So a run can be resumed anywhere and spread over any number of processes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clips.frame_indices import (
    dense_clip,
    dense_views,
    mae_st_clip,
    mae_st_views,
    pretrain_clip,
    segment_clip,
    segment_views,
)
from clips.isolation import Isolated
from clips.lists import VideoList
from clips.transforms import ClipTransform, EvenCrops
from clips.video import Video, open_video
from clips.video_index import VideoError

# --- the table of data sets ---------------------------------------------------------------------------------


class FrameRule(NamedTuple):
    """Which frames make a clip; both return int64 frame numbers.

    clip: (video, T, stride, rng) -> (T,), the middle one where rng is None.
    views: (video, T, stride, V) -> (V,T), the temporal views of a test.
    """

    clip: Callable[[Video, int, int, np.random.Generator | None], np.ndarray]
    views: Callable[[Video, int, int, int], np.ndarray]


# Segments take one frame of each of T equal parts and have no stride. In a video of fewer frames than parts
# the published rule repeats frame 0 for training and validation; ours repeats each frame.
FRAME_RULES = {
    "dense": FrameRule(
        lambda video, length, stride, rng: dense_clip(video.num_frames, length, stride, rng),
        lambda video, length, stride, views: dense_views(video.num_frames, length, stride, views),
    ),
    "segments": FrameRule(
        lambda video, length, stride, rng: segment_clip(video.num_frames, length, rng),
        lambda video, length, stride, views: segment_views(video.num_frames, length, views),
    ),
    "segments_published": FrameRule(
        lambda video, length, stride, rng: segment_clip(video.num_frames, length, rng, reference=True),
        lambda video, length, stride, views: segment_views(video.num_frames, length, views),
    ),
    "mae_st": FrameRule(
        lambda video, length, stride, rng: mae_st_clip(video.num_frames, length, stride, video.fps, rng),
        lambda video, length, stride, views: mae_st_views(video.num_frames, length, stride, video.fps, views),
    ),
}


class DataSet(NamedTuple):
    """What fine-tuning must know of a data set.

    sampling: a key of FRAME_RULES. flip: whether training mirrors clips; not where left and right matter.
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
    "SSV2": DataSet(174, "segments", False, 2, 3),
    "UCF101": DataSet(101, "dense", True, 5, 3),
    "HMDB51": DataSet(51, "dense", True, 5, 3),
    "custom": DataSet(None, "dense", True, 5, 3),  # as many classes as --nb_classes says
}


def resolve_data_set(
    name: str,
    *,
    num_classes: int | None = None,
    sampling: str | None = None,
    flip: bool | None = None,
    test_segments: int | None = None,
    test_crops: int | None = None,
) -> DataSet:
    """The table's entry of a name with what is not None in its place.

    Raises ValueError for an unknown name or rule, for a number of classes that is missing or not the table's,
    and for no views.
    """
    if name not in DATA_SETS:
        raise ValueError(f"--data_set {name}: choose one of {', '.join(DATA_SETS)}")
    if sampling is not None and sampling not in FRAME_RULES:
        raise ValueError(f"--sampling {sampling}: choose one of {', '.join(FRAME_RULES)}")
    known = DATA_SETS[name].num_classes
    if known is None and (num_classes is None or num_classes < 1):
        raise ValueError(f"--data_set {name} needs --nb_classes, the number of classes, at least 1")
    if None not in (known, num_classes) and known != num_classes:
        raise ValueError(
            f"--nb_classes {num_classes}, but {name} has {known} classes: leave the flag out, or use "
            "--data_set custom for a part of a data set"
        )
    given = {
        "num_classes": num_classes,
        "sampling": sampling,
        "flip": flip,
        "test_segments": test_segments,
        "test_crops": test_crops,
    }
    data_set = DATA_SETS[name]._replace(**{k: v for k, v in given.items() if v is not None})
    if data_set.test_segments < 1 or data_set.test_crops < 1:
        raise ValueError("--test_num_segment and --test_num_crop must be at least 1")
    return data_set


# --- samples of training ------------------------------------------------------------------------------------


class NoReadableVideoError(RuntimeError):
    """One video and all the others tried in its place cannot be read."""


class TrainDataset(Dataset):
    """Clips to train on, by (epoch, index): `load_clips` is what the subclasses differ in.

    videos: the list. transform: makes of a uint8 clip (T,C,H,W) one of (T,C,S,S), given a generator.
    num_frames, sampling_rate: frames of a clip, and the step between them in frames of the video.
    num_sample: clips of one video out of one decoding.
    decoder: as `open_video` takes it. max_tries: how many videos in all are tried for one sample.
    decode_timeout: seconds after which a video counts as unreadable, as does one that crashes its decoder;
        0 decodes in the calling process, without a limit.
    """

    def __init__(
        self,
        *,
        videos: VideoList,
        transform: ClipTransform,
        num_frames: int = 16,
        sampling_rate: int = 4,
        num_sample: int = 1,
        seed: int = 0,
        decoder: str = "auto",
        max_tries: int = 10,
        decode_timeout: float = 0,
    ):
        self.videos = videos
        self.transform = transform
        self.num_frames = num_frames
        self.sampling_rate = sampling_rate
        self.num_sample = num_sample
        self.seed = seed
        self.decoder = decoder
        self.max_tries = max_tries
        self.load = Isolated(self._load, decode_timeout)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """(epoch, index) -> clips uint8 (num_sample,C,T,S,S), index, label (NO_LABEL: unknown), bad.

        A video that cannot be read is replaced by one that is drawn from (seed, epoch, index, attempt): `bad`
        lists the (path, reason) of those, and `index` and `label` are those of the video shown. Raises
        NoReadableVideoError when `max_tries` videos have failed.
        """
        epoch, index = key
        bad = []
        for attempt in range(self.max_tries):
            rng, shown = self._draw(epoch, index, attempt)
            try:
                clips = self.load(self.videos[shown].path, rng)
                return {"clips": clips, "index": shown, "label": int(self.videos.labels[shown]), "bad": bad}
            except VideoError as error:
                bad.append((str(error.path), str(error.reason)))
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in bad)
        raise NoReadableVideoError(
            f"{len(bad)} videos of {self.videos.list_path}, drawn in a row, cannot be read; are they where "
            f"--data_root says, and is the storage there? The last checkpoint is untouched.{reasons}"
        )

    def _draw(self, epoch: int, index: int, attempt: int) -> tuple[np.random.Generator, int]:
        """The generator of an attempt, and the video to show: `index` itself at first, then any other."""
        if attempt == 0:
            return np.random.default_rng([self.seed, epoch, index]), index
        rng = np.random.default_rng([self.seed, epoch, index, attempt])
        others = max(1, len(self) - 1)
        return rng, (index + 1 + int(rng.integers(others))) % len(self)

    def _load(self, path: str, rng: np.random.Generator) -> Tensor:
        """The clips of one video; nothing outside has a part in them, so a child process may do it."""
        with open_video(path, self.decoder) as video:
            clips = self.load_clips(video, rng)  # num_sample times T C H W
        return torch.stack([self.transform(clip, rng).transpose(0, 1) for clip in clips])  # n C T S S

    def load_clips(self, video: Video, rng: np.random.Generator) -> Tensor:
        """uint8 (num_sample,T,C,H,W), decoded in one go."""
        raise NotImplementedError


class PretrainDataset(TrainDataset):
    """Clips for pre-training: those of one video have each its own start and its own crop."""

    def load_clips(self, video: Video, rng: np.random.Generator) -> Tensor:
        rule = (video.num_frames, self.num_frames, self.sampling_rate)
        indices = np.stack([pretrain_clip(*rule, rng) for _ in range(self.num_sample)])
        return video.get_frames(indices.ravel()).unflatten(0, indices.shape)


class FinetuneDataset(TrainDataset):
    """Clips for fine-tuning: those of one video show the same frames, each augmented on its own.

    sampling: a key of FRAME_RULES. That is repeated augmentation (Hoffer et al., 2020).
    """

    def __init__(self, *, sampling: str, **settings):
        super().__init__(**settings)
        self.sampling = sampling

    def load_clips(self, video: Video, rng: np.random.Generator) -> Tensor:
        rule = FRAME_RULES[self.sampling]
        frames = video.get_frames(rule.clip(video, self.num_frames, self.sampling_rate, rng))
        return frames.expand(self.num_sample, -1, -1, -1, -1)


# --- samples of validation and test -------------------------------------------------------------------------


class EvalDataset(Dataset):
    """All views of one video, by index, from one decoding.

    num_segments: temporal views of a test; None for the single clip of a validation, the middle one, or with
        `random_clips` one drawn from (seed, index), from where the published validation draws it.
    crops: the spatial views. The rest is as in `TrainDataset`.
    """

    def __init__(
        self,
        *,
        videos: VideoList,
        crops: EvenCrops,
        sampling: str,
        num_segments: int | None,
        num_frames: int = 16,
        sampling_rate: int = 4,
        random_clips: bool = False,
        seed: int = 0,
        decoder: str = "auto",
        decode_timeout: float = 0,
    ):
        self.videos = videos
        self.crops = crops
        self.sampling = sampling
        self.num_segments = num_segments
        self.num_frames = num_frames
        self.sampling_rate = sampling_rate
        self.random_clips = random_clips
        self.seed = seed
        self.decoder = decoder
        self.load = Isolated(self._load, decode_timeout)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def views(self) -> list[tuple[int, int]]:
        """(segment, crop) of each view, in the order of `clips`."""
        return [(s, c) for s in range(self.num_segments or 1) for c in range(self.crops.num_crops)]

    def __getitem__(self, index: int) -> dict:
        """index -> clips uint8 (V,C,T,S,S), index, label (NO_LABEL: unknown), bad.

        A video that cannot be read has no clips (None), and its (path, reason) stands in `bad`: nothing takes
        its place.
        """
        sample = {"clips": None, "index": index, "label": int(self.videos.labels[index]), "bad": []}
        path = self.videos[index].path
        try:
            sample["clips"] = self.load(path, index)
        except VideoError as error:
            sample["bad"] = [(path, str(error.reason))]
        return sample

    def _load(self, path: str, index: int) -> Tensor:
        with open_video(path, self.decoder) as video:
            indices = self._frame_indices(video, index)  # segments T
            frames = video.get_frames(indices.ravel())
        clips = self.crops(frames).unflatten(1, indices.shape)  # crops segments T C S S
        return clips.transpose(0, 1).flatten(0, 1).transpose(1, 2)  # V C T S S

    def _frame_indices(self, video: Video, index: int) -> np.ndarray:
        rule = FRAME_RULES[self.sampling]
        if self.num_segments is not None:
            return rule.views(video, self.num_frames, self.sampling_rate, self.num_segments)
        rng = np.random.default_rng([self.seed, index]) if self.random_clips else None
        return rule.clip(video, self.num_frames, self.sampling_rate, rng)[None]
