"""What is reconstructed, and the losses: L = L_R + w L_S.

A new target is a subclass of `Target` and a row in `TARGETS`: the decoder's width, losses and pictures follow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from augment import COLOUR_STATISTICS, normalize
from clips.gradients import CELL, ORIENTATIONS, oriented_gradients
from modeling_blocks import TUBELET, gather_tokens
from sampling import sampling_loss
from utils import SettingError


def patchify(pixels: Tensor, patch: int, tubelet: int = TUBELET) -> Tensor:
    """Cuts clips (B,3,T,H,W) into tokens (B,N,P) in (t,h,w) order, P = tubelet*p*p*3.

    Inside a token the order is frame, row, column, channel, with the channel fastest.
    """
    return rearrange(pixels, "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=tubelet, p=patch, q=patch)  # (B,N,P)


def unpatchify(tokens: Tensor, window: tuple[int, int, int], patch: int, tubelet: int = TUBELET) -> Tensor:
    """The inverse of `patchify`: tokens (B,N,P) of a window (T',H',W') back to clips (B,3,T,H,W)."""
    t, h, w = window
    sizes = {"t": t, "h": h, "w": w, "f": tubelet, "p": patch, "q": patch}
    return rearrange(tokens, "b (t h w) (f p q c) -> b c (t f) (h p) (w q)", **sizes)  # (B,3,T,H,W)


def patch_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each token and channel over its pixels: two (B,n,1,3) tensors.

    The variance is unbiased and 1e-6 is added outside the root, as in the published code.
    """
    per_channel = rearrange(tokens, "b n (pixel c) -> b n pixel c", c=3)
    return per_channel.mean(2, keepdim=True), per_channel.std(2, keepdim=True) + 1e-6


ERRORS = {
    "mse": lambda difference: difference.square().mean(2),
    "l1": lambda difference: difference.abs().mean(2),
    "l2": lambda difference: difference.norm(dim=2),
}


class Target:
    """What the decoder predicts of each masked token.

    A subclass defines `width` and `__call__`. It overrides `error` where a difference of two vectors is not the
    measure, `to_pixels` where a prediction can be drawn, and `describe` where it has settings. It may ignore
    `normalize`, which standardises targets, and `num_frames`, the length of a clip.
    """

    width: int  # numbers that the decoder predicts for a token
    prediction_note = "this target can't be drawn"  # caption of the prediction's panel
    error_note = "mean square"  # caption of the error's panel
    error_top: float | None = None  # end of the error's colour scale; None: the largest error of the clips
    ready = True  # whether it can be computed; without its frozen network a target has a width only

    def __init__(self, *, patch: int, normalize: bool = True, num_frames: int = 16):
        self.patch, self.normalize, self.num_frames = patch, normalize, num_frames

    def describe(self) -> str:
        """What it is, in words that tell it from other targets."""
        return type(self).__name__

    def __call__(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """The target of the masked tokens (B,Nm) int64 of clips (B,3,T,H,W) float32 in [0,1].

        It is (B,Nm,width) float32, or whatever else `error` compares predictions with.
        """
        raise NotImplementedError

    def error(self, prediction: Tensor, target: Tensor, loss: str = "mse") -> Tensor:
        """The error of each masked token, (B,Nm) float32; its mean is the loss L_R (AdaMAE section 3.2).

        Args:
            prediction: (B,Nm,width) in any floating-point type.
            target: as `__call__` returns it.
            loss: one of `ERRORS`. The published code takes the mean square where the paper writes an l2 norm.
        """
        return ERRORS[loss](prediction.float() - target)  # (B,Nm)

    def to_pixels(self, prediction: Tensor, pixels: Tensor) -> Tensor | None:
        """Predictions (B,N,width) float32 for all tokens of clips (B,3,T,H,W), as pixels (B,N,P).

        None, the default, says that this target can't be drawn.
        """
        return None


class Pixels(Target):
    """Pixels, each token standardised by its own mean and deviation, or raw.

    Args:
        joint: as MAE-ST (section 3): pixels normalised by MAE-ST's colours, standardised over all channels together.
            Otherwise, as AdaMAE (section 3.2) and VideoMAE, pixels in [0,1], each channel standardised on its own.
        pred_t_dim: how many frames are predicted, evenly spread (MAE-ST); None: all.

    Raises:
        SettingError: the predicted frames do not divide among the tokens.
    """

    def __init__(self, *, joint: bool = False, pred_t_dim: int | None = None, **settings):
        super().__init__(**settings)
        patch, normalize, num_frames = self.patch, self.normalize, self.num_frames
        shown, slots = pred_t_dim or num_frames, num_frames // TUBELET
        if shown % slots or shown > num_frames:
            asked = f"a multiple of the clip's {slots} time slots, at most its {num_frames} frames"
            raise SettingError(f"--pred_t_dim {pred_t_dim} must be {asked}")
        self.joint, self.tubelet = joint, shown // slots
        self.frames = None if shown == num_frames else [i * (num_frames - 1) // max(1, shown - 1) for i in range(shown)]
        self.width = self.tubelet * patch * patch * 3
        self.prediction_note = "patch mean and std from the original" if normalize else "raw pixels"
        space = "normalised pixels (1: patch mean alone)" if normalize else "raw pixels"
        self.error_note = f"mean square over {space}"
        self.error_top = 2.0 if normalize else None

    def describe(self) -> str:
        frames, over = f"{self.tubelet} of {TUBELET} frames", "all channels" if self.joint else "each channel"
        return f"pixels ({frames}, {over}, {'normalised' if self.normalize else 'raw'})"

    def _tokens(self, pixels: Tensor) -> Tensor:
        """The values of all tokens before they are standardised: (B,3,T,H,W) -> (B,N,width)."""
        pixels = pixels if self.frames is None else pixels[:, :, self.frames]
        if self.joint:
            pixels = normalize(pixels, *COLOUR_STATISTICS["mae_st"])
        return patchify(pixels, self.patch, self.tubelet)

    def _statistics(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations of tokens (B,n,width), as (B,n,1,3), or (B,n,1,1) jointly."""
        if not self.joint:
            return patch_statistics(tokens)
        mean, var = tokens.mean(2), tokens.var(2)
        return mean[:, :, None, None], (var + 1e-6).sqrt()[:, :, None, None]

    def __call__(self, pixels: Tensor, masked: Tensor) -> Tensor:
        tokens = gather_tokens(self._tokens(pixels), masked)  # (B,Nm,width)
        if self.normalize:
            mean, std = self._statistics(tokens)
            rearrange(tokens, "b n (x c) -> b n x c", c=3).sub_(mean).div_(std)  # a view: in place
        return tokens

    def to_pixels(self, prediction: Tensor, pixels: Tensor) -> Tensor:
        """Normalised predictions get the statistics of the original patch, which a masked model can't know.

        Frames that are not predicted show the prediction of the one before them.
        """
        if self.normalize:
            mean, std = self._statistics(self._tokens(pixels))
            prediction = (rearrange(prediction, "b n (x c) -> b n x c", c=3) * std + mean).flatten(2)
        if self.joint:
            means, deviations = (prediction.new_tensor(x) for x in COLOUR_STATISTICS["mae_st"])
            prediction = (rearrange(prediction, "b n (x c) -> b n x c", c=3) * deviations + means).flatten(2)
        frames = prediction.unflatten(2, (self.tubelet, -1))  # (B,N,predicted frames a token,p*p*3)
        return frames.repeat_interleave(TUBELET // self.tubelet, dim=2).flatten(2)  # (B,N,P)


class Gradients(Target):
    """Histograms of oriented gradients, as in MaskFeat: of each colour, in cells of 8 x 8 pixels, l2-normalised each.

    Only of a tubelet's first frame: MaskFeat predicts the centre frame of its cubes, and two frames have none.
    """

    error_note = "mean square over histograms of gradients"

    def __init__(self, **settings):
        super().__init__(**settings)
        self.side = self.patch // CELL  # cells
        if self.patch % CELL:
            raise SettingError(f"--target hog needs tokens of whole cells of {CELL} pixels, --model has {self.patch}")
        self.width = 3 * ORIENTATIONS * self.side**2

    def describe(self) -> str:
        return f"hog ({'normalised' if self.normalize else 'raw'})"

    def __call__(self, pixels: Tensor, masked: Tensor) -> Tensor:
        cells = oriented_gradients(pixels[:, :, ::TUBELET], normalize=self.normalize)  # (B,3,T',H/8,W/8,9)
        tokens = rearrange(cells, "b c t (h p) (w q) o -> b (t h w) (p q c o)", p=self.side, q=self.side)
        return gather_tokens(tokens, masked)


class Features(Target):
    """Features of a frozen network at the same tokens, through a LayerNorm without weights.

    Args:
        width: of the features.
        network: which network, in words.
        teacher: the network, clips (B,3,T,H,W) float32 in [0,1] -> features (B,N,width); see `weights.teachers`.
    """

    measure = "mean square over features"

    def __init__(self, *, width: int, network: str, teacher: Callable[[Tensor], Tensor] | None = None, **settings):
        super().__init__(**settings)
        self.width, self.network, self.teacher, self.ready = width, network, teacher, teacher is not None
        self.error_note = self.measure if self.ready else f"unknown without {network}"

    def describe(self) -> str:
        return f"features of the {self.network} ({'normalised' if self.normalize else 'raw'})"

    def __call__(self, pixels: Tensor, masked: Tensor) -> Tensor:
        features = gather_tokens(self.teacher(pixels), masked).float()  # (B,Nm,width)
        return F.layer_norm(features, (self.width,)) if self.normalize else features


class Tokens(Features):
    """Ids below `width` of a frozen tokenizer: `teacher` maps clips to ids (B,N) int64."""

    measure = "cross-entropy"

    def describe(self) -> str:
        return f"tokens of the {self.network}"

    def __call__(self, pixels: Tensor, masked: Tensor) -> Tensor:
        return self.teacher(pixels).gather(1, masked)  # (B,Nm)

    def error(self, prediction: Tensor, target: Tensor, loss: str = "mse") -> Tensor:
        """The cross-entropy of each masked token, (B,Nm) float32, whatever the `loss`."""
        logits = prediction.float().flatten(0, 1)  # (B*Nm,V): with more axes it is not deterministic on a GPU
        return F.cross_entropy(logits, target.flatten(), reduction="none").view_as(target)


TARGETS: dict[str, type[Target]] = {"pixels": Pixels, "hog": Gradients, "features": Features, "tokens": Tokens}


def create_target(name: str, *, patch: int, normalize: bool = True, **settings) -> Target:
    """Builds a target of `TARGETS`; `settings` are the class's own.

    Raises:
        SettingError: there is no such target, or it can't have these settings.
    """
    if name not in TARGETS:
        raise SettingError(f"--target {name}: no such target; choose one of {', '.join(TARGETS)}")
    return TARGETS[name](patch=patch, normalize=normalize, **settings)


class PretrainOutput(NamedTuple):
    """What a pre-training model returns: the prediction, and which tokens it is of."""

    prediction: Tensor  # (B,Nm,width), in `masked` order
    visible: Tensor  # (B,Nv) int64, ascending
    masked: Tensor  # (B,Nm) int64, ascending; while training those that the decoder gets (--decoder_mask_ratio)
    log_probs: Tensor | None  # (B,N) float32 log P of the adaptive sampler, None without one
    drawn: Tensor  # (B,Nv) int64, the visible tokens in the order in which they were drawn


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The two losses of AdaMAE (section 3.2) and a bonus for the entropy H of P: L = L_R + w L_S - w_H H / log N."""

    target: Target
    loss: str = "mse"  # reconstruction error of a token, one of `ERRORS`
    sampling_form: str = "log"  # of L_S, one of `SAMPLING_LOSSES`
    sampling_weight: float = 1e-4  # w
    entropy_weight: float = 0.0  # w_H

    def __call__(self, output: PretrainOutput, pixels: Tensor) -> dict[str, Tensor]:
        """The losses of clips (B,3,T,H,W) in [0,1], as named scalars on their device.

        `loss` is the one to minimise, the others are its parts. Without a sampler there is only L_R.
        """
        target = self.target(pixels, output.masked)  # (B,Nm,width)
        error = self.target.error(output.prediction, target, self.loss)  # (B,Nm)
        loss_r = error.mean()
        if output.log_probs is None:
            return {"loss": loss_r, "loss_reconstruction": loss_r}

        log_p = output.log_probs  # (B,N)
        probs = log_p.exp()  # (B,N)
        entropy = -(probs * log_p).sum(1).mean() / math.log(log_p.shape[1])
        loss_s = self.sampling_weight * sampling_loss(log_p, output.masked, error, self.sampling_form, output.drawn)
        if self.entropy_weight:
            loss_s = loss_s - self.entropy_weight * entropy
        return {
            "loss": loss_r + loss_s,
            "loss_reconstruction": loss_r,
            "loss_sampling": loss_s,
            "probs_entropy": entropy.detach(),
            "probs_max": probs.detach().amax(1).mean(),
        }
