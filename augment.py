"""What happens to a batch of clips on the device before the model sees it.

uint8 (B,C,T,H,W) -> pixels in [0,1] -> normalised -> fine-tuning: erasing -> Mixup or CutMix, soft targets
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from clips.draws import draw_seed, global_draws
from utils import SettingError

Colours = tuple[Sequence[float], Sequence[float]]  # channel means and standard deviations of the model's input

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Mean and standard deviation of the channels of pixels in [0,1].
COLOUR_STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "mae_st": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
}


def to_pixels(clips: Tensor) -> Tensor:
    """Turns uint8 of any shape into float32 pixels in [0,1] on the same device."""
    return clips.to(torch.float32).div_(255)


def normalize(pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Computes (pixels - mean) / std per channel: float (B,C,T,H,W) -> the same shape, dtype and device.

    Raises:
        ValueError: there is not one mean and one deviation per channel.
    """
    channels = pixels.shape[1]
    if not len(mean) == len(std) == channels:
        raise ValueError(f"clips of {channels} channels, but {len(mean)} means and {len(std)} deviations")
    # Python numbers: a tensor of them would be copied to the device, and waited for, in every step.
    normalized = torch.empty_like(pixels)
    for channel, m, s in zip(range(channels), mean, std):
        torch.sub(pixels[:, channel], m, out=normalized[:, channel]).div_(s)
    return normalized


# timm's operations on images (B,C,H,W) are right for clips whose frames are folded into the channels, (B,C*T,H,W).
# On five axes its CutMix would cut time x height.


class ClipErasing:
    """Random erasing (Zhong et al., 2020): in some clips a box, the same in every frame, becomes noise.

    Args:
        prob: share of clips.
        mode: "pixel" fills with N(0,1) noise, "rand" with one colour a frame, "const" with 0, which is the mean.
        count: the most boxes of a clip, together as large as one; above 1 the first T // count frames stay clean,
            as published.

    Raises:
        SettingError: the mode is unknown.
    """

    def __init__(self, *, prob: float = 0.25, mode: str = "pixel", count: int = 1):
        if mode not in ("pixel", "rand", "const"):
            raise SettingError(f'--remode {mode}: choose "pixel", "rand" or "const"')
        self.count = count
        self.erasing = RandomErasing(prob, mode=mode, max_count=count)

    def __call__(self, clips: Tensor, rng: np.random.Generator) -> Tensor:
        """Erases boxes of float (B,C,T,H,W), possibly in place: `rng` draws them, torch's generator the noise."""
        clean = clips[:, :, : clips.shape[2] // self.count if self.count > 1 else 0].clone()
        self.erasing.device = clips.device
        with global_draws(draw_seed(rng)):
            folded = self.erasing(clips.flatten(1, 2))  # (B,C*T,H,W)
        clips = folded.unflatten(1, clips.shape[1:3])  # (B,C,T,H,W)
        clips[:, :, : clean.shape[2]] = clean
        return clips


class ClipMixup:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of a batch with its reverse, and soft targets.

    Args:
        mixup, cutmix: alpha of the Beta distribution that the clip's own weight is drawn from; 0 switches one off.
            With both off there are only soft targets, so that one criterion serves all cases.
        cutmix_minmax: smallest and largest side of the box as a fraction, instead of sides set by the weight.
        prob: of doing anything.
        switch_prob: of CutMix where both are on.
        mode: one draw for the "batch", for each "pair" or for each clip ("elem").
        smoothing: label smoothing s: s/K for a wrong class and 1 - s + s/K for the right one.

    Raises:
        SettingError: the mode is unknown.
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
            raise SettingError(f'--mixup_mode {mode}: choose "batch", "pair" or "elem"')
        settings = {"mode": mode, "label_smoothing": smoothing, "num_classes": num_classes}
        self.mixup = Mixup(mixup, cutmix, cutmix_minmax, prob, switch_prob, **settings)
        self.mixup.mixup_enabled = mixup > 0 or cutmix > 0 or cutmix_minmax is not None

    def __call__(self, clips: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mixes clips float (B,C,T,H,W), possibly in place, and labels int64 (B,), into targets float (B,K).

        CutMix cuts the same box from every frame, and its area is the weight of the other label.
        """
        odd, middle = len(clips) % 2, len(clips) // 2
        if odd:  # timm needs an even number: the middle clip is paired with its own copy
            clips, labels = (torch.cat([x[: middle + 1], x[middle:]]) for x in (clips, labels))
        with global_draws(draw_seed(rng)):
            folded, targets = self.mixup(clips.flatten(1, 2), labels)  # (B,C*T,H,W), (B,K)
        clips = folded.unflatten(1, clips.shape[1:3])  # (B,C,T,H,W)
        if odd:
            clips, targets = (torch.cat([x[:middle], x[middle + 1 :]]) for x in (clips, targets))
        return clips, targets


class BatchAugmentation(NamedTuple):
    """What a training batch of fine-tuning goes through: normalisation, random erasing, Mixup or CutMix."""

    colours: Colours
    erasing: ClipErasing
    mixup: ClipMixup

    def __call__(self, clips: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """uint8 (B,C,T,H,W), int64 (B,) -> float32 (B,C,T,H,W), soft targets float (B,K)."""
        return self.mixup(self.erasing(normalize(to_pixels(clips), *self.colours), rng), labels, rng)
