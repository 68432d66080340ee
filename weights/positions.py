"""Learned position tables, resized to another number of frames or pixels."""

import re
from math import isqrt, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import Window

POSITION_TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal")


def resize_tables(taken: dict[str, Tensor], target: dict[str, Tensor], window: Window, slots: int | None) -> list[str]:
    """Resizes the position tables in `taken`, in place, and returns a note about each; skips those of no window.

    Args:
        taken: weights from a file, by their names in the model.
        target: state dict of the model.
        window: tokens (T',H',W') of the model.
        slots: time slots T' of the model that the file was made with, where known.
    """
    _, h, w = window
    notes = []
    for name in [n for n in taken if re.sub(r"^(encoder\.|decoder[._])", "", n) in POSITION_TABLES]:
        table, extra = taken[name], 0
        if table.shape[2:] != target[name].shape[2:]:
            continue
        if name.endswith("pos_embed_spatial"):
            old, new = _square_slices(table.shape[1], 1), (1, h, w)
        elif name.endswith("pos_embed_temporal"):
            old, new = (table.shape[1], 1, 1), (window[0], 1, 1)
        else:
            extra = target[name].shape[1] - prod(window)  # the class token's row, in front
            old, new = _joint_window(table.shape[1] - extra, window, slots), window
        if old and old != new:
            resized = resize_positions(table[:, extra:], old, new)  # (1,N',D)
            taken[name] = torch.cat([table[:, :extra], resized], dim=1)  # (1,[1+]N',D)
            notes.append(f"{name} resized from {'x'.join(map(str, old))} to {'x'.join(map(str, new))} tokens")
    return notes


def _joint_window(length: int, window: Window, slots: int | None) -> Window | None:
    """Finds the window of `length` positions with square slices.

    Tried are the time slots of the file, those of the model (as published), and those with its slices.
    """
    candidates = (slots, window[0], length // (window[1] * window[2]))
    return next(filter(None, (_square_slices(length, t) for t in candidates if t)), None)


def _square_slices(length: int, slots: int) -> Window | None:
    side = isqrt(length // slots)
    return (slots, side, side) if slots * side * side == length else None


def resize_positions(table: Tensor, old: Window, new: Window) -> Tensor:
    """Resizes a position table from one window to another: (1,N,D) -> (1,N',D), of the same dtype.

    Bicubic in each slice, as in the published code, which does not resize time; linear in time.
    """
    x = table.float().unflatten(1, old)[0].movedim(-1, 1)  # (t,D,h,w)
    if new[1:] != old[1:]:
        x = F.interpolate(x, size=new[1:], mode="bicubic", align_corners=False)  # (t,D,h',w')
    if new[0] != old[0]:
        rows = x.movedim(0, -1).flatten(0, 2)[None]  # (1,D*h'*w',t)
        rows = F.interpolate(rows, size=new[0], mode="linear", align_corners=False)  # (1,D*h'*w',t')
        x = rows[0].unflatten(0, x.shape[1:]).movedim(-1, 0)  # (t',D,h',w')
    return x.movedim(1, -1).flatten(0, 2)[None].to(table.dtype)  # (1,N',D)
