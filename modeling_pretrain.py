"""The pre-training model of AdaMAE and VideoMAE: encoder, masking and a light decoder.

The two differ only in who chooses the visible tokens: AdaMAE's sampling network, whose parameters live in
the encoder as in the published code, or a fixed random rule. Parameter names are those of the published
checkpoints.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from masking_generator import MaskingGenerator, Window, sampler_network, split_tokens
from modeling_blocks import POSITIONS, TUBELET, Blocks, TubeletEmbed
from modeling_finetune import Size, parse_model_name, token_grid

PRETRAIN_MODELS = {
    "pretrain_videomae_tiny_patch8_64",
    "pretrain_videomae_small_patch16_224",
    "pretrain_mae_small_patch16_224",  # AdaMAE's name of the small model
    "pretrain_videomae_base_patch16_224",
    "pretrain_videomae_large_patch16_224",
    "pretrain_videomae_huge_patch16_224",
}


class PretrainOutput(NamedTuple):
    """What one forward pass tells: the prediction and which tokens it is about."""

    prediction: Tensor  # (B,Nm,tubelet*p*p*3), in `masked` order
    visible: Tensor  # (B,Nv) int64, ascending
    masked: Tensor  # (B,Nm) int64, ascending
    log_probs: Tensor | None  # (B,N) float32 log P of the adaptive sampler, else None


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The rows of `x` (B,N,D), or of a table (N,D), at `index` (B,n): (B,n,D)."""
    if x.ndim == 2:
        return x[index]
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


class PretrainEncoder(nn.Module):
    """ViT over the visible tokens, and the sampling network that looks at all of them.

    Args:
        sampler: keyword arguments of `sampler_network`, or None for a model without one (VideoMAE).
        sampler_options: keyword arguments of `log_probs`.
    """

    def __init__(
        self,
        *,
        size: Size,
        patch: int,
        window: Window,
        sampler: dict | None,
        sampler_options: dict | None = None,
        pos_embed: str = "sinusoid_1d",
        **block_settings,
    ):
        super().__init__()
        self.patch_embed = TubeletEmbed(patch=patch, dim=size.dim)
        self.register_buffer("positions", POSITIONS[pos_embed](window, size.dim), persistent=False)
        self.blocks = Blocks(dim=size.dim, depth=size.depth, heads=size.heads, **block_settings)
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        self.sampler_options = sampler_options or {}
        self.get_token_probs = None
        if sampler is not None:
            self.pos_embed_probs = nn.Parameter(torch.zeros(1, len(self.positions), size.dim))
            self.get_token_probs = sampler_network(dim=size.dim, **sampler)

    def log_probs(
        self,
        tokens: Tensor,
        *,
        amp: bool = False,
        temperature: float = 1.0,
        positions: bool = False,
        detach: bool = False,
    ) -> Tensor:
        """log P over all tokens: (B,N,D) -> (B,N) float32; uniform where there is no sampler.

        The defaults are the published code's, in float32 even under autocast.

        Args:
            amp: run the network in autocast's type.
            temperature: divides the logits before the softmax.
            positions: give the network position-encoded tokens, as the paper writes.
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
        x = gather_tokens(tokens, visible) + gather_tokens(self.positions, visible)  # (B,Nv,D)
        return self.norm(self.blocks(x))


class PretrainDecoder(nn.Module):
    """Transformer over visible features followed by mask tokens; predicts the pixels of the masked ones."""

    def __init__(self, *, dim: int, depth: int, heads: int, patch_pixels: int, **block_settings):
        super().__init__()
        self.blocks = Blocks(dim=dim, depth=depth, heads=heads, **block_settings)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, patch_pixels)

    def forward(self, x: Tensor, num_masked: int) -> Tensor:
        return self.head(self.norm(self.blocks(x)[:, -num_masked:]))  # (B,Nm,P)


class PretrainVisionTransformer(nn.Module):
    """AdaMAE (mask_type "adaptive") or VideoMAE (any other rule), AdaMAE section 3.

    Args:
        size: widths, depths and heads; `decoder_depth` blocks in the decoder.
        patch, window: pixels per side of a token, and the grid of tokens (T', H', W').
        mask_type, mask_ratio: as in `MaskingGenerator`.
        sampler, sampler_options: keyword arguments of `sampler_network` and of `PretrainEncoder.log_probs`,
            used when the masking is adaptive.
        pos_embed: "sinusoid_1d" over the flattened index (published code) or "sinusoid_3d" (paper).
        attn_init: "xavier" (published) or "identity": keys start equal to queries, so that each token attends
            to tokens like itself from the first step.
        drop_path: stochastic depth of encoder and decoder.
        checkpoint_activations: recompute activations in the backward pass.
    """

    def __init__(
        self,
        *,
        size: Size,
        patch: int,
        window: Window,
        mask_type: str = "adaptive",
        mask_ratio: float = 0.95,
        decoder_depth: int = 4,
        sampler: dict | None = None,
        sampler_options: dict | None = None,
        pos_embed: str = "sinusoid_1d",
        attn_init: str = "xavier",
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.patch, self.window = patch, window
        self.masking = MaskingGenerator(mask_type=mask_type, mask_ratio=mask_ratio, window=window)
        blocks = {"drop_path": drop_path, "checkpoint_activations": checkpoint_activations}
        self.encoder = PretrainEncoder(
            size=size,
            patch=patch,
            window=window,
            sampler=(sampler or {}) if self.masking.adaptive else None,
            sampler_options=sampler_options,
            pos_embed=pos_embed,
            **blocks,
        )
        self.encoder_to_decoder = nn.Linear(size.dim, size.decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_dim))
        self.register_buffer("positions", POSITIONS[pos_embed](window, size.decoder_dim), persistent=False)
        self.decoder = PretrainDecoder(
            dim=size.decoder_dim,
            depth=decoder_depth,
            heads=size.decoder_heads,
            patch_pixels=TUBELET * patch * patch * 3,
            **blocks,
        )
        self._initialise(attn_init)

    def _initialise(self, attn_init: str) -> None:
        for part in (self.encoder, self.decoder):
            for module in part.modules():
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
        elif attn_init != "xavier":
            raise ValueError(f"--attn_init {attn_init}: no such start; choose xavier or identity")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay although they are not one-dimensional."""
        return {"pos_embed", "cls_token", "mask_token"}

    def sampler_parameters(self) -> list[nn.Parameter]:
        """The parameters that only the sampling loss trains; an empty list for a model without a sampler."""
        network = self.encoder.get_token_probs
        return [] if network is None else [self.encoder.pos_embed_probs, *network.parameters()]

    def forward(
        self, clip: Tensor, visible: Tensor | None = None, uniform: Tensor | None = None
    ) -> PretrainOutput:
        """Masks, encodes and reconstructs a normalised clip (B,3,T,H,W).

        Args:
            visible: indices (B,Nv) to see instead of drawing them; any number, distinct within a sample.
            uniform: random numbers (B,num_draws) in [0,1) to draw them from, as `MaskingGenerator` takes.
        """
        tokens = self.encoder.patch_embed(clip)  # (B,N,D)
        log_probs = self.encoder.log_probs(tokens, **self.encoder.sampler_options)  # (B,N)
        if visible is None:
            visible, masked = self.masking(log_probs, uniform)  # (B,Nv), (B,Nm)
        else:
            visible, masked = split_tokens(visible, tokens.shape[1])

        features = self.encoder_to_decoder(self.encoder(tokens, visible))  # (B,Nv,D')
        seen = features + gather_tokens(self.positions, visible)  # (B,Nv,D')
        hidden = self.mask_token + gather_tokens(self.positions, masked)  # (B,Nm,D')
        prediction = self.decoder(torch.cat([seen, hidden], dim=1), masked.shape[1])  # (B,Nm,P)
        return PretrainOutput(prediction, visible, masked, log_probs if self.masking.adaptive else None)


def create_pretrain_model(
    name: str, *, num_frames: int = 16, input_size: int | None = None, **settings
) -> PretrainVisionTransformer:
    """Builds a model of `PRETRAIN_MODELS`; `settings` go to `PretrainVisionTransformer`.

    `input_size` in pixels overrides the side in the name. Raises ValueError for an unknown name and for
    frames, pixels or ratios that do not divide into tokens.
    """
    size, patch, img = parse_model_name(name, PRETRAIN_MODELS)
    window = token_grid(num_frames, input_size or img, patch)
    return PretrainVisionTransformer(size=size, patch=patch, window=window, **settings)
