"""Parts of the video ViTs: tubelet embedding, fixed positions, transformer blocks."""

from functools import partial

import timm.layers
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.beit import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling_attention import Attention, SeparateAttention

TUBELET = 2  # frames per token, in every published model


def sinusoid_1d(num_positions: int, dim: int) -> Tensor:
    """Sinusoid table of "Attention Is All You Need" over the flattened token index: (N,D) float32.

    Even channels j are sin(pos / 10000^(j/D)), odd ones cos(pos / 10000^((j-1)/D)), in float64, as in the published
    code of AdaMAE and VideoMAE.
    """
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    exponent = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode="floor") * 2 / dim
    angle = position / 10000.0**exponent  # (N,D)
    return torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos()).float()  # (N,D)


def sinusoid_3d(window: tuple[int, int, int], dim: int) -> Tensor:
    """Sinusoid table with separate channels for time, row and column: (N,D) float32.

    Rows and columns get the same even number of channels near D/3, time the rest (AdaMAE, section 3.1).
    """
    t, h, w = window
    spatial = dim // 6 * 2
    axes = (
        sinusoid_1d(t, dim - 2 * spatial)[:, None, None].expand(t, h, w, -1),
        sinusoid_1d(h, spatial)[None, :, None].expand(t, h, w, -1),
        sinusoid_1d(w, spatial)[None, None, :].expand(t, h, w, -1),
    )
    return torch.cat(axes, dim=-1).flatten(0, 2)  # (N,D)


POSITIONS = {
    "sinusoid_1d": lambda window, dim: sinusoid_1d(window[0] * window[1] * window[2], dim),
    "sinusoid_3d": sinusoid_3d,
}


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The rows of tokens (B,N,D), or of a table (N,D), at an index (B,n): (B,n,D)."""
    return x[index] if x.ndim == 2 else x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


class TubeletEmbed(nn.Module):
    """Embeds the tubelets of a clip: (B,3,T,H,W) -> (B,N,D), tokens in (t,h,w) order, w fastest.

    A convolution whose stride is its kernel is a linear layer on the tubelets. As such it is faster, its tokens are
    contiguous, and a GPU computes it in the precision of all other layers.
    """

    def __init__(self, *, patch: int, dim: int, tubelet: int = TUBELET):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=(tubelet, patch, patch), stride=(tubelet, patch, patch))

    def forward(self, clip: Tensor) -> Tensor:
        f, p, q = self.proj.kernel_size
        tubelets = rearrange(clip, "b c (t f) (h p) (w q) -> b (t h w) (c f p q)", f=f, p=p, q=q)  # (B,N,3*f*p*q)
        return F.linear(tubelets, self.proj.weight.flatten(1), self.proj.bias)  # (B,N,D)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, (B,N,D) -> (B,N,D); no dropout after the GELU, as published.

    The GELU's output is computed once more in the backward pass instead of being stored: 5 % less memory for 1.5 % more
    time in pre-training. A compiled block decides by itself what it stores.

    Args:
        mlp: timm's, whose layers and names it takes over.
    """

    def __init__(self, mlp: timm.layers.Mlp):
        super().__init__()
        self.fc1, self.fc2, self.drop2 = mlp.fc1, mlp.fc2, mlp.drop2

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)  # (B,N,4D)
        if not hidden.requires_grad or torch.compiler.is_compiling():
            return self.drop2(self._project(hidden))
        return self.drop2(checkpoint(self._project, hidden, use_reentrant=False, preserve_rng_state=False))

    def _project(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden))  # (B,N,D)


def create_block(dim: int, heads: int, **settings) -> Block:
    """timm's pre-norm transformer block with our attention and MLP.

    Args:
        settings: keyword arguments of timm's block.
    """
    block = Block(dim, heads, **settings)
    block.attn, block.mlp = Attention(block.attn), Mlp(block.mlp)
    return block


class Blocks(nn.ModuleList):
    """Pre-norm transformer blocks: (B,N,D) -> (B,N,D).

    Args:
        drop, attn_drop: dropout after attention and MLP, and of attention weights.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.
        separate_qkv: `SeparateAttention`, else one projection without a key bias.
        checkpoint_activations: recompute activations in the backward pass instead of storing them.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        separate_qkv: bool = False,
        checkpoint_activations: bool = False,
    ):
        norm = partial(nn.LayerNorm, eps=1e-6)
        settings = {"qkv_bias": True, "proj_drop": drop, "attn_drop": attn_drop, "norm_layer": norm}
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        super().__init__(create_block(dim, heads, drop_path=rate, **settings) for rate in rates)
        for block in self if separate_qkv else []:
            block.attn = SeparateAttention(dim=dim, heads=heads, attn_drop=attn_drop, proj_drop=drop)
        self.checkpoint_activations = checkpoint_activations

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.checkpoint_activations and self.training
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)  # (B,N,D)
        return x
