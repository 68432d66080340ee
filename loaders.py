"""From samples to batches: which videos a process takes, in which order, and the loaders."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from clips.isolation import outlive_signals
from clips.lists import VideoList
from clips.transforms import ClipTransform, EvenCrops
from datasets import DataSet, EvalDataset, FinetuneDataset, PretrainDataset, TrainDataset

# --- samplers -----------------------------------------------------------------------------------------------


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
        self.update_freq = update_freq
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


class EvalSampler(Sampler):
    """Yields the indices of one process: of W processes, process r takes the videos r, r+W and so on.

    Every video comes exactly once, so processes may have different numbers of batches, or none: no collective
    call may stand inside the loop. spread False leaves all videos to process 0.
    """

    def __init__(self, *, num_videos: int, rank: int = 0, world_size: int = 1, spread: bool = True):
        if spread:
            self.share = range(rank, num_videos, world_size)
        else:
            self.share = range(num_videos if rank == 0 else 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


# --- batches ------------------------------------------------------------------------------------------------


def collate(samples: list[dict]) -> dict:
    """B samples of training -> a batch.

    clips uint8 (B*num_sample,C,T,S,S), the clips of a video one after the other; label int64 (B*num_sample,),
    one for each clip; index int64 (B,); bad, the (path, reason) of videos that were replaced.
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
    """Samples of validation or test -> a batch of the n that could be read.

    clips uint8 (n,V,C,T,S,S), label int64 (n,), index int64 (n,); bad, the (index, path, reason) of those
    that could not. With n = 0 clips is an empty tensor of one axis.
    """
    good = [s for s in samples if s["clips"] is not None]
    return {
        "clips": default_collate([s["clips"] for s in good]) if good else torch.empty(0, dtype=torch.uint8),
        "label": torch.tensor([s["label"] for s in good], dtype=torch.int64),
        "index": torch.tensor([s["index"] for s in good], dtype=torch.int64),
        "bad": [(s["index"], *entry) for s in samples for entry in s["bad"]],
    }


# --- loaders ------------------------------------------------------------------------------------------------


def build_training_loader(
    dataset: TrainDataset,
    *,
    batch_size: int,
    update_freq: int = 1,
    num_workers: int = 4,
    pin_memory: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """The loader of one process; call `loader.sampler.set_epoch(epoch, start_step)` before each epoch.

    batch_size counts videos of one process: a batch holds batch_size * num_sample clips. Memory is pinned
    only where there is a GPU to copy to. Raises ValueError when the list is smaller than one step.
    """
    sampler = EpochSampler(
        num_videos=len(dataset),
        batch_size=batch_size,
        update_freq=update_freq,
        seed=dataset.seed,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=outlive_signals,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        # With its own generator the loader draws nothing from torch's global one, which masks may depend on.
        generator=torch.Generator(),
    )


def build_evaluation_loader(
    dataset: EvalDataset,
    *,
    batch_size: int,
    num_workers: int = 4,
    pin_memory: bool = True,
    rank: int = 0,
    world_size: int = 1,
    spread: bool = True,
) -> DataLoader:
    """The loader of one process for validation or test. batch_size counts clips: V to a video, at least one.

    spread: see `EvalSampler`.
    """
    sampler = EvalSampler(num_videos=len(dataset), rank=rank, world_size=world_size, spread=spread)
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=max(1, batch_size // len(dataset.views)),
        collate_fn=collate_views,
        num_workers=num_workers,
        worker_init_fn=outlive_signals,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # as above
    )


def build_pretraining_loader(
    *,
    videos: VideoList,
    transform: ClipTransform,
    num_frames: int = 16,
    sampling_rate: int = 4,
    num_sample: int = 1,
    seed: int = 0,
    decoder: str = "auto",
    decode_timeout: float = 0,
    **loading,
) -> DataLoader:
    """The loader of a `PretrainDataset`, see there; loading: what `build_training_loader` takes."""
    dataset = PretrainDataset(
        videos=videos,
        transform=transform,
        num_frames=num_frames,
        sampling_rate=sampling_rate,
        num_sample=num_sample,
        seed=seed,
        decoder=decoder,
        decode_timeout=decode_timeout,
    )
    return build_training_loader(dataset, **loading)


def build_finetuning_loaders(
    *,
    splits: dict[str, VideoList],
    data_set: DataSet,
    transform: ClipTransform,
    num_frames: int = 16,
    sampling_rate: int = 4,
    input_size: int = 224,
    short_side: int = 224,
    num_sample: int = 2,
    batch_size: int = 64,
    update_freq: int = 1,
    random_validation: bool = False,
    dist_eval: bool = True,
    seed: int = 0,
    decoder: str = "auto",
    decode_timeout: float = 0,
    **loading,
) -> dict[str, DataLoader]:
    """Loaders for those of "train", "val" and "test" that `splits` has (`read_splits`), by the same names.

    transform: of training, see `build_finetune_transform`. input_size: pixels of a clip's side in validation
    and test; short_side: see `EvenCrops`. batch_size counts videos of training in one process; validation and
    test take 1.5 times as many clips. random_validation: see `EvalDataset`. dist_eval: False leaves
    validation and test to process 0. decode_timeout: see `TrainDataset`. loading: num_workers, pin_memory,
    rank, world_size.

    Raises ValueError when the training list is smaller than one step, and for what `EvenCrops` refuses.
    """
    clips = {
        "sampling": data_set.sampling,
        "num_frames": num_frames,
        "sampling_rate": sampling_rate,
        "seed": seed,
        "decoder": decoder,
        "decode_timeout": decode_timeout,
    }
    views = {"val": (None, 1), "test": (data_set.test_segments, data_set.test_crops)}
    loaders = {}
    for split, videos in splits.items():
        if split == "train":
            dataset = FinetuneDataset(videos=videos, transform=transform, num_sample=num_sample, **clips)
            loaders[split] = build_training_loader(
                dataset, batch_size=batch_size, update_freq=update_freq, **loading
            )
            continue
        num_segments, num_crops = views[split]
        crops = EvenCrops(
            short_side=short_side,
            size=input_size,
            num_crops=num_crops,
            round_up=data_set.sampling == "mae_st",
        )
        dataset = EvalDataset(
            videos=videos, crops=crops, num_segments=num_segments, random_clips=random_validation, **clips
        )
        loaders[split] = build_evaluation_loader(
            dataset, batch_size=batch_size * 3 // 2, spread=dist_eval, **loading
        )
    return loaders
