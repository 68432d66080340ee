"""From a list of videos to batches of uint8 clips.

    list file -> VideoList -> PretrainDataset[(epoch, index)] -> collate -> batch

What happens to video `index` in an epoch depends on (seed, epoch, index) alone, not on the worker or process
that does it nor on the order. So a run can be resumed anywhere and spread over any number of processes.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from augment import ClipTransform
from video import VideoError, open_video, pretrain_clip

# --- lists of videos ----------------------------------------------------------------------------------------

SUFFIXES = "mp4|webm|avi|mkv|mov|m4v|mpg|mpeg|wmv|flv|3gp"
ENDS_AS_VIDEO = re.compile(rf"\.({SUFFIXES})$", re.IGNORECASE)
GOES_ON_AFTER_VIDEO = re.compile(rf"\.({SUFFIXES})(?P<rest>[\s,].*)$", re.IGNORECASE)
LABELLED = re.compile(r"(.*[^\s,])[\s,]+(-?[0-9]+)")  # a path, white space or a comma, an integer
NO_LABEL = -1


class ListError(ValueError):
    """A list of videos that cannot be used; the message names the file and the line and says what to do."""


class Record(NamedTuple):
    """One video of a list: where it is, and its class (None where the list gives none)."""

    path: str
    label: int | None


class VideoList(Sequence):
    """The videos of one list file, read-only.

    Paths and labels are kept in flat buffers. A million Python strings would be copied, page by page, into
    every worker process as soon as their reference counts are touched.
    """

    def __init__(self, *, list_path: str, root: str, paths: list[str], labels: list[int]):
        encoded = [os.fsencode(path) for path in paths]
        self.list_path = list_path
        self.root = root
        self.labels = np.array(labels, dtype=np.int64)  # NO_LABEL where there is none
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"video {index} of {len(self)}")
        start = self._ends[index - 1] if index > 0 else 0
        path = os.fsdecode(self._paths[start : self._ends[index]])
        label = int(self.labels[index])
        return Record(os.path.join(self.root, path), None if label == NO_LABEL else label)


def read_list(list_path: str | Path, data_root: str | Path | None = None) -> VideoList:
    """Read a list of videos: one a line, `path label`, the label being optional.

    - The label is the last field if that is an integer and something stands before it; white space of any
      kind and length, or a comma, separates the two. -1 means that the label is not known.
    - Everything before it is the path, which may hold spaces and commas. A path whose last word is an integer
      (`clip 3`) is written with its suffix (`clip 3.mp4`) or in double quotes.
    - A path without a dot in its last component gets ".mp4".
    - What looks like a video and something wrong after it (`a.mp4 dancing`) is refused; quotes let it pass.
    - A relative path is looked up in `data_root` if given, else in the folder of the list.
    - Empty lines and lines that begin with # are skipped.

    Raises ListError for a missing, empty or malformed list.
    """
    root = Path(list_path).parent if data_root is None else Path(data_root)
    if not Path(list_path).is_file():
        what = "is a folder" if Path(list_path).is_dir() else "does not exist"
        raise ListError(
            f"the list of videos {list_path} {what}: set --data_path to a text file of `path label`"
        )
    if not root.is_dir():
        raise ListError(f"the folder of the videos {root} does not exist: set --data_root to it")
    paths, labels = [], []
    with open(list_path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            try:
                path, label = parse_line(line)
            except ValueError as error:
                raise ListError(f"{list_path}, line {number}: {error}") from None
            paths.append(path)
            labels.append(label)
    if not paths:
        raise ListError(f"the list of videos {list_path} is empty: write one `path label` a line")
    return VideoList(list_path=str(list_path), root=str(root), paths=paths, labels=labels)


def parse_line(line: str) -> tuple[str, int]:
    """One stripped line of a list -> path as written (with its suffix), label or NO_LABEL; see `read_list`.

    Raises ValueError saying what is wrong with the line.
    """
    labelled = LABELLED.fullmatch(line)
    path, label = (labelled[1], int(labelled[2])) if labelled else (line, NO_LABEL)
    if label < NO_LABEL:
        raise ValueError(f"the label {label} is negative; labels count from 0")
    if len(path) > 1 and path[0] == path[-1] == '"':
        path = path[1:-1]
    else:
        refuse_doubtful_path(path)
    if not path.strip():
        raise ValueError("the path is empty")
    return (path if "." in os.path.basename(path) else path + ".mp4"), label


def refuse_doubtful_path(path: str) -> None:
    """Raise ValueError where a path without quotes more likely is a path and something wrong after it."""
    if "\0" in path:
        raise ValueError("this is no text; --data_path takes a list of videos, not a video")
    more = GOES_ON_AFTER_VIDEO.search(path)
    if more and not ENDS_AS_VIDEO.search(path):
        raise ValueError(
            f'after the video stands "{more["rest"].strip()}", where one integer label may stand; '
            "if it belongs to the path, put the path in double quotes"
        )
    if "," in path and "." not in os.path.basename(path):
        raise ValueError(
            f'"{path}" has a comma but no integer label after it; put # before a heading, '
            "and double quotes around a path that has commas"
        )


def check_readable(videos: VideoList, decoder: str = "auto", *, limit: int = 1000) -> str:
    """Path of the first video, of at most `limit` spread evenly over the list, whose first frame decodes.

    For a look before training starts. Raises ListError with the first reasons when none does.
    """
    failures = []
    for index in np.linspace(0, len(videos) - 1, min(len(videos), limit), dtype=int):
        try:
            path = videos[index].path
            with open_video(path, decoder) as video:
                video.get_frames([0])
            return path
        except VideoError as error:
            failures.append(error)
    reasons = "".join(f"\n  {error.path}: {error.reason}" for error in failures[:3])
    raise ListError(
        f"none of {len(failures)} videos tried of {videos.list_path} can be read (relative paths start from "
        f"{videos.root}; --data_root changes that). The first:{reasons}"
    )


# --- samples ------------------------------------------------------------------------------------------------


class NoReadableVideoError(RuntimeError):
    """One video and all the others tried in its place cannot be read."""


class PretrainDataset(Dataset):
    """Clips for pre-training, by (epoch, index).

    videos: the list. transform: makes of a uint8 clip (T,C,H,W) one of (T,C,S,S), given a generator.
    num_frames, sampling_rate: frames of a clip, and the step between them in frames of the video.
    num_sample: clips of one video, each with its own start and its own crop, out of one decoding.
    decoder: as `open_video` takes it. max_tries: how many videos in all are tried for one sample.
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
    ):
        self.videos = videos
        self.transform = transform
        self.num_frames = num_frames
        self.sampling_rate = sampling_rate
        self.num_sample = num_sample
        self.seed = seed
        self.decoder = decoder
        self.max_tries = max_tries

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """(epoch, index) -> clips uint8 (num_sample,C,T,S,S), index, bad.

        A video that cannot be read is replaced by one drawn from the sample's own generator: `bad` lists the
        (path, reason) of those, and `index` is that of the video shown. Raises NoReadableVideoError when
        `max_tries` videos have failed.
        """
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        bad = []
        while len(bad) < self.max_tries:
            try:
                clips = self._load_clips(self.videos[index].path, rng)
                return {"clips": clips, "index": index, "bad": bad}
            except VideoError as error:
                bad.append((str(error.path), str(error.reason)))
                others = max(1, len(self) - 1)
                index = (index + 1 + int(rng.integers(others))) % len(self)
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in bad)
        raise NoReadableVideoError(
            f"{len(bad)} videos of {self.videos.list_path}, drawn in a row, cannot be read:{reasons}"
        )

    def _load_clips(self, path: str, rng: np.random.Generator) -> torch.Tensor:
        with open_video(path, self.decoder) as video:
            rule = (video.num_frames, self.num_frames, self.sampling_rate)
            indices = np.stack([pretrain_clip(*rule, rng) for _ in range(self.num_sample)])
            frames = video.get_frames(indices.ravel())  # decodes a frame of several clips once
        clips = frames.unflatten(0, indices.shape)  # num_sample T C H W
        clips = [self.transform(clip, rng).transpose(0, 1) for clip in clips]  # each C T S S
        return torch.stack(clips)  # num_sample C T S S


# --- batches ------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """Yields the (epoch, index) pairs of one process, so that workers that live on know the epoch.

    The permutation of an epoch comes from (seed, epoch). Of W processes, process r takes the positions r, r+W
    and so on: step k of all processes together is the same set of videos for any W with the same total batch.
    The videos left over after the last whole step are left out, others in every epoch. steps_per_epoch counts
    batches of one process; it is a multiple of update_freq, the batches that make one optimiser step.
    Raises ValueError when the data set is smaller than one optimiser step of all processes.
    """

    def __init__(
        self,
        *,
        num_videos: int,
        batch_size: int,
        update_freq: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_videos = num_videos
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = num_videos // (batch_size * update_freq * world_size) * update_freq
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_videos} videos do not fill one step of --batch_size {batch_size} x --update_freq "
                f"{update_freq} x {world_size} processes: lower one of these, or list more videos"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and the step (a count of batches) to start at when a run is resumed inside it."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is outside an epoch of {self.steps_per_epoch} steps")
        self.epoch = epoch
        self.start_step = start_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_videos)
        mine = order[self.rank :: self.world_size]
        mine = mine[self.start_step * self.batch_size : self.steps_per_epoch * self.batch_size]
        return ((self.epoch, index) for index in mine.tolist())

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.batch_size


def collate(samples: list[dict]) -> dict:
    """B samples -> clips uint8 (B*num_sample,C,T,S,S), index int64 (B,), bad (list of path, reason)."""
    return {
        # default_collate stacks into shared memory when a worker calls it
        "clips": default_collate([s["clips"] for s in samples]).flatten(0, 1),
        "index": torch.tensor([s["index"] for s in samples]),
        "bad": [entry for s in samples for entry in s["bad"]],
    }


def build_pretraining_loader(
    *,
    videos: VideoList,
    transform: ClipTransform,
    num_frames: int = 16,
    sampling_rate: int = 4,
    num_sample: int = 1,
    batch_size: int = 64,
    update_freq: int = 1,
    num_workers: int = 4,
    pin_memory: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    decoder: str = "auto",
) -> DataLoader:
    """The loader of one process; call `loader.sampler.set_epoch(epoch, start_step)` before each epoch.

    batch_size counts videos of one process: a batch holds batch_size * num_sample clips. Memory is pinned
    only where there is a GPU to copy to. Raises ValueError when the list is smaller than one step.
    """
    dataset = PretrainDataset(
        videos=videos,
        transform=transform,
        num_frames=num_frames,
        sampling_rate=sampling_rate,
        num_sample=num_sample,
        seed=seed,
        decoder=decoder,
    )
    sampler = EpochSampler(
        num_videos=len(videos),
        batch_size=batch_size,
        update_freq=update_freq,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        # With its own generator the loader draws nothing from torch's global one, which masks may depend on.
        generator=torch.Generator(),
    )
