"""Labelled pictures side by side: grids, filmstrips and animations of panels. All pictures are uint8."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from modeling_blocks import TUBELET
from utils import whole_file

CELL = 160  # a frame smaller than this is enlarged by a whole number
GAP, MARGIN, ROW_LABEL, CHARACTER = 6, 10, 190, 6  # pixels
BACKGROUND, INK, SOFT = (255, 255, 255), (20, 20, 20), (95, 95, 95)
TITLE_FONT, NOTE_FONT = ImageFont.load_default(size=15), ImageFont.load_default(size=12)


class Label(NamedTuple):
    """What stands beside a picture: a title, smaller lines, and perhaps the scale of a heat map."""

    title: str = ""
    notes: tuple[str, ...] = ()
    scale: tuple[str, str, str] | None = None  # colour map, text at its low and at its high end


class Panel(NamedTuple):
    """One kind of picture of every frame of some clips."""

    label: Label
    frames: np.ndarray  # (B,T,H,W,3) uint8


def draw_label(canvas: Image.Image, label: Label, x: int, y: int, width: int) -> int:
    """Writes a label with its top left corner at (x,y); returns the y below it."""
    draw = ImageDraw.Draw(canvas)
    texts = [(label.title, TITLE_FONT, INK, 19), *((note, NOTE_FONT, SOFT, 15) for note in label.notes)]
    for text, font, colour, height in texts:
        for line in textwrap.wrap(text, width // CHARACTER):
            draw.text((x, y), line, colour, font)
            y += height
    if label.scale is None:
        return y
    colours, low, high = label.scale
    bar = colormaps[colours](np.linspace(0, 1, width), bytes=True)[:, :3]  # (width,3)
    canvas.paste(Image.fromarray(np.tile(bar, (8, 1, 1))), (x, y + 3))
    draw.text((x, y + 13), low, SOFT, NOTE_FONT)
    draw.text((x + width, y + 13), high, SOFT, NOTE_FONT, anchor="ra")
    return y + 30


def label_height(label: Label, width: int) -> int:
    return draw_label(Image.new("RGB", (1, 1)), label, 0, 0, width)


def draw_grid(
    cells: np.ndarray, *, rows: Sequence[Label] = (), columns: Sequence[Label] = (), heading: str = ""
) -> np.ndarray:
    """A table of pictures (R,C,H,W,3), labelled on the left and above, as one (H',W',3); all uint8."""
    num_rows, num_columns, height, width, _ = cells.shape
    factor = max(1, math.ceil(CELL / width))
    height, width = height * factor, width * factor
    left = MARGIN + (ROW_LABEL + GAP if rows else 0)
    top = MARGIN + (24 if heading else 0)
    header = max((label_height(label, width) + 3 for label in columns), default=0)
    row_height = max([height, *(label_height(label, ROW_LABEL - GAP) for label in rows)]) + GAP
    size = (left + num_columns * (width + GAP) + MARGIN, top + header + num_rows * row_height + MARGIN)
    canvas = Image.new("RGB", size, BACKGROUND)

    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), heading, INK, TITLE_FONT)
    for c, label in enumerate(columns):
        draw_label(canvas, label, left + c * (width + GAP), top, width)
    for r, label in enumerate(rows):
        draw_label(canvas, label, MARGIN, top + header + r * row_height, ROW_LABEL - GAP)
    for r, c in np.ndindex(num_rows, num_columns):
        cell = Image.fromarray(cells[r, c].repeat(factor, 0).repeat(factor, 1))
        canvas.paste(cell, (left + c * (width + GAP), top + header + r * row_height))
    return np.asarray(canvas)


def filmstrip(panels: Sequence[Panel], *, clip: int = 0, heading: str = "") -> np.ndarray:
    """A clip as one picture (H',W',3) uint8: a row per panel, a column per time slot (its first frame)."""
    cells = np.stack([p.frames[clip, ::TUBELET] for p in panels])  # (R,T',H,W,3)
    columns = [Label("", (f"frames {k * TUBELET + 1}-{(k + 1) * TUBELET}",)) for k in range(cells.shape[1])]
    return draw_grid(cells, rows=[p.label for p in panels], columns=columns, heading=heading)


def animation(panels: Sequence[Panel], *, clip: int = 0, heading: str = "") -> np.ndarray:
    """A clip as T pictures (T,H',W',3) uint8 with the panels side by side. Each bears its number."""
    cells = np.stack([p.frames[clip] for p in panels], axis=1)  # (T,C,H,W,3)
    labels = [p.label for p in panels]
    headings = [f"{heading}  frame {k} of {len(cells)}".strip() for k in range(1, len(cells) + 1)]
    return np.stack([draw_grid(row[None], columns=labels, heading=h) for row, h in zip(cells, headings)])


def to_palette(frame: np.ndarray) -> Image.Image:
    """Reduces a picture (H,W,3) uint8 to the 256 colours of a GIF.

    Of Pillow's quantisers only the octree keeps the colour scales true. A second pass assigns each pixel to the
    nearest colour of its palette, which the octree does not.
    """
    picture = Image.fromarray(frame)
    palette = picture.quantize(method=Image.Quantize.FASTOCTREE)
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


ANIMATIONS = {  # how a format takes frames (H,W,3) uint8, and its settings
    "gif": (to_palette, {}),
    "webp": (Image.fromarray, {"quality": 80, "method": 6}),
}


def save_animation(path: str, frames: np.ndarray, fps: float) -> None:
    """Writes pictures (T,H,W,3) uint8 as an endless animation, with times in hundredths of a second, as GIF has them.

    The format is the path's suffix, one of `ANIMATIONS`.
    """
    kind = Path(path).suffix.removeprefix(".")
    take, settings = ANIMATIONS[kind]
    first, *others = map(take, frames)
    timing = {"duration": 10 * round(100 / fps), "loop": 0}
    with whole_file(path) as file:
        first.save(file, kind, save_all=True, append_images=others, **timing, **settings)
