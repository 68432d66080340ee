"""The stronger augmentation of fine-tuning: of a clip before it leaves its worker, of a batch on the device.

    worker: uint8 clip -> RandAugment -> random resized crop, flip
    device: normalised batch -> erasing -> Mixup or CutMix, soft targets

timm does the work; what is here makes it act on clips: one draw for all frames, and random numbers that come
from a given generator rather than from the global states.
"""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from augment import Chain, ClipTransform, ColorJitter, RandomResizedCrop

GREY = (128, 128, 128)
# What timm reads of a policy; it passes over what it does not know.
POLICY = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(weights|3aw?))*")


@contextmanager
def global_draws(seed: int) -> Iterator[None]:
    """Inside, `random` and `numpy.random` draw what `seed` decides; outside they go on as if nothing was."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


# --- of a clip, in the worker -------------------------------------------------------------------------------


class RandAugment:
    """RandAugment (Cubuk et al., 2020) as timm does it on PIL images, the same for every frame of a clip.

    policy: as timm writes it: rand-m7-n4-mstd0.5-inc1 is four operations, each done half the time, of
        magnitude 7 with deviation 0.5, in the variants that grow stronger with the magnitude.
    interpolation: "bilinear" or "bicubic", for rotation, shear and translation; what they uncover turns grey.
    Raises ValueError for a policy that timm cannot read.
    """

    def __init__(self, *, policy: str, interpolation: str = "bicubic"):
        if not POLICY.fullmatch(policy):
            raise ValueError(
                f'--aa {policy}: neither a RandAugment policy, such as rand-m7-n4-mstd0.5-inc1, nor "none"'
            )
        settings = {"img_mean": GREY, "interpolation": Image.Resampling[interpolation.upper()]}
        self.transform = rand_augment_transform(policy, settings)

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """uint8 (T,3,H,W) -> the same shape; the same operations and arguments for every frame."""
        seed = draw_seed(rng)
        frames = []
        for frame in clip.permute(0, 2, 3, 1).numpy():  # H W 3
            with global_draws(seed):
                frames.append(np.asarray(self.transform(Image.fromarray(frame))))
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def build_finetune_transform(
    *,
    size: int,
    flip: bool,
    aa: str = "rand-m7-n4-mstd0.5-inc1",
    interpolation: str = "bicubic",
    color_jitter: float = 0.4,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
) -> ClipTransform:
    """The training transform: RandAugment, then a random resized crop, mirrored half the time if `flip`.

    aa: policy of RandAugment, or "none"; then colours are jittered by `color_jitter`, as in timm.
    interpolation: that of RandAugment; the crop is bilinear without antialias, as published. The published
    crop follows the normalisation; before it, rounding to uint8 moves a pixel by half a grey level at most.
    Raises ValueError for an unknown policy.
    """
    crop = RandomResizedCrop(size=size, scale=scale, ratio=ratio, flip=0.5 if flip else 0.0, antialias=False)
    if aa not in ("", "none"):
        return Chain(transforms=(RandAugment(policy=aa, interpolation=interpolation), crop))
    if color_jitter > 0:
        return Chain(transforms=(crop, ColorJitter(strength=color_jitter)))
    return crop


# --- of a batch, on the device ------------------------------------------------------------------------------
# timm's work on images (B,C,H,W) is right for clips whose frames are folded into the channels, (B,C*T,H,W).
# On five axes its CutMix would cut time x height.


class ClipErasing:
    """Random erasing (Zhong et al., 2020): in some clips a box, the same in every frame, becomes noise.

    prob: share of clips. mode: "pixel" fills with N(0,1) noise, "rand" with one colour a frame, "const" with
    0, which is the mean. count: up to so many boxes a clip, together as large as one; above 1 the first
    T // count frames stay clean, as published.
    Raises ValueError for another mode.
    """

    def __init__(self, *, prob: float = 0.25, mode: str = "pixel", count: int = 1):
        if mode not in ("pixel", "rand", "const"):
            raise ValueError(f'--remode {mode}: choose "pixel", "rand" or "const"')
        self.count = count
        self.erasing = RandomErasing(prob, mode=mode, max_count=count)

    def __call__(self, clips: Tensor, rng: np.random.Generator) -> Tensor:
        """Normalised float (B,C,T,H,W) -> the same shape; `clips` itself may change.

        `rng` decides the boxes, torch's generator of the device the noise.
        """
        num_frames = clips.shape[2]
        clean = clips[:, :, : num_frames // self.count if self.count > 1 else 0].clone()
        self.erasing.device = clips.device
        with global_draws(draw_seed(rng)):
            folded = self.erasing(clips.flatten(1, 2))  # B (C T) H W
        clips = folded.unflatten(1, clips.shape[1:3])  # B C T H W
        clips[:, :, : clean.shape[2]] = clean
        return clips


class ClipMixup:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of a batch with its reverse, and soft targets.

    mixup, cutmix: alpha of the Beta distribution that the clip's own weight comes from; 0 switches one off.
        With both off there are only soft targets, so that one criterion does for all.
    cutmix_minmax: smallest and largest side of the box as a fraction, instead of one from the weight.
    prob: of doing anything. switch_prob: of CutMix where both are on.
    mode: one draw for the "batch", for each "pair" or for each clip ("elem").
    smoothing: label smoothing, s/K for a wrong class and 1 - s + s/K for the right one.
    Raises ValueError for another mode.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.1,
    ):
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f'--mixup_mode {mode}: choose "batch", "pair" or "elem"')
        self.mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
        self.mixup.mixup_enabled = mixup > 0 or cutmix > 0 or cutmix_minmax is not None

    def __call__(self, clips: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """float (B,C,T,H,W), int64 (B,) -> clips of the same shape, targets float (B,K); `clips` may change.

        The same box is cut from every frame, and its area is what the other label weighs.
        """
        odd, middle = len(clips) % 2, len(clips) // 2
        if odd:  # timm wants an even number: the middle clip meets its own copy, all others meet as ever
            clips, labels = (torch.cat([x[: middle + 1], x[middle:]]) for x in (clips, labels))
        with global_draws(draw_seed(rng)):
            folded, targets = self.mixup(clips.flatten(1, 2), labels)  # B (C T) H W and B K
        clips = folded.unflatten(1, clips.shape[1:3])  # B C T H W
        if odd:
            clips, targets = (torch.cat([x[:middle], x[middle + 1 :]]) for x in (clips, targets))
        return clips, targets
