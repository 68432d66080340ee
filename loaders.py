"""From samples to batches: which videos a process takes, in which order, and the loaders."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from clips.isolation import outlive_signals
from clips.lists import VideoList
from clips.transforms import ClipTransform, EvenCrops
from datasets import FRAME_RULES, ClipSettings, DataSet, EvalDataset, TrainDataset
from utils import SettingError, counted


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How one process of a run loads its batches.

    Args:
        batch_size: videos in a batch of one process.
        update_freq: batches that make one optimiser step.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: whether batches lie in pinned memory, where there is a GPU to copy to.
    """

    batch_size: int
    update_freq: int = 1
    num_workers: int = 4
    pin_memory: bool = True
    rank: int = 0
    world_size: int = 1


def usable_workers(most: int) -> int:
    """The data workers that a process can use: as many as SLURM gives it cores, else its share of the machine's.

    Args:
        most: where SLURM says nothing; a process alone on a large machine needs no worker for every core.
    """
    given = int(os.environ.get("SLURM_CPUS_PER_TASK") or 0)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no affinity
    share = (given or here) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that of torchrun, maybe inside a SLURM task
    return max(1, share if given else min(share, most))


class EpochSampler(Sampler):
    """Yields the (epoch, index) pairs of one process, so that workers that live on know the epoch.

    The permutation of an epoch comes from (seed, epoch). Of W processes, process r takes the positions r, r+W
    and so on: step k of all processes together is the same set of videos for any W with the same total batch.
    The videos beyond the last whole step are dropped, different ones in every epoch.

    Attributes:
        steps_per_epoch: batches of one process, a multiple of update_freq.

    Raises:
        SettingError: there are fewer videos than one optimiser step of all processes takes.
    """

    def __init__(self, *, num_videos: int, seed: int, loading: LoadSettings):
        self.num_videos, self.seed = num_videos, seed
        self.batch_size, self.update_freq = loading.batch_size, loading.update_freq
        self.rank, self.world_size = loading.rank, loading.world_size
        total_batch = self.batch_size * self.update_freq * self.world_size
        self.steps_per_epoch = num_videos // total_batch * self.update_freq
        if self.steps_per_epoch == 0:
            raise SettingError(
                f"{counted(num_videos, 'video')} can't fill one step of --batch_size {self.batch_size} x --update_freq "
                f"{self.update_freq} x {counted(self.world_size, 'process')}: lower one of these, or list more videos"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Chooses the epoch, and the batch to start at when a run is resumed inside it."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is outside an epoch of {self.steps_per_epoch} steps")
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_videos)
        mine = order[self.rank :: self.world_size]
        mine = mine[self.start_step * self.batch_size : self.steps_per_epoch * self.batch_size]
        return ((self.epoch, index) for index in mine.tolist())

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.batch_size


def evaluation_share(num_videos: int, *, rank: int, world_size: int, spread: bool = True) -> range:
    """Returns the videos of one process: r, r+W and so on, or all of them for process 0 unless they are spread.

    Every video comes exactly once, so processes may have different numbers of batches, or none: the loop must
    not contain a collective call.
    """
    return range(rank, num_videos, world_size) if spread else range(num_videos if rank == 0 else 0)


def collate(samples: list[dict]) -> dict:
    """Makes a batch of B training samples.

    Returns:
        `clips` uint8 (B*num_sample,C,T,S,S), the clips of a video one after the other; `label` int64
        (B*num_sample,), one for each clip; `index` int64 (B,); `bad`, the (path, reason) of replaced videos.
    """
    clips = default_collate([s["clips"] for s in samples])  # stacks into shared memory in a worker
    label = torch.tensor([s["label"] for s in samples])
    return {
        "clips": clips.flatten(0, 1),
        "label": label.repeat_interleave(clips.shape[1]),
        "index": torch.tensor([s["index"] for s in samples]),
        "bad": [entry for s in samples for entry in s["bad"]],
    }


def collate_views(samples: list[dict]) -> dict:
    """Makes a batch of the n samples of validation or test that could be read.

    Returns:
        `clips` uint8 (n,V,C,T,S,S), with n = 0 an empty tensor of one axis; `label` int64 (n,); `index` int64
        (n,); `bad`, the (index, path, reason) of the unreadable videos.
    """
    good = [s for s in samples if s["clips"] is not None]
    return {
        "clips": default_collate([s["clips"] for s in good]) if good else torch.empty(0, dtype=torch.uint8),
        "label": torch.tensor([s["label"] for s in good], dtype=torch.int64),
        "index": torch.tensor([s["index"] for s in good], dtype=torch.int64),
        "bad": [(s["index"], *entry) for s in samples for entry in s["bad"]],
    }


def build_training_loader(dataset: TrainDataset, loading: LoadSettings) -> DataLoader:
    """Builds the loader of one process; call `loader.sampler.set_epoch(epoch, start_step)` before each epoch.

    A batch holds batch_size * num_sample clips.

    Raises:
        SettingError: the list is smaller than one step.
    """
    sampler = EpochSampler(num_videos=len(dataset), seed=dataset.settings.seed, loading=loading)
    settings = {"batch_size": loading.batch_size, "persistent_workers": loading.num_workers > 0}
    return _build(dataset, loading, sampler=sampler, collate_fn=collate, **settings)


def build_evaluation_loader(dataset: EvalDataset, loading: LoadSettings, *, spread: bool = True) -> DataLoader:
    """Builds the loader of one process for validation or test; without `spread`, process 0 takes all videos.

    The batch size counts clips here, V to a video; a batch holds at least one video.
    """
    share = evaluation_share(len(dataset), rank=loading.rank, world_size=loading.world_size, spread=spread)
    batch_size = max(1, loading.batch_size // len(dataset.views))
    return _build(dataset, loading, sampler=share, batch_size=batch_size, collate_fn=collate_views)


def _build(dataset: Dataset, loading: LoadSettings, **settings) -> DataLoader:
    # With its own generator the loader draws nothing from torch's global one, which masks may depend on.
    settings |= {"generator": torch.Generator(), "pin_memory": loading.pin_memory and torch.cuda.is_available()}
    if loading.num_workers and sys.platform == "linux":  # elsewhere the platform's own method
        settings["multiprocessing_context"] = "fork"  # workers share one `IndexTable`; Python 3.14's default differs
    return DataLoader(dataset, num_workers=loading.num_workers, worker_init_fn=outlive_signals, **settings)


def build_finetuning_loaders(
    *,
    splits: dict[str, VideoList],
    data_set: DataSet,
    transform: ClipTransform,
    settings: ClipSettings,
    loading: LoadSettings,
    input_size: int = 224,
    short_side: int = 224,
    random_validation: bool = False,
    dist_eval: bool = True,
) -> dict[str, DataLoader]:
    """Builds loaders for those of "train", "val" and "test" that `splits` has (`read_splits`), by the same names.

    Args:
        data_set: says how many views a test takes.
        transform: for training, see `build_finetune_transform`.
        loading: batch_size counts videos of training; validation and test take 1.5 times as many clips.
        input_size: side of a clip in validation and test, in pixels.
        short_side: see `EvenCrops`.
        random_validation: see `random_clips` of `EvalDataset`.
        dist_eval: whether the processes share validation and test; otherwise process 0 takes them alone.

    Raises:
        SettingError: the training list is smaller than one step, or `short_side` smaller than `input_size`.
    """
    views = {"val": (None, 1), "test": (data_set.test_segments, data_set.test_crops)}
    evaluation = replace(loading, batch_size=loading.batch_size * 3 // 2)
    round_up = FRAME_RULES[settings.sampling].round_up
    loaders = {}
    for split, videos in splits.items():
        if split == "train":
            dataset = TrainDataset(videos=videos, transform=transform, settings=settings)
            loaders[split] = build_training_loader(dataset, loading)
            continue
        num_segments, num_crops = views[split]
        crops = EvenCrops(short_side=short_side, size=input_size, num_crops=num_crops, round_up=round_up)
        dataset = EvalDataset(
            videos=videos, crops=crops, settings=settings, num_segments=num_segments, random_clips=random_validation
        )
        loaders[split] = build_evaluation_loader(dataset, evaluation, spread=dist_eval)
    return loaders
