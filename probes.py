"""Probes: a small head trained on the features of a frozen encoder; and models with or without one."""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from modeling_finetune import VisionTransformer, create_classifier

PROBES = ("linear", "attentive")


class Probe(nn.Module):
    """A frozen encoder and a trained head: clip (B,3,T,H,W) -> logits (B,classes).

    The encoder stays in evaluation mode and runs without a graph while the probe is trained. In the state dict
    its weights start with `encoder.`, as in a pre-training checkpoint; the trained layer is `head`.

    Args:
        encoder: the classifier to probe. It is modified: frozen, and its own head removed.
        pool: tokens (B,N,D) -> (B,D); None uses the classifier's own pooled features.
        batch_norm: standardise the features before the head, by a BatchNorm without parameters (MAE, appendix A.1).
        head_std: standard deviation of the head's initial weights.
    """

    def __init__(
        self, *, encoder: VisionTransformer, pool: nn.Module | None = None, batch_norm: bool = False, head_std: float
    ):
        super().__init__()
        self.window, self.patch, self.depth = encoder.window, encoder.patch, encoder.depth
        num_classes = encoder.head.out_features
        width = encoder.head.in_features if pool is None else encoder.dim  # T'*D with slot pooling
        encoder.head = nn.Identity()
        self.encoder, self.pool = encoder.requires_grad_(False), pool
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        self.encoder.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides the one-dimensional ones."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """Layer of each parameter, as in `VisionTransformer.layer_ids`; all trained ones are in the last."""
        frozen = {f"encoder.{name}": layer for name, layer in self.encoder.layer_ids().items()}
        return {name: frozen.get(name, self.depth + 1) for name, _ in self.named_parameters()}

    def forward_features(self, clip: Tensor) -> Tensor:
        """Input of the linear layer: clip (B,3,T,H,W) -> (B,D), with slot pooling (B,T'*D)."""
        with torch.no_grad():
            x = self.encoder.forward_features(clip) if self.pool is None else self.encoder.forward_tokens(clip)
        return self.norm(x if self.pool is None else self.pool(x))  # (B,D) or (B,T'*D)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.forward_features(clip))  # (B,classes)


def attentive_pool(*, dim: int, heads: int) -> nn.Sequential:
    """V-JEPA's attentive pooling, (B,N,D) -> (B,D): LayerNorm, cross-attention of a learned query, residual MLP."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    pool = nn.Sequential(norm(dim), AttentionPoolLatent(dim, num_heads=heads, norm_layer=norm))
    for module in pool.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return pool


def make_probe(model: VisionTransformer, *, kind: str, batch_norm: bool = False) -> Probe:
    """Makes a classifier with pre-trained weights into a probe of its encoder.

    Args:
        kind: "linear" for a linear layer on the model's pooled features (MAE, appendix A.1), "attentive" for
            one on the output of `attentive_pool` (V-JEPA).
        batch_norm: see `Probe`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in PROBES:
        raise ValueError(f"probe {kind}: no such kind; choose one of {', '.join(PROBES)}")
    if kind == "linear":
        return Probe(encoder=model, batch_norm=batch_norm, head_std=0.01)
    pool = attentive_pool(dim=model.dim, heads=model.heads)
    return Probe(encoder=model, pool=pool, batch_norm=batch_norm, head_std=0.02)


def build_classifier(
    settings: dict, prepare: Callable[[VisionTransformer], object] = lambda model: None
) -> VisionTransformer | Probe:
    """Builds a classifier, or a probe where the settings ask for one.

    Args:
        settings: arguments of `create_classifier`; under `probe`, where present, those of `make_probe`.
        prepare: called with the classifier before it becomes a probe, to load its weights.
    """
    model = create_classifier(**{name: value for name, value in settings.items() if name != "probe"})
    prepare(model)
    return make_probe(model, **settings["probe"]) if settings.get("probe") else model
