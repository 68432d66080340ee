"""The video ViT: tubelet embedding, positions, transformer blocks, classifier, and the table of sizes."""

import re
from functools import partial
from typing import NamedTuple

import torch
from timm.models.beit import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TUBELET = 2  # frames per token, in every published model


class Size(NamedTuple):
    """Width, depth and heads of the encoder; width and heads of the pre-training decoder."""

    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_heads: int


SIZES = {
    "tiny": Size(dim=128, depth=4, heads=4, decoder_dim=64, decoder_heads=2),  # the demo's, not published
    "small": Size(dim=384, depth=12, heads=6, decoder_dim=192, decoder_heads=3),
    "base": Size(dim=768, depth=12, heads=12, decoder_dim=384, decoder_heads=6),
    "large": Size(dim=1024, depth=24, heads=16, decoder_dim=512, decoder_heads=8),
    "huge": Size(dim=1280, depth=32, heads=16, decoder_dim=640, decoder_heads=8),
}

CLASSIFIERS = {
    "vit_tiny_patch8_64",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_large_patch16_224",
    "vit_large_patch16_384",
    "vit_large_patch16_512",
    "vit_huge_patch16_224",
}


def parse_model_name(name: str, known: set[str]) -> tuple[Size, int, int]:
    """Reads `..._<size>_patch<p>_<img>`: the size's table entry, the patch and the input side in pixels.

    Raises:
        ValueError: `name` is not one of `known`.
    """
    if name not in known:
        raise ValueError(f"--model {name}: no such model; choose one of {', '.join(sorted(known))}")
    size, patch, img = re.fullmatch(r".*_(\w+?)_patch(\d+)_(\d+)", name).groups()
    return SIZES[size], int(patch), int(img)


def token_grid(num_frames: int, input_size: int, patch: int, tubelet: int = TUBELET) -> tuple[int, int, int]:
    """The window of tokens (T/tubelet, H/patch, W/patch) of a clip.

    Raises:
        ValueError: the frames or pixels do not divide into tubelets or patches.
    """
    if num_frames % tubelet or num_frames < 1:
        raise ValueError(f"--num_frames {num_frames} is not a multiple of the tubelet size {tubelet}")
    if input_size % patch or input_size < 1:
        raise ValueError(f"--input_size {input_size} is not a multiple of the patch size {patch}")
    return num_frames // tubelet, input_size // patch, input_size // patch


def sinusoid_1d(num_positions: int, dim: int) -> Tensor:
    """Sinusoid table of "Attention Is All You Need" over the flattened token index.

    Even channels j are sin(pos / 10000^(j/dim)), odd ones cos(pos / 10000^((j-1)/dim)): (num_positions, dim)
    float32, computed in float64. The published code of AdaMAE and VideoMAE uses this one.
    """
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    exponent = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode="floor") * 2 / dim
    angle = position / 10000.0**exponent  # (N,D)
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()


def sinusoid_3d(window: tuple[int, int, int], dim: int) -> Tensor:
    """Factorised sinusoid: (N, dim) float32, the channels shared out between time, row and column.

    Each axis gets an even number of channels near dim/3 (rows and columns the same number, time the rest), as
    in the periodic 3-D encoding of the AdaMAE paper (section 3.1).
    """
    t, h, w = window
    spatial = dim // 6 * 2
    temporal = dim - 2 * spatial
    axes = (
        sinusoid_1d(t, temporal)[:, None, None].expand(t, h, w, -1),
        sinusoid_1d(h, spatial)[None, :, None].expand(t, h, w, -1),
        sinusoid_1d(w, spatial)[None, None, :].expand(t, h, w, -1),
    )
    return torch.cat(axes, dim=-1).flatten(0, 2)


POSITIONS = {
    "sinusoid_1d": lambda window, dim: sinusoid_1d(window[0] * window[1] * window[2], dim),
    "sinusoid_3d": sinusoid_3d,
}


class TubeletEmbed(nn.Module):
    """Cuts a clip (B,3,T,H,W) into tubelets and embeds each: (B,N,D), tokens in (t,h,w) order, w fastest."""

    def __init__(self, *, patch: int, dim: int, tubelet: int = TUBELET):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=(tubelet, patch, patch), stride=(tubelet, patch, patch))

    def forward(self, clip: Tensor) -> Tensor:
        return self.proj(clip).flatten(2).transpose(1, 2)  # (B,N,D)


class Blocks(nn.ModuleList):
    """Pre-norm transformer blocks (B,N,D) -> (B,N,D), stochastic depth rising linearly to `drop_path`.

    `checkpoint_activations` recomputes each block's activations in the backward pass instead of storing them.
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
        init_values: float = 0.0,
        checkpoint_activations: bool = False,
    ):
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        super().__init__(
            Block(
                dim,
                heads,
                qkv_bias=True,
                proj_drop=drop,
                attn_drop=attn_drop,
                drop_path=rate,
                init_values=init_values or None,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for rate in rates
        )
        for block in self:
            block.mlp.drop1 = nn.Identity()  # the published MLP has no dropout after its activation
        self.checkpoint_activations = checkpoint_activations

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class VisionTransformer(nn.Module):
    """The classifier of AdaMAE and VideoMAE: clip (B,3,T,H,W) -> logits (B,classes).

    There is no class token. With mean pooling the tokens are averaged and then normalised by `fc_norm`;
    without it they are normalised by `norm` and the first token is classified.
    """

    def __init__(
        self,
        *,
        size: Size,
        patch: int,
        window: tuple[int, int, int],
        num_classes: int,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        fc_drop: float = 0.0,
        init_values: float = 0.0,
        init_scale: float = 0.001,
        mean_pooling: bool = True,
        pos_embed: str = "sinusoid_1d",
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.depth = size.depth
        self.patch_embed = TubeletEmbed(patch=patch, dim=size.dim)
        self.register_buffer("positions", POSITIONS[pos_embed](window, size.dim), persistent=False)
        self.pos_drop = nn.Dropout(drop)
        self.blocks = Blocks(
            dim=size.dim,
            depth=size.depth,
            heads=size.heads,
            drop=drop,
            attn_drop=attn_drop,
            drop_path=drop_path,
            init_values=init_values,
            checkpoint_activations=checkpoint_activations,
        )
        self.norm = nn.Identity() if mean_pooling else nn.LayerNorm(size.dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(size.dim, eps=1e-6) if mean_pooling else None
        self.fc_drop = nn.Dropout(fc_drop)
        self.head = nn.Linear(size.dim, num_classes)
        self._initialise(init_scale)

    def _initialise(self, init_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)
            self.head.bias.mul_(init_scale)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay although they are not one-dimensional."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, clip: Tensor) -> Tensor:
        x = self.patch_embed(clip) + self.positions  # (B,N,D)
        x = self.norm(self.blocks(self.pos_drop(x)))  # (B,N,D)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x.mean(1))  # (B,D)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.fc_drop(self.forward_features(clip)))  # (B,classes)


def create_classifier(
    name: str, *, num_classes: int, num_frames: int = 16, input_size: int | None = None, **settings
) -> VisionTransformer:
    """Builds the classifier named `vit_<size>_patch<p>_<img>`; `settings` go to `VisionTransformer`.

    `input_size` in pixels overrides the side in the name. Raises ValueError as `parse_model_name` and
    `token_grid` do.
    """
    size, patch, img = parse_model_name(name, CLASSIFIERS)
    window = token_grid(num_frames, input_size or img, patch)
    return VisionTransformer(size=size, patch=patch, window=window, num_classes=num_classes, **settings)
