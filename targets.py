"""Pixels to targets and back, and the two losses of AdaMAE."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from modeling_blocks import TUBELET
from modeling_pretrain import PretrainOutput

EPS = torch.finfo(torch.float32).eps
LOG_P_RANGE = math.log(EPS), math.log(1 - EPS)  # a Categorical of the published code clamps P to [EPS, 1-EPS]


def patchify(pixels: Tensor, patch: int, tubelet: int = TUBELET) -> Tensor:
    """Cuts clips (B,3,T,H,W) into tokens (B,N,P), tokens in (t,h,w) order, P = tubelet*p*p*3.

    Inside a token the order is frame, row, column, channel, with the channel fastest.
    """
    return rearrange(
        pixels, "b c (t f) (h p) (w q) -> b (t h w) (f p q c)", f=tubelet, p=patch, q=patch
    )  # (B,N,P)


def unpatchify(tokens: Tensor, window: tuple[int, int, int], patch: int, tubelet: int = TUBELET) -> Tensor:
    """The inverse of `patchify`: tokens (B,N,P) of a window (T',H',W') back to clips (B,3,T,H,W)."""
    t, h, w = window
    return rearrange(
        tokens, "b (t h w) (f p q c) -> b c (t f) (h p) (w q)", t=t, h=h, w=w, f=tubelet, p=patch, q=patch
    )  # (B,3,T,H,W)


def patch_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each token and channel over its pixels: two (B,n,1,3) tensors.

    The variance is unbiased and 1e-6 is added outside the root, as in the published code.
    """
    per_channel = rearrange(tokens, "b n (pixel c) -> b n pixel c", c=3)
    return per_channel.mean(2, keepdim=True), per_channel.std(2, keepdim=True) + 1e-6


def reconstruction_targets(pixels: Tensor, masked: Tensor, patch: int, *, normalize: bool = True) -> Tensor:
    """Targets of the masked tokens (AdaMAE section 3.2).

    Args:
        pixels: clips (B,3,T,H,W) float32 in [0,1].
        masked: int64 (B,Nm).
        normalize: standardise each token and channel by its own pixels; else raw pixels.

    Returns:
        (B,Nm,P) float32.
    """
    tokens = patchify(pixels, patch)  # (B,N,P)
    tokens = tokens.gather(1, masked[:, :, None].expand(-1, -1, tokens.shape[2]))  # (B,Nm,P)
    if not normalize:
        return tokens
    mean, std = patch_statistics(tokens)
    return rearrange((rearrange(tokens, "b n (x c) -> b n x c", c=3) - mean) / std, "b n x c -> b n (x c)")


ERRORS = {
    "mse": lambda difference: difference.square().mean(2),
    "l1": lambda difference: difference.abs().mean(2),
    "l2": lambda difference: difference.norm(dim=2),
}


def reconstruction_error(prediction: Tensor, target: Tensor, loss: str = "mse") -> Tensor:
    """Error of each masked token, in float32: (B,Nm,P) twice -> (B,Nm); `loss` is one of `ERRORS`.

    Its mean is the reconstruction loss L_R (AdaMAE section 3.2). The published code takes the mean square,
    "mse", where the paper writes an l2 norm.
    """
    return ERRORS[loss](prediction.float() - target)  # (B,Nm)


def sampling_loss(log_probs: Tensor, masked: Tensor, error: Tensor, form: str = "log") -> Tensor:
    """The sampler's loss L_S, REINFORCE-style (AdaMAE section 3.2): probability is to go where the error is.

    Args:
        log_probs: log P, (B,N) float32.
        masked: int64 (B,Nm).
        error: reconstruction error of the masked tokens (B,Nm); no gradient flows into it.
        form: "log", the published code: -mean(log p * error), or "linear", the paper: -sum(p * error).
    """
    error = error.detach()
    log_p = log_probs.gather(1, masked).clamp(*LOG_P_RANGE)  # (B,Nm)
    if form == "linear":
        return -(log_p.exp() * error).sum(1).mean()
    return -(log_p * error).mean()


@dataclass(frozen=True)
class Losses:
    """The two losses of AdaMAE (section 3.2): L = L_R + weight * L_S.

    Args:
        patch: pixels per side of a token.
        normalize_target: standardise the target of each token and channel by its own pixels.
        loss: "mse" or "l1"; `sampling_form`: "log" or "linear", as in `targets`.
    """

    patch: int
    normalize_target: bool = True
    loss: str = "mse"
    sampling_form: str = "log"
    sampling_weight: float = 1e-4

    def __call__(self, output: PretrainOutput, pixels: Tensor) -> dict[str, Tensor]:
        """Named device scalars; `loss` is the one to minimise. Pixels are (B,3,T,H,W) in [0,1]."""
        target = reconstruction_targets(pixels, output.masked, self.patch, normalize=self.normalize_target)
        error = reconstruction_error(output.prediction, target, self.loss)  # (B,Nm)
        loss_r = error.mean()
        if output.log_probs is None:
            return {"loss": loss_r, "loss_reconstruction": loss_r}

        log_p = output.log_probs  # (B,N)
        loss_s = self.sampling_weight * sampling_loss(log_p, output.masked, error, self.sampling_form)
        probs = log_p.detach().exp()
        return {
            "loss": loss_r + loss_s,
            "loss_reconstruction": loss_r,
            "loss_sampling": loss_s,
            "probs_entropy": -(probs * log_p.detach()).sum(1).mean() / math.log(log_p.shape[1]),
            "probs_max": probs.amax(1).mean(),
        }
