"""The pre-training model of AdaMAE and VideoMAE: encoder, masking and a light decoder.

The two differ only in what chooses the visible tokens: AdaMAE's sampling network, whose parameters belong to the
encoder as in the published code, or a fixed random rule. Parameter names are those of the published checkpoints.
"""

import torch
from torch import Tensor, nn

from masking_generator import MaskingGenerator, Window, sampler_network, split_tokens
from modeling_blocks import POSITIONS, Blocks, TubeletEmbed, gather_tokens
from modeling_finetune import Size, parse_model_name, token_grid
from targets import PretrainOutput, create_target
from utils import SettingError

PRETRAIN_MODELS = {
    "pretrain_videomae_tiny_patch8_64",
    "pretrain_videomae_small_patch16_224",
    "pretrain_mae_small_patch16_224",  # AdaMAE's name of the small model
    "pretrain_videomae_base_patch16_224",
    "pretrain_videomae_large_patch16_224",
    "pretrain_videomae_huge_patch16_224",
}


class PretrainEncoder(nn.Module):
    """ViT over the visible tokens, and the sampling network, which sees all tokens.

    Args:
        sampler: keyword arguments of `sampler_network`, or None for a model without one (VideoMAE).
        block_settings: keyword arguments of `Blocks`.
    """

    def __init__(
        self, *, size: Size, patch: int, window: Window, sampler: dict | None, pos_embed: str, **block_settings
    ):
        super().__init__()
        self.patch_embed = TubeletEmbed(patch=patch, dim=size.dim)
        self.register_buffer("positions", POSITIONS[pos_embed](window, size.dim), persistent=False)
        self.blocks = Blocks(dim=size.dim, depth=size.depth, heads=size.heads, **block_settings)
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        self.get_token_probs = None
        if sampler is not None:
            self.pos_embed_probs = nn.Parameter(torch.zeros(1, len(self.positions), size.dim))
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
            tokens: (B,N,D), before positions are added.
            amp: run the network in autocast's type; else in float32 even under autocast.
            temperature: divides the logits before the softmax.
            positions: add the encoder's positions to the tokens, as in the paper.
            detach: keep the sampling loss from the tubelet embedding.
        """
        if self.get_token_probs is None:
            return tokens.new_zeros(tokens.shape[:2], dtype=torch.float32).log_softmax(1)
        x = (tokens.detach() if detach else tokens).float() + self.pos_embed_probs  # (B,N,D)
        x = x + self.positions if positions else x
        mixed = amp and torch.is_autocast_enabled(tokens.device.type)
        with torch.autocast(tokens.device.type, enabled=mixed):
            logits = self.get_token_probs(x).squeeze(2)  # (B,N)
        return (logits.float().nan_to_num() / temperature).log_softmax(1)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Features (B,Nv,D) of the tokens (B,N,D) at the indices (B,Nv)."""
        x = gather_tokens(tokens, visible) + gather_tokens(self.positions, visible)  # (B,Nv,D)
        return self.norm(self.blocks(x))


class PretrainDecoder(nn.Module):
    """Transformer over visible features followed by mask tokens; predicts the target of the masked ones."""

    def __init__(self, *, dim: int, depth: int, heads: int, target_width: int, **block_settings):
        super().__init__()
        self.blocks = Blocks(dim=dim, depth=depth, heads=heads, **block_settings)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, target_width)

    def forward(self, x: Tensor, num_masked: int) -> Tensor:
        return self.head(self.norm(self.blocks(x)[:, -num_masked:]))  # (B,Nm,width)


class PretrainVisionTransformer(nn.Module):
    """AdaMAE (mask_type "adaptive") or VideoMAE (any other rule), AdaMAE section 3.

    Args:
        patch: pixels per side of a token.
        window: tokens in (time, height, width).
        target_width: numbers that the decoder predicts for a token, `width` of a target.
        mask_type, mask_ratio: as in `MaskingGenerator`.
        decoder_depth: blocks in the decoder.
        sampler: keyword arguments of `sampler_network`, used when the masking is adaptive.
        sampler_options: keyword arguments of `PretrainEncoder.log_probs`.
        pos_embed: "sinusoid_1d" over the flattened index (published code) or "sinusoid_3d" (paper).
        attn_init: "xavier" (published) or "identity": keys start equal to queries, so that each token attends to
            tokens like itself from the first step.
        block_settings: keyword arguments of `Blocks` for encoder and decoder.

    Raises:
        SettingError: `attn_init` is neither, or as `MaskingGenerator` and `sampler_network`.
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
        decoder_depth: int = 4,
        sampler: dict | None = None,
        sampler_options: dict | None = None,
        pos_embed: str = "sinusoid_1d",
        attn_init: str = "xavier",
        **block_settings,
    ):
        super().__init__()
        self.patch, self.window, self.sampler_options = patch, window, sampler_options or {}
        self.masking = MaskingGenerator(mask_type=mask_type, mask_ratio=mask_ratio, window=window)
        sampler = (sampler or {}) if self.masking.adaptive else None
        self.encoder = PretrainEncoder(
            size=size, patch=patch, window=window, sampler=sampler, pos_embed=pos_embed, **block_settings
        )
        dim, heads = size.decoder_dim, size.decoder_heads
        self.encoder_to_decoder = nn.Linear(size.dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", POSITIONS[pos_embed](window, dim), persistent=False)
        self.decoder = PretrainDecoder(
            dim=dim, depth=decoder_depth, heads=heads, target_width=target_width, **block_settings
        )
        self._initialise(attn_init)

    def _initialise(self, attn_init: str) -> None:
        if attn_init not in ("xavier", "identity"):
            raise SettingError(f"--attn_init {attn_init}: no such initialisation; choose xavier or identity")
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if attn_init == "identity":
            for name, weight in self.named_parameters():
                if name.endswith("attn.qkv.weight"):
                    query, key, _ = weight.data.chunk(3)
                    key.copy_(query)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not one-dimensional and yet get no weight decay."""
        return {"pos_embed", "cls_token", "mask_token"}

    def sampler_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the sampling loss trains; none for a model without a sampler."""
        network = self.encoder.get_token_probs
        return [] if network is None else [self.encoder.pos_embed_probs, *network.parameters()]

    def forward(self, clip: Tensor, visible: Tensor | None = None, uniform: Tensor | None = None) -> PretrainOutput:
        """Masks, encodes and reconstructs normalised clips.

        Args:
            clip: (B,3,T,H,W).
            visible: indices (B,Nv) of the visible tokens, distinct within a clip; None draws them.
            uniform: random numbers (B,num_draws) in [0,1) to draw them from, as in `MaskingGenerator`.
        """
        tokens = self.encoder.patch_embed(clip)  # (B,N,D)
        log_probs = self.encoder.log_probs(tokens, **self.sampler_options)  # (B,N)
        if visible is None:
            visible, masked = self.masking(log_probs, uniform)  # (B,Nv), (B,Nm)
        else:
            visible, masked = split_tokens(visible, tokens.shape[1])

        features = self.encoder_to_decoder(self.encoder(tokens, visible))  # (B,Nv,D')
        seen = features + gather_tokens(self.positions, visible)  # (B,Nv,D')
        hidden = self.mask_token + gather_tokens(self.positions, masked)  # (B,Nm,D')
        prediction = self.decoder(torch.cat([seen, hidden], dim=1), masked.shape[1])  # (B,Nm,width)
        return PretrainOutput(prediction, visible, masked, log_probs if self.masking.adaptive else None)


def create_pretrain_model(
    name: str, *, num_frames: int = 16, input_size: int | None = None, target: str = "pixels", **settings
) -> PretrainVisionTransformer:
    """Builds a model of `PRETRAIN_MODELS` for a target of `TARGETS`.

    Args:
        input_size: side of the clip in pixels, instead of the one in the name.
        settings: keyword arguments of `PretrainVisionTransformer`.

    Raises:
        SettingError: an unknown name or target; frames, pixels or a ratio that do not divide into tokens.
    """
    size, patch, img = parse_model_name(name, PRETRAIN_MODELS)
    window = token_grid(num_frames, input_size or img, patch)
    width = create_target(target, patch=patch).width
    return PretrainVisionTransformer(size=size, patch=patch, window=window, target_width=width, **settings)
