"""Probes: a small head trained on the features of a frozen encoder."""

from functools import partial

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from modeling_finetune import VisionTransformer

PROBES = ("linear", "attentive")


class Probe(nn.Module):
    """A frozen encoder and a trained head: clip (B,3,T,H,W) -> logits (B,classes).

    The encoder stays in evaluation mode and runs without a graph while the probe is trained. Its weights are
    under `encoder.` in the state dict, the last layer is `head`, as in a pre-training checkpoint followed by
    a classifier's head.

    Args:
        encoder: the classifier to probe. It is taken over: frozen, and its own head removed.
        pool: tokens (B,N,D) -> (B,D); None takes the classifier's own pooled features.
        batch_norm: standardise the features by a BatchNorm without parameters before the linear layer (MAE,
            appendix A.1).
        head_std: standard deviation of the head's initial weights.
    """

    def __init__(
        self,
        *,
        encoder: VisionTransformer,
        pool: nn.Module | None = None,
        batch_norm: bool = False,
        head_std: float,
    ):
        super().__init__()
        self.window, self.patch, self.depth = encoder.window, encoder.patch, encoder.depth
        num_classes = encoder.head.out_features
        width = encoder.head.in_features if pool is None else encoder.dim  # slot pooling has several means
        encoder.head = nn.Identity()
        self.encoder = encoder.requires_grad_(False)
        self.pool = pool
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
        """Names of parameters that take no weight decay although they are not one-dimensional."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """As `VisionTransformer.layer_ids`: everything that is trained is in the last layer."""
        frozen = {f"encoder.{name}": layer for name, layer in self.encoder.layer_ids().items()}
        return {name: frozen.get(name, self.depth + 1) for name, _ in self.named_parameters()}

    def forward_features(self, clip: Tensor) -> Tensor:
        """What the linear layer sees: (B,D), with slot pooling (B,T'*D)."""
        with torch.no_grad():
            x = self.encoder.forward_features(clip) if self.pool is None else self.encoder.forward_tokens(clip)
        return self.norm(x if self.pool is None else self.pool(x))

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.forward_features(clip))  # (B,classes)


def attentive_pool(*, dim: int, heads: int) -> nn.Sequential:
    """Tokens (B,N,D) -> (B,D): one cross-attention layer whose learned query looks at all tokens.

    As in V-JEPA's attentive probing, the tokens are normalised first, and an MLP with a residual connection
    follows the attention.
    """
    norm = partial(nn.LayerNorm, eps=1e-6)
    pool = nn.Sequential(norm(dim), AttentionPoolLatent(dim, num_heads=heads, norm_layer=norm))
    for module in pool.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return pool


def make_probe(model: VisionTransformer, *, kind: str, batch_norm: bool = False) -> Probe:
    """Turns a classifier, with its pre-trained weights already loaded, into a probe of its encoder.

    Args:
        kind: "linear", a linear layer on the model's pooled features (MAE, appendix A.1), or "attentive", on
            the output of `attentive_pool` (V-JEPA).
        batch_norm: see `Probe`; for either kind.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "linear":
        return Probe(encoder=model, batch_norm=batch_norm, head_std=0.01)
    if kind == "attentive":
        pool = attentive_pool(dim=model.dim, heads=model.heads)
        return Probe(encoder=model, pool=pool, batch_norm=batch_norm, head_std=0.02)
    raise ValueError(f"probe {kind}: no such kind; choose one of {', '.join(PROBES)}")
