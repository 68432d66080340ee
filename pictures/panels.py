"""Panels of what a pre-training model does with clips: video, probability, mask, prediction and error."""

import math

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib import colormaps
from torch import Tensor

from masking_generator import RULES, MaskingGenerator
from modeling_blocks import TUBELET
from modeling_pretrain import PretrainVisionTransformer
from pictures.drawing import Label, Panel, draw_grid
from pictures.reconstruction import PictureSettings, Reconstruction, reconstruct, undisturbed
from targets import patchify, unpatchify

COMPARED = {"random": "patch (random)", "tube": "tube", "frame": "frame", "adaptive": "adaptive"}
GREY = 0.5  # of patches with nothing to show
BLANK = 235  # of panels with nothing to show
ERROR_COLOURS, PROBABILITY_COLOURS = "magma", "viridis"


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


def blank_panel(rec: Reconstruction, title: str, note: str) -> Panel:
    return Panel(Label(title, (note,)), np.full_like(to_frames(rec.video), BLANK))


def prediction_panel(rec: Reconstruction) -> Panel:
    """The predicted video; blank where the target can't be drawn."""
    source = rec.settings.target.prediction_note
    if rec.prediction is None:
        return blank_panel(rec, "prediction", source)
    visible = "pasted" if rec.settings.show_visible == "pasted" else "as predicted"
    return Panel(Label("prediction", (source, f"visible patches {visible}")), to_frames(rec.prediction))


def error_panel(rec: Reconstruction) -> Panel:
    """The error of the masked tokens; blank where the target's frozen network is not at hand."""
    target = rec.settings.target
    if not target.ready:
        return blank_panel(rec, "error", target.error_note)
    top = rec.settings.error_top or target.error_top or rec.error.nan_to_num().max().item()
    notes = (target.error_note, f"mean {rec.error.nanmean():.3g}, grey: visible")
    label = Label("error", notes, (ERROR_COLOURS, "0", f"{top:.3g}"))
    return Panel(label, heat_map(rec.error, top, ERROR_COLOURS, rec))


def probability_panel(rec: Reconstruction) -> Panel:
    """P as a multiple of the uniform 1/N; blank where the model has no sampler."""
    if rec.log_probs is None:
        return blank_panel(rec, "probability", "no sampler")
    probs, num_tokens = rec.log_probs.exp(), rec.log_probs.shape[1]
    entropy = torch.special.entr(probs).sum(1).mean().item() / math.log(num_tokens)
    times_uniform = probs * num_tokens  # (B,N)
    top = times_uniform.max().item()
    notes = ("P x N (1: uniform)", f"entropy / log N = {entropy:.3f}")
    label = Label("probability (CAT)", notes, (PROBABILITY_COLOURS, "0", f"{top:.3g}"))
    return Panel(label, heat_map(times_uniform, top, PROBABILITY_COLOURS, rec))


def mask_panel(rec: Reconstruction, title: str = "mask") -> Panel:
    tokens = patchify(rec.video, rec.patch)  # (B,N,P)
    shown = torch.where(rec.visible[:, :, None], tokens, torch.tensor(GREY))
    note = f"{rec.visible[0].sum()} of {rec.visible.shape[1]} patches visible"
    return Panel(Label(title, (note,)), to_frames(unpatchify(shown, rec.window, rec.patch)))


def five_panels(rec: Reconstruction) -> list[Panel]:
    """Video, probability, mask, prediction and error; all clips and frames share the scales."""
    return [panel(rec) for panel in (video_panel, probability_panel, mask_panel, prediction_panel, error_panel)]


def three_rows(rec: Reconstruction) -> list[Panel]:
    """The papers' figure of a model (MAE-ST figure 2): the video, what the encoder sees of it, the reconstruction."""
    return [video_panel(rec), mask_panel(rec, "masked"), prediction_panel(rec)]


def mask_panels(
    model: PretrainVisionTransformer, pixels: Tensor, settings: PictureSettings, *, mask_ratio: float = 0.8
) -> list[Panel]:
    """The masking rules compared (AdaMAE figure 1): the video, then each rule's mask and its reconstruction.

    One model reconstructs clips (B,3,T,H,W) float32 in [0,1] on its device under all four rules. Each rule rounds the
    number of visible tokens in its own way. Without a sampler the panels of the adaptive rule are blank.

    Raises:
        SettingError: the ratio leaves some rule nothing to show or nothing to mask.
    """
    own = reconstruct(model, pixels, settings)
    log_p = torch.zeros(own.error.shape) if own.log_probs is None else own.log_probs  # (B,N)
    rules = {
        rule: MaskingGenerator(mask_type=rule, mask_ratio=mask_ratio, window=model.window)
        for rule in COMPARED
        if not RULES[rule].adaptive or own.log_probs is not None
    }
    with undisturbed(model, settings.seed):
        visible = {rule: masking(log_p).visible.to(pixels.device) for rule, masking in rules.items()}

    panels = [video_panel(own)]
    for rule, title in COMPARED.items():
        if rule not in rules:
            panels.append(blank_panel(own, title, "no sampler"))
            continue
        rec = reconstruct(model, pixels, settings, visible[rule])
        prediction = prediction_panel(rec)
        notes = (f"mean error {rec.error.nanmean():.3g}", *prediction.label.notes)
        panels += [mask_panel(rec, title), prediction._replace(label=Label("", notes))]
    return panels


def training_picture(model: PretrainVisionTransformer, pixels: Tensor, settings: PictureSettings) -> np.ndarray:
    """The five panels of the middle frame of each clip, a row per clip, as one picture (H',W',3) uint8.

    For use while training: the model's mode, its gradients and the random state are left as they were.

    Args:
        model: without DDP's wrapper.
        pixels: a few clips (B,3,T,H,W) float32 in [0,1] on the model's device.
    """
    panels = five_panels(reconstruct(model, pixels, settings))
    cells = np.stack([p.frames[:, pixels.shape[2] // 2] for p in panels], axis=1)  # (B,5,H,W,3)
    return draw_grid(cells, columns=[p.label for p in panels])
