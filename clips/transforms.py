"""Transforms of one uint8 clip (T,C,H,W) in the data worker: crops, flip, colour jitter.

A random transform has two halves: `draw` chooses its parameters with a numpy generator, `__call__` applies them.
One draw serves all frames of a clip.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from utils import SettingError

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
MULTI_SCALE_SNAP = 2  # a crop within so many pixels of the output size takes that size: no resampling
# The 13 places of a crop: (x, y) in quarters of the space left.
MULTI_SCALE_PLACES = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),  # corners, centre
    *((0, 2), (4, 2), (2, 4), (2, 0)),  # middles of the sides
    *((1, 1), (3, 1), (1, 3), (3, 3)),  # centres of the quarters
)

ClipTransform = Callable[[Tensor, np.random.Generator], Tensor]  # uint8 (T,C,H,W) -> uint8 (T,C,S,S)


class View(NamedTuple):
    """A rectangle of the frame in pixels, and whether it is mirrored left to right."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


def apply_view(
    clip: Tensor, view: View, size: int, *, interpolation: str = "bilinear", antialias: bool = True
) -> Tensor:
    """Cuts one view out of every frame and resizes it to `size` pixels square.

    uint8 (T,C,H,W) -> uint8 (T,C,size,size).

    Args:
        interpolation: "bilinear" or "bicubic".
        antialias: with it, bilinear is PIL's resize of the cropped frame, to within one grey level.
    """
    clip = F.crop(clip, view.top, view.left, view.height, view.width)
    clip = resize(clip, size, size, interpolation=interpolation, antialias=antialias)  # (T,C,S,S)
    return F.horizontal_flip(clip) if view.flip else clip


def resize(clip: Tensor, height: int, width: int, *, interpolation: str = "bilinear", antialias: bool = True) -> Tensor:
    """Resizes uint8 (T,C,H,W) to uint8 (T,C,height,width); see `apply_view`.

    Without `antialias` the exact value is rounded, where torch's uint8 kernel is off by up to a whole level. Frame
    by frame, since a clip of large frames would take gigabytes in float32.
    """
    size, interpolation = [height, width], InterpolationMode(interpolation)
    if antialias or list(clip.shape[-2:]) == size:
        return F.resize(clip, size, interpolation, antialias=antialias)
    frames = (F.resize(frame.float(), size, interpolation, antialias=False) for frame in clip)
    return torch.stack([frame.round_().clamp_(0, 255).to(torch.uint8) for frame in frames])


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(H,W) of a frame resized to a short side; the long side is rounded down."""
    short = min(height, width)
    return short_side * height // short, short_side * width // short


class ResizeShortSide:
    """Resizes uint8 (T,C,H,W) to a short side of `size` pixels, as some decoders do: bilinear, with antialias."""

    def __init__(self, *, size: int):
        self.size = size

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        return resize(clip, *resized_shape(*clip.shape[-2:], self.size))


@dataclass(frozen=True, kw_only=True)
class RandomView:
    """A random crop of a clip, resized to `size` pixels square; subclasses define `draw`.

    Args:
        flip: probability of mirroring; 0 where left and right matter, as in Something-Something.
        interpolation, antialias: see `apply_view`.
    """

    size: int
    flip: float = 0.0
    interpolation: str = "bilinear"
    antialias: bool = True

    def draw(self, width: int, height: int, rng: np.random.Generator) -> View:
        """Draws the view for one clip of `width` x `height` pixels."""
        raise NotImplementedError

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Takes the same view of every frame: uint8 (T,C,H,W) -> uint8 (T,C,size,size)."""
        view = self.draw(clip.shape[-1], clip.shape[-2], rng)
        return apply_view(clip, view, self.size, interpolation=self.interpolation, antialias=self.antialias)


class MultiScaleCrop(RandomView):
    """Multi-scale crop of the published AdaMAE and VideoMAE pre-training (from TSN, Wang et al., 2016).

    One of ten nearly square sizes at one of thirteen places, all equally likely. As published, never mirrored.
    """

    def draw(self, width: int, height: int, rng: np.random.Generator) -> View:
        sizes = multi_scale_sizes(width, height, self.size)
        w, h = sizes[rng.integers(len(sizes))]
        places = multi_scale_offsets(width, height, w, h)
        x, y = places[rng.integers(len(places))]
        return View(x, y, w, h, flip=bool(rng.random() < self.flip))


def multi_scale_sizes(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """Lists the ten candidate crops (w,h) of a frame: its short side times two neighbouring scales.

    A crop never exceeds the frame (the published code would snap 223 pixels to 224 and pad with black).
    """
    short = min(width, height)
    edges = [max(1, int(short * scale)) for scale in MULTI_SCALES]
    edges = [size if abs(edge - size) <= MULTI_SCALE_SNAP else edge for edge in edges]
    return [
        (min(w, width), min(h, height)) for i, h in enumerate(edges) for j, w in enumerate(edges) if abs(i - j) <= 1
    ]


def multi_scale_offsets(width: int, height: int, w: int, h: int) -> list[tuple[int, int]]:
    """Lists the thirteen places (x,y) of a crop of w x h pixels in a frame of width x height."""
    step_x, step_y = (width - w) // 4, (height - h) // 4
    return [(x * step_x, y * step_y) for x, y in MULTI_SCALE_PLACES]


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(RandomView):
    """MAE-ST's pre-training crop; with a scale of 0.08 to 1 and no antialias, the crop of fine-tuning.

    Args:
        scale: range of the area as a fraction of the frame, drawn uniformly.
        ratio: range of width/height, drawn log-uniformly.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5

    def draw(self, width: int, height: int, rng: np.random.Generator) -> View:
        box = self._draw_box(width, height, rng)
        return View(*box, flip=bool(rng.random() < self.flip))

    def _draw_box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        return self._central_box(width, height)

    def _central_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Returns the largest central box of an allowed aspect, for long frames where ten draws have failed."""
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = max(1, min(width, round(height * aspect)))
        h = max(1, min(height, round(width / aspect)))
        return (width - w) // 2, (height - h) // 2, w, h


class EvenCrops:
    """The crops of a test: short side resized, then squares evenly spaced along the long side.

    Args:
        short_side: of the resized frame, in pixels; the resize is OpenCV's bilinear one to within a grey level.
        size: side of the crops in pixels, at most short_side (the published code takes short_side for both).
        num_crops: 1 is the centre, as in the published validation.
        round_up: whether positions are rounded up, as in MAE-ST, or down, as in AdaMAE and VideoMAE.

    Raises:
        SettingError: the short side is less than the size of the crops.
    """

    def __init__(self, *, short_side: int, size: int, num_crops: int = 1, round_up: bool = False):
        if short_side < size:
            raise SettingError(f"--short_side_size {short_side} is less than --input_size {size}")
        self.short_side, self.size, self.num_crops, self.round_up = short_side, size, num_crops, round_up

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Returns (top,left) of each crop of a resized frame, along its long side."""
        rooms = (height - self.size, width - self.size)
        middle = [math.ceil(room / 2) if self.round_up else round(room / 2) for room in rooms]
        if self.num_crops == 1:
            return [tuple(middle)]
        steps = [k * max(rooms) for k in range(self.num_crops)]
        gaps = self.num_crops - 1
        places = [-(-step // gaps) if self.round_up else step // gaps for step in steps]
        return [(middle[0], place) if width > height else (place, middle[1]) for place in places]

    def __call__(self, clip: Tensor) -> Tensor:
        """Resizes and crops uint8 (T,C,H,W) -> uint8 (num_crops,T,C,size,size)."""
        clip = resize(clip, *resized_shape(*clip.shape[-2:], self.short_side), antialias=False)
        corners = self.corners(*clip.shape[-2:])
        return torch.stack([clip[..., y : y + self.size, x : x + self.size] for y, x in corners])


class ColorJitter:
    """Scales brightness, contrast and saturation by a factor each, uniform in 1 - strength ... 1 + strength."""

    def __init__(self, *, strength: float):
        self.strength = strength

    def draw(self, rng: np.random.Generator) -> tuple[float, float, float]:
        return tuple(rng.uniform(max(0.0, 1 - self.strength), 1 + self.strength, size=3).tolist())

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        """Applies the same factors to every frame of uint8 (T,C,H,W)."""
        brightness, contrast, saturation = self.draw(rng)
        clip = F.adjust_contrast(F.adjust_brightness(clip, brightness), contrast)
        return F.adjust_saturation(clip, saturation)


class Chain:
    """Transforms in sequence, all drawing from the same generator."""

    def __init__(self, *, transforms: Sequence[ClipTransform]):
        self.transforms = transforms

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        for transform in self.transforms:
            clip = transform(clip, rng)
        return clip


@dataclass(frozen=True, kw_only=True)
class MaeStCrop(RandomResizedCrop):
    """MAE-ST's pre-training crop as published: from frames whose short side is 256, without antialias."""

    antialias: bool = False
    short_side: int = 256

    def __call__(self, clip: Tensor, rng: np.random.Generator) -> Tensor:
        shape = [self.short_side * side // min(clip.shape[-2:]) for side in clip.shape[-2:]]
        return super().__call__(resize(clip, *shape, antialias=False), rng)


@dataclass(frozen=True, kw_only=True)
class CenterCrop(RandomView):
    """The largest central square, mirrored and resized as by `MaeStCrop` (MAE-ST's ablation of crops)."""

    flip: float = 0.5
    antialias: bool = False

    def draw(self, width: int, height: int, rng: np.random.Generator) -> View:
        side = min(width, height)
        return View((width - side) // 2, (height - side) // 2, side, side, flip=bool(rng.random() < self.flip))


# of pre-training
CROPS = {"multi_scale": MultiScaleCrop, "random_resized": RandomResizedCrop, "mae_st": MaeStCrop, "center": CenterCrop}


def build_pretrain_transform(
    crop: str,
    *,
    size: int,
    interpolation: str = "bilinear",
    color_jitter: float = 0.0,
    scale: Sequence[float] | None = None,
    flip: float | None = None,
) -> ClipTransform:
    """Builds the pre-training transform: a key of CROPS to `size` pixels, then ColorJitter unless it is 0.

    Args:
        scale: smallest and largest area of a random resized crop; None leaves it the crop's.
        flip: probability of mirroring; None leaves it the crop's.

    Raises:
        SettingError: the crop is unknown, or has no such scale.
    """
    if crop not in CROPS:
        raise SettingError(f"--crop {crop}: choose one of {', '.join(CROPS)}")
    changes = {} if flip is None else {"flip": flip}
    if scale is not None:
        if not issubclass(CROPS[crop], RandomResizedCrop) or not 0 < scale[0] <= scale[1] <= 1:
            given = " ".join(map(str, scale))
            raise SettingError(f"--crop_scale {given}: two shares from 0 to 1, for --crop random_resized or mae_st")
        changes["scale"] = tuple(scale)
    view = CROPS[crop](size=size, interpolation=interpolation, **changes)
    return Chain(transforms=(view, ColorJitter(strength=color_jitter))) if color_jitter else view
