"""Runs a pre-training model on clips, for pictures."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from augment import COLOUR_STATISTICS, Colours, normalize
from modeling_pretrain import PretrainVisionTransformer
from targets import PretrainOutput, Target, patchify, unpatchify
from utils import SettingError

SHOW_VISIBLE = ("pasted", "predicted")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """What a picture shows, and what it has to know of the model's training.

    Raises:
        SettingError: `show_visible` is not one of `SHOW_VISIBLE`.
    """

    target: Target
    normalization: Colours = COLOUR_STATISTICS["imagenet"]  # of the model's input
    show_visible: str = "pasted"  # visible patches from the original, or "predicted", from the decoder
    error_top: float | None = None  # end of the error's colour scale; None leaves it to the target
    seed: int = 0  # of the masks

    def __post_init__(self):
        if self.show_visible not in SHOW_VISIBLE:
            raise SettingError(f"--visible {self.show_visible}: choose {' or '.join(SHOW_VISIBLE)}")


class Reconstruction(NamedTuple):
    """What a model makes of clips; every tensor is on the CPU."""

    video: Tensor  # (B,3,T,H,W) pixels in [0,1]
    prediction: Tensor | None  # (B,3,T,H,W) pixels in [0,1]; None where the target can't be drawn
    error: Tensor  # (B,N) error of each token against its target; NaN where it is visible, or all unknown
    log_probs: Tensor | None  # (B,N) log P of the adaptive sampler, None without one
    visible: Tensor  # (B,N) bool
    window: tuple[int, int, int]  # tokens in (time, height, width)
    patch: int
    settings: PictureSettings


@contextmanager
def undisturbed(model: PretrainVisionTransformer, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, no compilation and a seeded random state; restores all of it at the end."""
    device, training = next(model.parameters()).device, model.training
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
    """The model's output, and its predictions for all tokens in token order (B,N,width).

    The model predicts masked tokens only. Here its last two layers are applied to the visible ones, too, for which no
    loss has trained them.
    """
    features = []
    hook = model.decoder.blocks.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        out = model(clip, visible)
    finally:
        hook.remove()
    decoder = model.decoder
    tokens = decoder.without_class_token(features[0])  # (B,N,D')
    predicted = decoder.head(decoder.norm(tokens))  # (B,N,width), visible tokens first
    order = torch.cat([out.visible, out.masked], dim=1)[:, :, None].expand_as(predicted)
    return out, torch.empty_like(predicted).scatter_(1, order, predicted)


def reconstruct(
    model: PretrainVisionTransformer, pixels: Tensor, settings: PictureSettings, visible: Tensor | None = None
) -> Reconstruction:
    """Masks and reconstructs clips (B,3,T,H,W) float32 in [0,1] on the model's device.

    The tokens at the indices `visible` (B,Nv) stay visible; None draws them by the model's own rule. The model and
    the random state are left as they were.
    """
    with undisturbed(model, settings.seed):
        out, predicted = predict_all(model, normalize(pixels, *settings.normalization), visible)
        error = torch.full(out.masked.shape, math.nan, device=pixels.device)  # (B,Nm)
        if settings.target.ready:
            error = settings.target.error(out.prediction, settings.target(pixels, out.masked))

        tokens = patchify(pixels, model.patch)  # (B,N,P)
        is_visible = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        is_visible.scatter_(1, out.visible, True)
        drawn = settings.target.to_pixels(predicted.float(), pixels)  # (B,N,P) or None
        if drawn is not None and settings.show_visible == "pasted":
            drawn = torch.where(is_visible[:, :, None], tokens, drawn)
        errors = torch.full(tokens.shape[:2], math.nan, device=tokens.device).scatter_(1, out.masked, error)
        return Reconstruction(
            video=pixels.cpu(),
            prediction=None if drawn is None else unpatchify(drawn.clamp(0, 1), model.window, model.patch).cpu(),
            error=errors.cpu(),
            log_probs=None if out.log_probs is None else out.log_probs.cpu(),
            visible=is_visible.cpu(),
            window=model.window,
            patch=model.patch,
            settings=settings,
        )
