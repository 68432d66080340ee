"""Parts of the video ViTs: tubelet embedding, positions, transformer blocks."""

from functools import partial

import timm.layers
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import beit
from timm.models.beit import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attend
from utils import SettingError

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


POSITION_KINDS = (*POSITIONS, "learnable", "separable")


class WithPositions(nn.Module):
    """Base of the modules that add positions and perhaps a class token to tokens, under the published names.

    Kinds: "sinusoid_1d" or "sinusoid_3d", fixed; "learnable", one table that starts as the 1-D sinusoid; "separable",
    the sum of a learnable table over time and one over space (MAE-ST). With learnable ones the class token has a
    position of its own.
    """

    def create_positions(self, kind: str, *, window: tuple[int, int, int], dim: int, class_token: bool) -> None:
        """Adds the tables for a window (T',H',W') of tokens, and the class token.

        Raises:
            SettingError: unknown kind.
        """
        t, h, w = window
        rows = int(class_token)  # the class token's, in front
        self.pos_kind = kind
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        if kind == "separable":
            self.pos_embed_spatial = nn.Parameter(torch.zeros(1, h * w, dim))
            self.pos_embed_temporal = nn.Parameter(torch.zeros(1, t, dim))
            self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        elif kind in POSITION_KINDS:
            fixed = "sinusoid_1d" if kind == "learnable" else kind
            table = F.pad(POSITIONS[fixed](window, dim), (0, 0, rows, 0))[None]  # (1,[1+]N,D)
            if kind == "learnable":
                self.pos_embed = nn.Parameter(table)
            else:
                self.register_buffer("positions", table, persistent=False)
        else:
            choices = ", ".join(POSITION_KINDS)
            raise SettingError(f"--pos_embed {kind}: no such positions; choose one of {choices}")

    def position_table(self) -> Tensor:
        """Positions of the tokens: (1,N,D), or (1,1+N,D) with the class token's row in front."""
        if self.pos_kind != "separable":
            return self.pos_embed if self.pos_kind == "learnable" else self.positions
        grid = self.pos_embed_temporal[:, :, None] + self.pos_embed_spatial[:, None]  # (1,T',H'W',D)
        table = grid.flatten(1, 2)  # (1,N,D)
        return table if self.pos_embed_class is None else torch.cat([self.pos_embed_class, table], dim=1)

    def add_positions(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Adds positions to tokens (B,n,D) that stand at `index` (B,n), by default to all N; class token in front."""
        table = self.position_table()  # (1,[1+]N,D)
        tokens = self.without_class_token(table)  # (1,N,D)
        x = x + (tokens if index is None else gather_tokens(tokens[0], index))  # (B,n,D)
        if self.cls_token is None:
            return x
        return torch.cat([(self.cls_token + table[:, :1]).expand(len(x), -1, -1), x], dim=1)  # (B,1+n,D)

    def without_class_token(self, x: Tensor) -> Tensor:
        """(B,[1+]n,D) -> (B,n,D)."""
        return x if self.cls_token is None else x[:, 1:]


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


class Attention(nn.Module):
    """Self-attention (B,N,D) -> (B,N,D) with one projection of query, key and value, and no key bias.

    Its gradients come back in the projection's own layout; timm's attention copies them twice more.

    Args:
        attention: timm's, whose layers and names it takes over.
    """

    def __init__(self, attention: beit.Attention):
        super().__init__()
        self.heads, self.attn_drop = attention.num_heads, attention.attn_drop.p
        self.q_bias, self.v_bias = attention.q_bias, attention.v_bias
        self.qkv, self.proj, self.proj_drop = attention.qkv, attention.proj, attention.proj_drop

    def forward(self, x: Tensor, shared_rel_pos_bias: None = None) -> Tensor:
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # (3D)
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))  # (B,N,3,heads,d)
        x = attend(*qkv.unbind(2), drop=self.attn_drop if self.training else 0.0)  # (B,N,D)
        return self.proj_drop(self.proj(x))

    def tie_keys(self) -> None:
        """Makes keys equal to queries, so that each token attends to tokens like itself."""
        query, key, _ = self.qkv.weight.data.chunk(3)
        key.copy_(query)


def create_attention(dim: int, heads: int) -> Attention:
    """Attention without biases of query, key and value, and without dropout."""
    return Attention(beit.Attention(dim, heads))


class SeparateAttention(nn.Module):
    """Self-attention (B,N,D) -> (B,N,D) with separate, biased projections of query, key and value (MAE-ST)."""

    def __init__(self, *, dim: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, shared_rel_pos_bias: None = None) -> Tensor:
        q, k, v = (project(x).unflatten(2, (self.heads, -1)) for project in (self.q, self.k, self.v))  # (B,N,heads,d)
        x = attend(q, k, v, drop=self.attn_drop if self.training else 0.0)  # (B,N,D)
        return self.proj_drop(self.proj(x))

    def tie_keys(self) -> None:
        """As `Attention.tie_keys`."""
        self.k.weight.data.copy_(self.q.weight.data)


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


def name_weights(model: nn.Module, names: tuple[tuple[str, str], ...]) -> None:
    """Lets a model save and load its weights under other names.

    Args:
        names: pairs of starts of names, the model's own and the other; the first that fits a name counts.
    """

    def rename(tensors: dict[str, Tensor], prefix: str, pairs: tuple[tuple[str, str], ...]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            rest = name.removeprefix(prefix)
            old, new = next(((old, new) for old, new in pairs if rest.startswith(old)), ("", ""))
            tensors[prefix + new + rest.removeprefix(old)] = tensors.pop(name)

    back = tuple((new, old) for old, new in names)
    model.register_state_dict_post_hook(lambda module, tensors, prefix, metadata: rename(tensors, prefix, names))
    model.register_load_state_dict_pre_hook(lambda module, tensors, prefix, *rest: rename(tensors, prefix, back))
