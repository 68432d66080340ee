"""The training transform of fine-tuning, in the data worker: RandAugment, then a random resized crop and flip.

timm does the work; this applies it to clips, with one draw for all frames, from a given generator rather than the
global random states.
"""

import re

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from clips.draws import draw_seed, global_draws
from clips.transforms import Chain, ClipTransform, ColorJitter, RandomResizedCrop, ResizeShortSide
from utils import SettingError

# The policies that timm understands; it silently ignores unknown parts.
POLICY = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(weights|3aw?))*")


class RandAugment:
    """RandAugment (Cubuk et al., 2020) with timm's operations on PIL images, the same for every frame of a clip.

    Args:
        policy: in timm's notation: rand-m7-n4-mstd0.5-inc1 is four operations, each applied half the time, of
            magnitude 7 with deviation 0.5, in the variants that grow stronger with the magnitude.
        interpolation: "bilinear" or "bicubic", for rotation, shear and translation, which fill with grey.

    Raises:
        SettingError: timm does not understand the policy.
    """

    def __init__(self, *, policy: str, interpolation: str = "bicubic"):
        if not POLICY.fullmatch(policy):
            raise SettingError(
                f'--aa {policy}: neither a RandAugment policy, such as rand-m7-n4-mstd0.5-inc1, nor "none"'
            )
        settings = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling[interpolation.upper()]}
        self.transform = rand_augment_transform(policy, settings)

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Applies the same operations and arguments to every frame of uint8 (T,3,H,W)."""
        seed, frames = draw_seed(rng), []
        for frame in clip.permute(0, 2, 3, 1).numpy():  # (H,W,3)
            with global_draws(seed):
                frames.append(np.asarray(self.transform(Image.fromarray(frame))))
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # (T,3,H,W)


def build_finetune_transform(
    *,
    size: int,
    flip: bool,
    aa: str = "rand-m7-n4-mstd0.5-inc1",
    interpolation: str = "bicubic",
    color_jitter: float = 0.4,
    scale: tuple[float, float] = (0.08, 1.0),
    short_side: int | None = None,
) -> ClipTransform:
    """Builds the training transform: RandAugment, then a random resized crop, mirrored half the time if `flip`.

    The crop is bilinear without antialias, as published. The published one follows the normalisation; ours comes
    before it, where rounding to uint8 moves a pixel by at most half a grey level.

    Args:
        aa: policy of RandAugment, or "none"; then colours are jittered by `color_jitter` instead, as in timm.
        interpolation, scale: see `RandAugment` and `RandomResizedCrop`.
        short_side: of the frames before everything else, in pixels; None leaves them as they are decoded (MAE-ST: 256).

    Raises:
        SettingError: the policy is unknown.
    """
    crop = RandomResizedCrop(size=size, scale=scale, flip=0.5 if flip else 0.0, antialias=False)
    if aa not in ("", "none"):
        transforms = [RandAugment(policy=aa, interpolation=interpolation), crop]
    else:
        transforms = [crop, ColorJitter(strength=color_jitter)] if color_jitter > 0 else [crop]
    return Chain(transforms=[ResizeShortSide(size=short_side), *transforms] if short_side else transforms)
