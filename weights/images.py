"""The weights of an image ViT under timm's names, as those of a video classifier.

Such are timm's own models, supervised or not, and MAE's official files.
"""

from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masking_generator import Window
from modeling_blocks import SeparateAttention
from modeling_finetune import MAE_ST, SIZES, VisionTransformer
from runs.checkpoints import CheckpointError
from weights.classifier import load_classifier_weights
from weights.names import IMAGE_VIT, Weights, plain_name

TIMM = "timm:"  # in front of a model's name, where weights come from the hub
# How the patch embedding of an image (D,3,p,p) becomes that of t frames (D,3,t,p,p).
INFLATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda kernel, t: kernel[:, :, None].expand(-1, -1, t, -1, -1) / t,  # I3D's
    "center": lambda kernel, t: F.pad(kernel[:, :, None], (0, 0, 0, 0, t // 2, t - 1 - t // 2)),  # ViViT's
}
KEPT = {"patch_embed", "blocks", "norm", "fc_norm", "cls_token", "pos_embed"}
LEFT = ("head", "pre_logits", "mask_token", "decoder_")  # what comes after the features


def load_timm(name: str) -> Weights:
    """Loads pretrained weights of timm through the hub.

    Args:
        name: `TIMM` and a model of timm, e.g. "timm:vit_base_patch16_224.mae".

    Raises:
        CheckpointError: the hub can't be reached, or timm has no such model.
    """
    try:
        tensors = timm.create_model(name.removeprefix(TIMM), pretrained=True).state_dict()
    except Exception as error:  # the hub's libraries raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name} can't be loaded ({reason}): check the name, or give a file from where the hub can be reached"
        ) from error
    return Weights(path=Path(name), tensors=tensors, settings={}, flags={}, ignored=[])


def inflate(found: Weights, model: VisionTransformer, how: str) -> Weights:
    """Turns the weights of an image ViT into those of a video classifier; others are returned as they are.

    A clip that repeats an image gets the image's tokens in each time slot. The head is left out. The image's table of
    positions is used where the model's is learned: in every time slot, beside zeros in a table for time.

    Args:
        how: one of `INFLATIONS`.

    Raises:
        CheckpointError: the image ViT has parts that no model here has, or no square grid of positions.
    """
    if not found.kind.startswith(IMAGE_VIT):
        return found
    fixed = () if model.pos_kind in ("learnable", "separable") else ("pos_embed",)
    unused = (*LEFT, *fixed, *(("cls_token",) if model.cls_token is None else ()))
    used = {name: value for name, value in found.plain.items() if not name.startswith(unused)}
    if unknown := sorted({name.split(".")[0] for name in used} - KEPT):
        raise CheckpointError(f"{found.path}: {found.kind} checkpoint with {unknown[0]}, which no model here has")
    ours = {}
    for name, value in used.items():
        if name == "patch_embed.proj.weight":
            ours[name] = INFLATIONS[how](value, model.patch_embed.proj.kernel_size[0])  # (D,3,t,p,p)
        elif ".attn.qkv." in name:
            ours |= _attention(name, value, model)
        elif name == "pos_embed":
            ours |= _positions(found, value, model)
        else:
            ours[name] = value
    ignored = [name for name in found.tensors if plain_name(name) not in used]
    return replace(found, tensors=ours, ignored=ignored, converted=f"{found.kind} (inflated: {how})")


class ImageEncoder(nn.Module):
    """An image ViT as a video encoder: clips (B,3,T,H,W) -> tokens (B,N,D), each time slot encoded as an image alone.

    A slot's tokens are those of the mean of its frames, without class token and final norm.

    Args:
        window: tokens of a clip (T',H',W'); the image's positions are resized to them.

    Raises:
        CheckpointError: as `inflate`, or its width and depth are those of no model here.
    """

    def __init__(self, found: Weights, *, window: Window):
        super().__init__()
        dim, depth, patch = shape_of(found)
        size = next((size for size in SIZES.values() if (size.dim, size.depth) == (dim, depth)), None)
        if size is None:
            raise CheckpointError(
                f"{found.path}: {found.kind} of {depth} blocks of width {dim}, which no model here has"
            )
        settings = MAE_ST.settings | {"class_token": "cls_token" in found.plain, "num_classes": 1}
        self.image = VisionTransformer(size=size, patch=patch, window=(1, *window[1:]), **settings)
        load_classifier_weights(self.image, inflate(found, self.image, "mean"), lambda text: None)
        self.window, self.dim, self.patch_embed = window, dim, self.image.patch_embed

    def forward_tokens(self, clip: Tensor) -> Tensor:
        slots = clip.unflatten(2, (self.window[0], -1)).transpose(1, 2)  # (B,T',3,t,H,W)
        tokens = self.image.forward_tokens(slots.flatten(0, 1))  # (B*T',H'W',D)
        return tokens.unflatten(0, (len(clip), -1)).flatten(1, 2)  # (B,N,D)


def shape_of(found: Weights) -> tuple[int, int, int]:
    """Width, number of blocks and patch size in pixels of an image ViT."""
    dim, _, patch, _ = found.plain["patch_embed.proj.weight"].shape
    return dim, 1 + max(int(name.split(".")[1]) for name in found.plain if name.startswith("blocks.")), patch


def _attention(name: str, value: Tensor, model: VisionTransformer) -> dict[str, Tensor]:
    """Splits `blocks.<i>.attn.qkv.weight` (3D,D) or `.bias` (3D,) as the model's attention needs it."""
    block, _, kind = name.rpartition("qkv.")
    query, key, value_ = value.chunk(3)
    if isinstance(model.blocks[0].attn, SeparateAttention):
        return {f"{block}{part}.{kind}": x for part, x in zip("qkv", (query, key, value_), strict=True)}
    if kind == "weight":
        return {name: value}
    # Without the key's bias b attention is exactly the same: q (k + b) = q k + q b, and softmax over the keys cancels
    # q b, which is one number for all keys of a query.
    return {f"{block}q_bias": query, f"{block}v_bias": value_}


def _positions(found: Weights, table: Tensor, model: VisionTransformer) -> dict[str, Tensor]:
    """The model's learned tables from that of an image (1,[1+]H'W',D), whose first row is the class token's."""
    rows = table.shape[1] - isqrt(table.shape[1]) ** 2
    if rows > 1:
        raise CheckpointError(f"{found.path}: pos_embed {tuple(table.shape)} is no square grid of positions")
    space, slots = table[:, rows:], model.window[0]  # (1,H'W',D)
    nothing = torch.zeros_like(space[:, :1])  # (1,1,D)
    token = {} if model.cls_token is None else {"pos_embed_class": table[:, :1] if rows else nothing}
    if model.pos_kind == "separable":
        return {"pos_embed_spatial": space, "pos_embed_temporal": nothing.repeat(1, slots, 1), **token}
    return {"pos_embed": torch.cat([*token.values(), space.repeat(1, slots, 1)], dim=1)}  # (1,[1+]T'H'W',D)
