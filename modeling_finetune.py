"""The video ViT as a classifier (AdaMAE, VideoMAE, MAE-ST), and the tables of sizes and classifiers."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from modeling_blocks import TUBELET, Blocks, TubeletEmbed, WithPositions
from utils import SettingError


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


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the classifiers of one paper have in common."""

    settings: dict = field(default_factory=dict)  # of `VisionTransformer`
    statistics: str = "imagenet"  # of the input's colours, a key of `augment.COLOUR_STATISTICS`
    sampling: str = "dense"  # of frames, where no data set says otherwise; a key of `datasets.FRAME_RULES`


VIDEOMAE = Family()  # AdaMAE's classifiers are the same
MAE_ST = Family(
    settings={"class_token": True, "separate_qkv": True, "encoder_norm": True, "pos_embed": "separable"},
    statistics="mae_st",
    sampling="mae_st",
)

CLASSIFIERS = {
    "vit_tiny_patch8_64": VIDEOMAE,
    "vit_small_patch16_224": VIDEOMAE,
    "vit_base_patch16_224": VIDEOMAE,
    "vit_base_patch16_384": VIDEOMAE,
    "vit_large_patch16_224": VIDEOMAE,
    "vit_large_patch16_384": VIDEOMAE,
    "vit_large_patch16_512": VIDEOMAE,
    "vit_huge_patch16_224": VIDEOMAE,
    "vit_tiny_mae_st_patch8_64": MAE_ST,
    "vit_base_mae_st_patch16_224": MAE_ST,
    "vit_large_mae_st_patch16_224": MAE_ST,
    "vit_huge_mae_st_patch14_224": MAE_ST,
}


def parse_model_name(name: str, known: Collection[str]) -> tuple[Size, int, int]:
    """Reads a name `..._<size>_..._patch<p>_<img>`: entry of `SIZES`, patch size and input size in pixels.

    Raises:
        SettingError: `name` is not one of `known`.
    """
    if name not in known:
        raise SettingError(f"--model {name}: no such model; choose one of {', '.join(sorted(known))}")
    size, patch, img = re.fullmatch(rf".*_({'|'.join(SIZES)})_.*patch(\d+)_(\d+)", name).groups()
    return SIZES[size], int(patch), int(img)


def colour_statistics(statistics: str, *, imagenet: bool = True) -> str:
    """Key of `augment.COLOUR_STATISTICS` for the input of a family; without `imagenet`, 0.5 replaces ImageNet's."""
    return "half" if statistics == "imagenet" and not imagenet else statistics


def token_grid(num_frames: int, input_size: int, patch: int, tubelet: int = TUBELET) -> tuple[int, int, int]:
    """Returns the window of tokens (T',H',W') = (T/tubelet, H/patch, W/patch) of a square clip.

    Raises:
        SettingError: the frames or pixels do not divide into tubelets or patches.
    """
    if num_frames % tubelet or num_frames < 1:
        raise SettingError(f"--num_frames {num_frames} is not a multiple of the tubelet size {tubelet}")
    if input_size % patch or input_size < 1:
        raise SettingError(f"--input_size {input_size} is not a multiple of the patch size {patch}")
    return num_frames // tubelet, input_size // patch, input_size // patch


class VisionTransformer(WithPositions):
    """The classifier of AdaMAE, VideoMAE and MAE-ST: clip (B,3,T,H,W) -> logits (B,classes).

    Parameter names are those of the published checkpoints, methods those of timm's ViTs.

    Args:
        patch, tubelet: side of a token in pixels, and its frames.
        window: grid of tokens (T',H',W').
        drop, fc_drop: dropout after the positions and in the blocks, and before the head.
        init_scale: factor on the head's initial weights.
        mean_pooling: average the tokens, without the class token; else classify the first token.
        slot_pooling: with mean pooling, average each time slot and classify the concatenation, which keeps the order
            of events. Not in the papers.
        class_token: put a learnable token in front of the clip's.
        encoder_norm: normalise the mean by the encoder's own `norm` (MAE-ST), not by a fresh `fc_norm`.
        pos_embed: a kind of `WithPositions`.
        block_settings: keyword arguments of `Blocks`.

    Raises:
        SettingError: unknown positions.
    """

    def __init__(
        self,
        *,
        size: Size,
        patch: int,
        window: tuple[int, int, int],
        num_classes: int,
        tubelet: int = TUBELET,
        drop: float = 0.0,
        fc_drop: float = 0.0,
        init_scale: float = 0.001,
        mean_pooling: bool = True,
        slot_pooling: bool = False,
        class_token: bool = False,
        encoder_norm: bool = False,
        pos_embed: str = "sinusoid_1d",
        **block_settings,
    ):
        super().__init__()
        self.window, self.patch, self.dim, self.depth = window, patch, size.dim, size.depth
        self.heads, self.mean_pooling, self.encoder_norm = size.heads, mean_pooling, encoder_norm
        self.slots = window[0] if slot_pooling else 1
        self.patch_embed = TubeletEmbed(patch=patch, dim=size.dim, tubelet=tubelet)
        self.create_positions(pos_embed, window=window, dim=size.dim, class_token=class_token)
        self.pos_drop = nn.Dropout(drop)
        self.blocks = Blocks(dim=size.dim, depth=size.depth, heads=size.heads, drop=drop, **block_settings)
        self._place_norm(nn.LayerNorm(size.dim, eps=1e-6))
        self.fc_drop = nn.Dropout(fc_drop)
        self.head = nn.Linear(size.dim * self.slots, num_classes)
        self._initialise(init_scale)

    def _initialise(self, init_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if name.startswith(("cls_token", "pos_embed_")):
                nn.init.trunc_normal_(p, std=0.02)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)
            self.head.bias.mul_(init_scale)

    def _place_norm(self, norm: nn.LayerNorm) -> None:
        self.norm, self.fc_norm = (None, norm) if self.mean_pooling and not self.encoder_norm else (norm, None)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides the one-dimensional ones."""
        return {n for n, _ in self.named_parameters() if n.startswith(("cls_token", "pos_embed"))}

    def layer_ids(self) -> dict[str, int]:
        """Layer of each parameter, for layer-wise learning rates (BEiT).

        Embedding, positions and class token are in layer 0, block i in i + 1, final norm and head in depth + 1.
        """

        def layer(name: str) -> int:
            if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
                return 0
            return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.depth + 1

        return {name: layer(name) for name, _ in self.named_parameters()}

    def _embed(self, clip: Tensor) -> Tensor:
        return self.pos_drop(self.add_positions(self.patch_embed(clip)))  # (B,[1+]N,D)

    def forward_tokens(self, clip: Tensor) -> Tensor:
        """Tokens after the last block, without class token and norm: clip (B,3,T,H,W) -> (B,N,D), in (t,h,w) order."""
        return self.without_class_token(self.blocks(self._embed(clip)))

    def final_norm(self, x: Tensor) -> Tensor:
        """LayerNorm in front of the head: (...,D) -> (...,D)."""
        return (self.norm if self.fc_norm is None else self.fc_norm)(x)

    def _token_norm(self, x: Tensor) -> Tensor:
        return x if self.mean_pooling else self.final_norm(x)  # (B,[1+]N,D)

    def forward_features(self, clip: Tensor) -> Tensor:
        """All tokens: clip (B,3,T,H,W) -> (B,[1+]N,D), in (t,h,w) order; not yet normalised where their mean is."""
        return self._token_norm(self.blocks(self._embed(clip)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B,[1+]N,D) -> logits (B,classes), or the head's input, (B,D) or with slot pooling (B,T'*D)."""
        if self.mean_pooling:
            x = self.final_norm(self.without_class_token(x).unflatten(1, (self.slots, -1)).mean(2))  # (B,T' or 1,D)
        x = x[:, : self.slots].flatten(1)  # (B,D) or (B,T'*D)
        return x if pre_logits else self.head(self.fc_drop(x))

    def forward_pooled(self, clip: Tensor) -> Tensor:
        """Pooled and normalised input of the head: clip (B,3,T,H,W) -> (B,D), with slot pooling (B,T'*D)."""
        return self.forward_head(self.forward_features(clip), pre_logits=True)

    def forward(self, clip: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(clip))  # (B,classes)

    def forward_intermediates(
        self, clip: Tensor, indices=None, *, norm=False, output_fmt="NCTHW", intermediates_only=False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's: `forward_features`, and the tokens after some blocks, (B,D,T',H',W') or with "NLC" (B,N,D).

        A list `indices` names blocks, an integer takes the last ones; `norm` treats them as `forward_features` does.
        """
        if output_fmt not in ("NCTHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt}: it is NCTHW or NLC")
        taken, _ = feature_take_indices(self.depth, indices)
        x, found = self._embed(clip), []
        for number, block in enumerate(self.blocks):
            x = block(x)  # (B,[1+]N,D)
            if number in taken:
                found.append(self.without_class_token(self._token_norm(x) if norm else x))
        if output_fmt == "NCTHW":
            found = [tokens.transpose(1, 2).unflatten(2, self.window) for tokens in found]
        return found if intermediates_only else (self._token_norm(x), found)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new head, or none for 0 classes; `global_pool` "avg" or "token" changes what it classifies."""
        if global_pool not in (None, "avg", "token"):
            raise ValueError(f"global_pool {global_pool}: it is avg or token")
        if global_pool:
            self.mean_pooling, self.slots = global_pool == "avg", 1
            self._place_norm(self.norm if self.fc_norm is None else self.fc_norm)
        place = {"device": self.patch_embed.proj.weight.device}
        self.head = nn.Linear(self.dim * self.slots, num_classes, **place) if num_classes else nn.Identity()


def create_classifier(
    name: str, *, num_frames: int = 16, input_size: int | None = None, tubelet: int = TUBELET, **settings
) -> VisionTransformer:
    """Builds a model of `CLASSIFIERS`.

    Args:
        input_size: side of the clip in pixels; by default the one in the name.
        settings: `num_classes` and others of `VisionTransformer`; None means the family's or the default.

    Raises:
        SettingError: unknown name, or frames or pixels that do not divide into tokens.
    """
    size, patch, img = parse_model_name(name, CLASSIFIERS)
    window = token_grid(num_frames, input_size or img, patch, tubelet)
    settings = CLASSIFIERS[name].settings | {k: v for k, v in settings.items() if v is not None}
    return VisionTransformer(size=size, patch=patch, window=window, tubelet=tubelet, **settings)
