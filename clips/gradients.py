"""Histograms of oriented gradients (Dalal and Triggs, 2005) of frames, on any device, as scikit-image computes them."""

import math

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

ORIENTATIONS = 9  # over half a turn: opposite directions are one
CELL = 8  # side in pixels
EPS = 1e-5  # scikit-image's


def oriented_gradients(frames: Tensor, *, normalize: bool = True) -> Tensor:
    """Histograms of the cells of frames (...,H,W) float32, whose sides are multiples of `CELL`: (...,H/8,W/8,9).

    A pixel adds the length of its gradient, the difference of its neighbours, to the one orientation that the
    gradient falls into; at the border the part across it is 0. A histogram is the mean over the pixels of its cell.

    Args:
        normalize: divide each histogram by its l2 norm, as in MaskFeat, the root of the sum of squares and EPS^2.
    """
    down = F.pad(frames[..., 2:, :] - frames[..., :-2, :], (0, 0, 1, 1))  # (...,H,W)
    right = F.pad(frames[..., 2:] - frames[..., :-2], (1, 1))  # (...,H,W)
    length = torch.hypot(down, right)
    orientation = (torch.atan2(down, right) / math.pi * ORIENTATIONS).floor() % ORIENTATIONS  # 0 to 8
    histograms = [
        reduce(length * (orientation == k), "... (h p) (w q) -> ... h w", "mean", p=CELL, q=CELL)
        for k in range(ORIENTATIONS)
    ]
    cells = torch.stack(histograms, dim=-1)  # (...,H/8,W/8,9)
    return cells / (cells.square().sum(-1, keepdim=True) + EPS**2).sqrt() if normalize else cells
