"""How the published code computes what this project computes faster: a peer for the benchmarks.

Attention written out, the embedding as a convolution, an optimiser that walks the parameters one by one, a look at the
loss and the gradient's norm in every step, and float16 with a loss scale on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeling_blocks
from augment import IMAGENET_MEAN, IMAGENET_STD, normalize, to_pixels
from modeling_blocks import TubeletEmbed
from targets import patchify


def attention_written_out(q: Tensor, k: Tensor, v: Tensor, *, drop: float = 0.0) -> Tensor:
    """As `attention.attend`, with all N x N weights in memory."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = F.dropout((q * q.shape[3] ** -0.5 @ k.mT).softmax(3), drop)  # (B,heads,N,N)
    return (weights @ v).transpose(1, 2).flatten(2)


def use_published_kernels() -> None:
    """Makes every model of this process compute attention and embedding the published way."""
    modeling_blocks.attend = attention_written_out
    TubeletEmbed.forward = lambda self, clip: self.proj(clip).flatten(2).transpose(1, 2)


class PublishedTraining:
    """Backward pass and optimiser step the published way."""

    def __init__(self, model: nn.Module, device: torch.device, amp: torch.dtype | None):
        self.model = model
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, foreach=False)

    def step(self, loss: Tensor) -> None:
        loss.item()
        self.optimizer.zero_grad()  # gradients live until here, so they add to the forward pass's memory
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"), foreach=False).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def published_input(clips: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 clips -> the normalised clip (B,3,T,H,W), and the targets of all tokens (B,N,P) from it, undone again."""
    mean, std = (torch.tensor(x, device=clips.device).view(1, 3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    clip = normalize(to_pixels(clips))
    tokens = patchify(clip * std + mean, 16).unflatten(2, (-1, 3))
    target = (tokens - tokens.mean(2, keepdim=True)) / (tokens.std(2, keepdim=True) + 1e-6)
    return clip, target.flatten(2)


def published_forward(model: nn.Module, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AdaMAE's prediction (B,Nm,P), P (B,N) and boolean mask (B,N) of a normalised clip."""
    encoder = model.encoder
    tokens = encoder.patch_embed(clip)  # (B,N,D)
    batch, _, dim = tokens.shape
    probs = encoder.get_token_probs(tokens + encoder.pos_embed_probs).squeeze(2).float().nan_to_num().softmax(1)
    mask = torch.ones(probs.shape, dtype=torch.bool, device=clip.device)
    mask.scatter_(1, torch.multinomial(probs, model.masking.num_visible), False)
    x = (tokens + encoder.positions[0].type_as(tokens).to(clip.device).clone())[~mask].reshape(batch, -1, dim)
    x = model.encoder_to_decoder(encoder.norm(encoder.blocks(x)))
    places = model.decoder.positions.expand(batch, -1, -1).type_as(x).to(clip.device).clone()
    seen, hidden = (places[chosen].reshape(batch, -1, x.shape[2]) for chosen in (~mask, mask))
    full = torch.cat([x + seen, model.mask_token + hidden], 1)
    decoder = model.decoder
    return decoder.head(decoder.norm(decoder.blocks(full)[:, -hidden.shape[1] :])), probs, mask


def published_loss(prediction: Tensor, probs: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """L_R + 1e-4 L_S, with one Categorical object a clip."""
    error = (prediction.float() - target[mask].reshape(prediction.shape)).square().mean(2)
    sampling = torch.zeros((), device=target.device)
    for p, m, e in zip(probs, mask, error.detach()):
        log_p = torch.distributions.Categorical(p).log_prob(torch.arange(len(p), device=target.device))
        sampling = sampling - (log_p[m] * e).mean() / len(probs)
    return error.mean() + 1e-4 * sampling
