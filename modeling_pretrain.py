"""The pre-training model of AdaMAE, VideoMAE and MAE-ST: encoder, masking and a light decoder.

The first two differ only in what chooses the visible tokens: AdaMAE's sampling network, which belongs to the encoder as
in the published code, or a fixed random rule. MAE-ST differs in settings. Weights have the published names.
"""

import math
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from masking_generator import MaskingGenerator, Window, split_tokens
from modeling_blocks import Blocks, TubeletEmbed, WithPositions, gather_tokens, name_weights
from modeling_finetune import Size, parse_model_name, token_grid
from sampling import sampler_network
from targets import PretrainOutput, create_target
from utils import SettingError


@dataclass(frozen=True, kw_only=True)
class PretrainFamily:
    """What the pre-training models of one paper have in common."""

    settings: dict = field(default_factory=dict)  # of `PretrainVisionTransformer`
    decoder: tuple[int, int] | None = None  # width and heads, instead of the size's
    target: dict = field(default_factory=dict)  # settings of the target "pixels"
    statistics: str = "imagenet"  # of the input's colours, a key of `augment.COLOUR_STATISTICS`
    sampling: str = "pretrain"  # of frames, a key of `datasets.FRAME_RULES`
    crop: str = "multi_scale"  # a key of `clips.transforms.CROPS`
    schedule: str = "steps"  # see `optim.cosine_schedule`


VIDEOMAE = PretrainFamily(settings={"pos_embed": "sinusoid_1d", "class_token": False})  # AdaMAE's models are the same
MAE_ST = PretrainFamily(
    settings={"pos_embed": "separable", "class_token": True, "separate_qkv": True, "like_mae_st": True},
    decoder=(512, 16),
    target={"joint": True, "pred_t_dim": 8},
    statistics="mae_st",
    sampling="mae_st",
    crop="mae_st",
    schedule="epochs",
)
PRETRAIN_MODELS = {
    "pretrain_videomae_tiny_patch8_64": VIDEOMAE,
    "pretrain_videomae_small_patch16_224": VIDEOMAE,
    "pretrain_mae_small_patch16_224": VIDEOMAE,  # AdaMAE's name of the small model
    "pretrain_videomae_base_patch16_224": VIDEOMAE,
    "pretrain_videomae_large_patch16_224": VIDEOMAE,
    "pretrain_videomae_huge_patch16_224": VIDEOMAE,
    "pretrain_mae_st_tiny_patch8_64": replace(MAE_ST, decoder=None),
    "pretrain_mae_st_base_patch16_224": MAE_ST,
    "pretrain_mae_st_large_patch16_224": MAE_ST,
    "pretrain_mae_st_huge_patch14_224": MAE_ST,
}


class PretrainEncoder(WithPositions):
    """ViT over the visible tokens, and the sampling network, which sees all tokens.

    Args:
        sampler: keyword arguments of `sampler_network`, or None for a model without one (VideoMAE, MAE-ST).
        positions: keyword arguments of `WithPositions.create_positions`, but for the width.
        dense: encode all tokens, the masked ones as a learned vector (MAE-ST's "dense encoder with [M] tokens").
        block_settings: keyword arguments of `Blocks`.
    """

    def __init__(self, *, size: Size, patch: int, positions: dict, sampler: dict | None, dense: bool, **block_settings):
        super().__init__()
        self.patch_embed = TubeletEmbed(patch=patch, dim=size.dim)
        self.create_positions(dim=size.dim, **positions)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.dim)) if dense else None
        self.blocks = Blocks(dim=size.dim, depth=size.depth, heads=size.heads, **block_settings)
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        self.get_token_probs = None
        if sampler is not None:
            self.pos_embed_probs = nn.Parameter(torch.zeros(1, math.prod(positions["window"]), size.dim))
            self.get_token_probs = sampler_network(dim=size.dim, **sampler)

    def log_probs(
        self,
        tokens: Tensor,
        *,
        amp: bool = True,
        temperature: float = 1.0,
        positions: bool = False,
        detach: bool = False,
    ) -> Tensor:
        """log P over all tokens (AdaMAE section 3.1), (B,N) float32; uniform without a sampler.

        The defaults are the published code's. The softmax is in float32, whatever the network runs in.

        Args:
            tokens: (B,N,D), without positions.
            amp: run the network in autocast's type; else in float32 even under autocast.
            temperature: divides the logits before the softmax.
            positions: add the encoder's positions to the tokens, as in the paper.
            detach: keep the sampling loss from the tubelet embedding and the encoder's positions.
        """
        if self.get_token_probs is None:
            return tokens.new_zeros(tokens.shape[:2], dtype=torch.float32).log_softmax(1)
        x = (tokens.detach() if detach else tokens).float() + self.pos_embed_probs  # (B,N,D)
        if positions:
            table = self.without_class_token(self.position_table())  # (1,N,D)
            x = x + (table.detach() if detach else table)
        mixed = amp and torch.is_autocast_enabled(tokens.device.type)
        with torch.autocast(tokens.device.type, enabled=mixed):
            logits = self.get_token_probs(x).squeeze(2)  # (B,N)
        return (logits.float().nan_to_num() / temperature).log_softmax(1)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Features of the tokens (B,N,D) at the indices (B,Nv): (B,Nv,D); of a dense encoder those of all, (B,N,D).

        The latter stand in the order of visible and masked indices, (B,Nv) and (B,Nm).
        """
        x = gather_tokens(tokens, visible)  # (B,Nv,D)
        if self.mask_token is not None:
            x = torch.cat([x, self.mask_token.expand(*masked.shape, -1)], dim=1)  # (B,N,D)
            visible = torch.cat([visible, masked], dim=1)
        return self.without_class_token(self.norm(self.blocks(self.add_positions(x, visible))))


class PretrainDecoder(WithPositions):
    """Transformer over visible features followed by mask tokens; predicts the target of the masked ones.

    MAE-ST's puts the tokens back into their order first, which changes nothing: only positions tell them apart.
    """

    def __init__(self, *, dim: int, depth: int, heads: int, target_width: int, positions: dict, **block_settings):
        super().__init__()
        self.create_positions(dim=dim, **positions)
        self.blocks = Blocks(dim=dim, depth=depth, heads=heads, **block_settings)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, target_width)

    def forward(self, x: Tensor, index: Tensor, num_masked: int) -> Tensor:
        """Tokens (B,N,D') that stand at `index` (B,N), the masked ones last -> their predictions (B,Nm,width)."""
        return self.head(self.norm(self.blocks(self.add_positions(x, index))[:, -num_masked:]))


class PretrainVisionTransformer(nn.Module):
    """AdaMAE (mask_type "adaptive"), VideoMAE or MAE-ST (any other rule); AdaMAE section 3, MAE-ST section 3.

    Args:
        patch: pixels per side of a token.
        window: tokens in (time, height, width).
        target_width: numbers that the decoder predicts for a token, `width` of a target.
        mask_type, mask_ratio, decoder_mask_type, decoder_mask_ratio: as in `MaskingGenerator`.
        decoder_depth: blocks in the decoder.
        sampler: keyword arguments of `sampler_network`, used when the masking is adaptive.
        sampler_options: keyword arguments of `PretrainEncoder.log_probs`.
        pos_embed: of encoder and decoder, a kind of `WithPositions`: "sinusoid_1d" in the published code of AdaMAE and
            VideoMAE, "sinusoid_3d" in the paper, "separable" in MAE-ST.
        class_token, dense_encoder: whether encoder and decoder have a class token; see `PretrainEncoder`.
        like_mae_st: MAE-ST's bias between encoder and decoder, its initial values and weight decay of all tables and
            tokens, and its names of weights.
        attn_init: "xavier" (published) or "identity": keys start equal to queries, so that each token attends to
            tokens like itself from the first step.
        block_settings: keyword arguments of `Blocks` for encoder and decoder.

    Raises:
        SettingError: `attn_init` is neither, or as `MaskingGenerator`, `WithPositions` and `sampler_network`.
    """

    def __init__(
        self,
        *,
        size: Size,
        patch: int,
        window: Window,
        target_width: int,
        mask_type: str = "adaptive",
        mask_ratio: float = 0.95,
        decoder_mask_type: str = "random",
        decoder_mask_ratio: float = 0.0,
        decoder_depth: int = 4,
        sampler: dict | None = None,
        sampler_options: dict | None = None,
        pos_embed: str = "sinusoid_1d",
        class_token: bool = False,
        dense_encoder: bool = False,
        like_mae_st: bool = False,
        attn_init: str = "xavier",
        **block_settings,
    ):
        super().__init__()
        self.patch, self.window, self.pos_kind, self.sampler_options = patch, window, pos_embed, sampler_options or {}
        if dense_encoder and decoder_mask_ratio:
            raise SettingError("--dense_encoder encodes every token, so it can't go with --decoder_mask_ratio")
        self.like_mae_st, self.dense_encoder = like_mae_st, dense_encoder
        decoded = {"decoder_mask_type": decoder_mask_type, "decoder_mask_ratio": decoder_mask_ratio}
        self.masking = MaskingGenerator(mask_type=mask_type, mask_ratio=mask_ratio, window=window, **decoded)
        sampler = (sampler or {}) if self.masking.adaptive else None
        shared = {"positions": {"kind": pos_embed, "window": window, "class_token": class_token}, **block_settings}
        self.encoder = PretrainEncoder(size=size, patch=patch, sampler=sampler, dense=dense_encoder, **shared)
        dim, heads = size.decoder_dim, size.decoder_heads
        self.encoder_to_decoder = nn.Linear(size.dim, dim, bias=like_mae_st)
        self.mask_token = None if dense_encoder else nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder = PretrainDecoder(dim=dim, depth=decoder_depth, heads=heads, target_width=target_width, **shared)
        self._initialise(attn_init)
        if like_mae_st:
            name_weights(self, MAE_ST_NAMES)

    def _initialise(self, attn_init: str) -> None:
        if attn_init not in ("xavier", "identity"):
            raise SettingError(f"--attn_init {attn_init}: no such initialisation; choose xavier or identity")
        for module in self.modules() if self.like_mae_st else [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            table_or_token = name.rpartition(".")[2].startswith(("pos_embed", "cls_token"))
            if name.endswith("mask_token"):
                cut = 2.0 if self.like_mae_st else 0.02
                nn.init.trunc_normal_(p, std=0.02, a=-cut, b=cut)
            elif table_or_token and name not in UNTOUCHED and (self.like_mae_st or not name.endswith("pos_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules() if attn_init == "identity" else []:
            if hasattr(module, "tie_keys"):
                module.tie_keys()
        if self.like_mae_st:
            nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.data.flatten(1))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that get no weight decay, besides one-dimensional ones."""
        tables = re.compile(r"(.*\.)?(cls_token|mask_token|pos_embed(_spatial|_temporal|_class)?)")
        return {name for name, _ in self.named_parameters() if not self.like_mae_st and tables.fullmatch(name)}

    def sampler_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the sampling loss trains; none for a model without a sampler."""
        network = self.encoder.get_token_probs
        return [] if network is None else [self.encoder.pos_embed_probs, *network.parameters()]

    def forward(self, clip: Tensor, visible: Tensor | None = None, uniform: Tensor | None = None) -> PretrainOutput:
        """Masks, encodes and reconstructs normalised clips; in evaluation mode all masked tokens of them.

        Args:
            clip: (B,3,T,H,W).
            visible: indices (B,Nv) of the visible tokens, distinct within a clip; None draws them.
            uniform: random numbers (B,num_draws) in [0,1) to draw them from, as in `MaskingGenerator`.
        """
        tokens = self.encoder.patch_embed(clip)  # (B,N,D)
        log_probs = self.encoder.log_probs(tokens, **self.sampler_options)  # (B,N)
        drawn = self.masking.draw(log_probs, uniform) if visible is None else visible  # (B,Nv)
        visible, masked = split_tokens(drawn, tokens.shape[1])  # (B,Nv), (B,Nm)
        masked = self.masking.decoded(masked, uniform) if self.training else masked

        x = self.encoder_to_decoder(self.encoder(tokens, visible, masked))  # (B,Nv,D'), dense (B,N,D')
        if not self.dense_encoder:
            x = torch.cat([x, self.mask_token.expand(*masked.shape, -1)], dim=1)  # (B,N,D')
        prediction = self.decoder(x, torch.cat([visible, masked], dim=1), masked.shape[1])  # (B,Nm,width)
        return PretrainOutput(prediction, visible, masked, log_probs if self.masking.adaptive else None, drawn)


UNTOUCHED = ("encoder.pos_embed_probs", "decoder.cls_token")  # stay 0, as published
MAE_ST_NAMES = (  # starts of our names of weights and of MAE-ST's
    ("encoder.mask_token", "encoder_mask_token"),  # of a dense encoder, which MAE-ST published no file of
    ("mask_token", "mask_token"),
    ("encoder_to_decoder.", "decoder_embed."),
    ("decoder.head.", "decoder_pred."),
    ("decoder.", "decoder_"),
    ("encoder.", ""),
)


def create_pretrain_model(
    name: str,
    *,
    num_frames: int = 16,
    input_size: int | None = None,
    target: str = "pixels",
    target_settings: dict | None = None,
    decoder_dim: int | None = None,
    **settings,
) -> PretrainVisionTransformer:
    """Builds a model of `PRETRAIN_MODELS` for a target of `TARGETS`.

    Args:
        input_size: side of the clip in pixels, instead of the one in the name.
        target_settings: further settings of the target.
        decoder_dim: width of the decoder; by default the family's or the size's.
        settings: keyword arguments of `PretrainVisionTransformer`; None means the family's or the default.

    Raises:
        SettingError: an unknown name or target; frames, pixels, a ratio or a width that do not divide.
    """
    size, patch, img = parse_model_name(name, PRETRAIN_MODELS)
    family = PRETRAIN_MODELS[name]
    width, heads = family.decoder or (size.decoder_dim, size.decoder_heads)
    size = size._replace(decoder_dim=decoder_dim or width, decoder_heads=heads)
    if size.decoder_dim % heads:
        raise SettingError(f"--decoder_dim {decoder_dim} must be a multiple of the decoder's {heads} heads")
    window = token_grid(num_frames, input_size or img, patch)
    width = create_target(target, patch=patch, num_frames=num_frames, **(target_settings or {})).width
    settings = family.settings | {k: v for k, v in settings.items() if v is not None}
    model = PretrainVisionTransformer(size=size, patch=patch, window=window, target_width=width, **settings)
    model.statistics = family.statistics
    return model
