"""Pictures of what a pre-training model does with a clip: video, prediction, error, probability, mask.

    reconstruct -> five_panels | mask_panels -> filmstrip | animation

Tensors in, uint8 pictures out: nothing here reads or writes a file.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from masking_generator import MaskingGenerator
from modeling_blocks import TUBELET
from modeling_pretrain import PretrainOutput, PretrainVisionTransformer
from targets import patch_statistics, patchify, reconstruction_error, reconstruction_targets, unpatchify

Normalization = tuple[Sequence[float], Sequence[float]]  # channel means and deviations of the model's input
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)

SHOW_VISIBLE = ("pasted", "predicted")
COMPARED = {"random": "patch (random)", "tube": "tube", "frame": "frame", "adaptive": "adaptive"}
GREY = 0.5  # of patches with nothing to show
BLANK = 235  # of panels with nothing to show
ERROR_TOP = 2.0  # end of the error scale for normalised targets: predicting each patch's mean costs 1
ERROR_COLOURS, PROBABILITY_COLOURS = "magma", "viridis"


# ------------------------------------------------------------------------------------------ running the model


class Reconstruction(NamedTuple):
    """What a model makes of clips; every tensor is on the CPU."""

    video: Tensor  # (B,3,T,H,W) pixels in [0,1]
    prediction: Tensor  # (B,3,T,H,W) pixels in [0,1]
    error: Tensor  # (B,N) mean square error of each token against its target; NaN where it is visible
    log_probs: Tensor | None  # (B,N) log P of the adaptive sampler, None without one
    visible: Tensor  # (B,N) bool
    window: tuple[int, int, int]  # tokens in (time, height, width)
    patch: int
    normalize_target: bool
    show_visible: str


@contextmanager
def undisturbed(model: PretrainVisionTransformer, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, no compilation and a random state of its own; all is put back after."""
    device, training = model.mask_token.device, model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # these shapes are not worth a compilation
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(training)


def predict_all(
    model: PretrainVisionTransformer, clip: Tensor, visible: Tensor | None
) -> tuple[PretrainOutput, Tensor]:
    """The model's output, and its predictions for all tokens in token order (B,N,P).

    The loss only ever asks the decoder for the masked tokens. For the visible ones this reads its last two
    layers at the places that the model drops; nothing has trained them to be right there.
    """
    features = []
    hook = model.decoder.blocks.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        out = model(clip, visible)
    finally:
        hook.remove()
    predicted = model.decoder.head(model.decoder.norm(features[0]))  # (B,N,P) visible tokens first
    order = torch.cat([out.visible, out.masked], dim=1)[:, :, None].expand_as(predicted)
    return out, torch.empty_like(predicted).scatter_(1, order, predicted)


def unnormalize(prediction: Tensor, tokens: Tensor) -> Tensor:
    """Normalised predictions as pixels by the statistics of the original tokens: (B,N,P) twice -> (B,N,P)."""
    mean, std = patch_statistics(tokens)
    pixels = rearrange(prediction, "b n (x c) -> b n x c", c=3) * std + mean
    return rearrange(pixels, "b n x c -> b n (x c)")


def reconstruct(
    model: PretrainVisionTransformer,
    pixels: Tensor,
    visible: Tensor | None = None,
    *,
    normalize_target: bool = True,
    normalization: Normalization = IMAGENET,
    show_visible: str = "pasted",
    seed: int = 0,
) -> Reconstruction:
    """Masks and reconstructs clips; the model and the random state are left as they were.

    Args:
        pixels: (B,3,T,H,W) float32 in [0,1] on the model's device.
        visible: indices (B,Nv) of the tokens to see; None draws them by the model's own rule from `seed`.
        normalize_target: the model predicts pixels normalised within each patch; they are turned back with
            the statistics of the original patch, which a masked model can't know.
        normalization: channel means and deviations of the model's input.
        show_visible: "pasted" takes visible patches from the original, "predicted" from the decoder.

    Raises:
        ValueError: `show_visible` is neither.
    """
    if show_visible not in SHOW_VISIBLE:
        raise ValueError(f"--visible {show_visible}: choose {' or '.join(SHOW_VISIBLE)}")
    with undisturbed(model, seed):
        out, predicted = predict_all(model, normalize(pixels, *normalization), visible)
        target = reconstruction_targets(pixels, out.masked, model.patch, normalize=normalize_target)
        error = reconstruction_error(out.prediction, target)  # (B,Nm)

        tokens = patchify(pixels, model.patch)  # (B,N,P)
        predicted = predicted.float()
        if normalize_target:
            predicted = unnormalize(predicted, tokens)
        is_visible = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        is_visible.scatter_(1, out.visible, True)
        if show_visible == "pasted":
            predicted = torch.where(is_visible[:, :, None], tokens, predicted)
        errors = torch.full(tokens.shape[:2], math.nan, device=tokens.device).scatter_(1, out.masked, error)
        return Reconstruction(
            video=pixels.cpu(),
            prediction=unpatchify(predicted.clamp(0, 1), model.window, model.patch).cpu(),
            error=errors.cpu(),
            log_probs=None if out.log_probs is None else out.log_probs.cpu(),
            visible=is_visible.cpu(),
            window=model.window,
            patch=model.patch,
            normalize_target=normalize_target,
            show_visible=show_visible,
        )


# ------------------------------------------------------------------------------------------------ the panels


class Label(NamedTuple):
    """What stands beside a picture: a title, smaller lines, and perhaps the scale of a heat map."""

    title: str = ""
    notes: tuple[str, ...] = ()
    scale: tuple[str, str, str] | None = None  # colour map, text at its low and at its high end


class Panel(NamedTuple):
    """One kind of picture of every frame of some clips."""

    label: Label
    frames: np.ndarray  # (B,T,H,W,3) uint8


def to_frames(pixels: Tensor) -> np.ndarray:
    """Clips (B,3,T,H,W) in [0,1] as uint8 frames (B,T,H,W,3)."""
    return rearrange(pixels * 255, "b c t h w -> b t h w c").round().byte().numpy()


def heat_map(values: Tensor, top: float, colours: str, rec: Reconstruction) -> np.ndarray:
    """One value per token, (B,N), as frames (B,T,H,W,3): 0 to `top` over a colour map, grey where NaN."""
    colour_map = colormaps[colours].with_extremes(bad=(GREY, GREY, GREY))
    rgb = colour_map((values / top).numpy(), bytes=True)[..., :3]  # (B,N,3)
    t, h, w = rec.window
    sizes = {"t": t, "h": h, "w": w, "f": TUBELET, "p": rec.patch, "q": rec.patch}
    return repeat(rgb, "b (t h w) c -> b (t f) (h p) (w q) c", **sizes)


def video_panel(rec: Reconstruction) -> Panel:
    return Panel(Label("video"), to_frames(rec.video))


def prediction_panel(rec: Reconstruction, title: str = "prediction") -> Panel:
    source = "patch mean and std from the original" if rec.normalize_target else "raw pixels"
    visible = "visible patches pasted" if rec.show_visible == "pasted" else "visible patches as predicted"
    return Panel(Label(title, (source, visible)), to_frames(rec.prediction))


def error_panel(rec: Reconstruction, error_top: float | None) -> Panel:
    """`error_top` ends the scale; None takes ERROR_TOP, or with raw pixels the largest error here."""
    if error_top is None:
        error_top = ERROR_TOP if rec.normalize_target else rec.error.nan_to_num().max().item()
    space = "normalised pixels (1: patch mean alone)" if rec.normalize_target else "raw pixels"
    notes = (f"mean square over {space}", f"mean {rec.error.nanmean():.3g}, grey: visible")
    label = Label("error", notes, (ERROR_COLOURS, "0", f"{error_top:.3g}"))
    return Panel(label, heat_map(rec.error, error_top, ERROR_COLOURS, rec))


def probability_panel(rec: Reconstruction) -> Panel:
    """P as a multiple of the uniform 1/N; blank where the model has no sampler."""
    if rec.log_probs is None:
        return Panel(Label("probability", ("no sampler",)), np.full_like(to_frames(rec.video), BLANK))
    probs, num_tokens = rec.log_probs.exp(), rec.log_probs.shape[1]
    entropy = torch.special.entr(probs).sum(1).mean().item() / math.log(num_tokens)
    times_uniform = probs * num_tokens
    top = times_uniform.max().item()
    notes = ("P x N (1: uniform)", f"entropy / log N = {entropy:.3f}")
    label = Label("probability (CAT)", notes, (PROBABILITY_COLOURS, "0", f"{top:.3g}"))
    return Panel(label, heat_map(times_uniform, top, PROBABILITY_COLOURS, rec))


def mask_panel(rec: Reconstruction, title: str = "mask") -> Panel:
    tokens = patchify(rec.video, rec.patch)  # (B,N,P)
    shown = torch.where(rec.visible[:, :, None], tokens, torch.tensor(GREY))
    note = f"{rec.visible[0].sum()} of {rec.visible.shape[1]} patches visible"
    return Panel(Label(title, (note,)), to_frames(unpatchify(shown, rec.window, rec.patch)))


def five_panels(rec: Reconstruction, *, error_top: float | None = None) -> list[Panel]:
    """Video, prediction, error, probability and mask; all clips and frames share the scales."""
    return [
        video_panel(rec),
        prediction_panel(rec),
        error_panel(rec, error_top),
        probability_panel(rec),
        mask_panel(rec),
    ]


def mask_panels(
    model: PretrainVisionTransformer, pixels: Tensor, *, mask_ratio: float = 0.8, seed: int = 0, **settings
) -> list[Panel]:
    """The masking rules compared (AdaMAE figure 1): the video, then each rule's mask and what becomes of it.

    One model reconstructs under all four rules. Each rule rounds the number of visible tokens in its own way.
    A model without a sampler has blank panels in place of the adaptive ones.

    Args:
        pixels, settings: as in `reconstruct`.

    Raises:
        ValueError: the ratio leaves some rule nothing to show or nothing to mask.
    """
    own = reconstruct(model, pixels, seed=seed, **settings)
    log_p = torch.zeros(own.error.shape) if own.log_probs is None else own.log_probs  # (B,N)
    rules = {
        rule: MaskingGenerator(mask_type=rule, mask_ratio=mask_ratio, window=model.window)
        for rule in COMPARED
        if rule != "adaptive" or own.log_probs is not None
    }
    with undisturbed(model, seed):
        visible = {rule: masking(log_p).visible.to(pixels.device) for rule, masking in rules.items()}

    panels = [video_panel(own)]
    for rule, title in COMPARED.items():
        if rule not in rules:
            panels.append(Panel(Label(title, ("no sampler",)), np.full_like(panels[0].frames, BLANK)))
            continue
        rec = reconstruct(model, pixels, visible[rule], **settings)
        prediction = prediction_panel(rec)
        notes = (f"mean error {rec.error.nanmean():.3g}", *prediction.label.notes)
        panels += [mask_panel(rec, title), prediction._replace(label=Label("", notes))]
    return panels


# ----------------------------------------------------------------------------------------------- the drawing

CELL = 160  # a frame smaller than this is enlarged by a whole number
GAP, MARGIN, ROW_LABEL, CHARACTER = 6, 10, 190, 6  # pixels
BACKGROUND, INK, SOFT = (255, 255, 255), (20, 20, 20), (95, 95, 95)
TITLE_FONT, NOTE_FONT = ImageFont.load_default(size=15), ImageFont.load_default(size=12)


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
    return np.stack(
        [
            draw_grid(row[None], columns=labels, heading=f"{heading}  frame {k} of {len(cells)}".strip())
            for k, row in enumerate(cells, start=1)
        ]
    )


def training_picture(
    model: PretrainVisionTransformer,
    pixels: Tensor,
    *,
    normalize_target: bool = True,
    normalization: Normalization = IMAGENET,
    seed: int = 0,
) -> np.ndarray:
    """What to look at while training: a row of five panels for the middle of each clip, (H',W',3) uint8.

    Args:
        model: without DDP's wrapper; its mode, gradients and the random state are left as they were.
        pixels: a few clips (B,3,T,H,W) float32 in [0,1] on the model's device.
    """
    rec = reconstruct(model, pixels, normalize_target=normalize_target, normalization=normalization, seed=seed)
    panels = five_panels(rec)
    cells = np.stack([p.frames[:, pixels.shape[2] // 2] for p in panels], axis=1)  # (B,5,H,W,3)
    return draw_grid(cells, columns=[p.label for p in panels])
