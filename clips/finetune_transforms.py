"""The training transform of fine-tuning, in the data worker: RandAugment, then a random resized crop and flip.

timm does the work. What is here makes it act on clips: one draw for all frames, from a given generator rather
than from the global random states.
"""

import re

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from clips.draws import draw_seed, global_draws
from clips.transforms import Chain, ClipTransform, ColorJitter, RandomResizedCrop

GREY = (128, 128, 128)
# What timm reads of a policy; it passes over what it does not know.
POLICY = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(weights|3aw?))*")


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
