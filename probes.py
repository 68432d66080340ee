"""Probes: small heads trained on a frozen encoder's features, one or a grid at once; models with or without one."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from modeling_blocks import create_block
from modeling_finetune import VisionTransformer, create_classifier

PROBES = ("linear", "attentive")


class FrozenEncoder(nn.Module):
    """Base of the probes: an encoder that stays in evaluation mode and runs without a graph.

    In the state dict its weights start with `encoder.`, as in a pre-training checkpoint.

    Args:
        encoder: the classifier to probe. It is modified: frozen, and its own head removed.
        pools: whether the probe pools the tokens itself; otherwise it reads the classifier's own pooled features.
    """

    def __init__(self, encoder: VisionTransformer, *, pools: bool):
        super().__init__()
        self.window, self.patch, self.depth = encoder.window, encoder.patch, encoder.depth
        self.encoder, self.pools = encoder.requires_grad_(False), pools
        encoder.head = nn.Identity()

    def train(self, mode: bool = True) -> "FrozenEncoder":
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

    @torch.no_grad()
    def encode(self, clip: Tensor) -> Tensor:
        """What the probe reads: clip (B,3,T,H,W) -> tokens (B,N,D), or pooled features (B,D) or (B,T'*D)."""
        return self.encoder.forward_tokens(clip) if self.pools else self.encoder.forward_pooled(clip)


class Probe(FrozenEncoder):
    """A frozen encoder and a trained head: clip (B,3,T,H,W) -> logits (B,classes).

    Args:
        head: as `create_head` makes it; in the state dict `pool.`, `norm.` and `head.`.
    """

    def __init__(self, encoder: VisionTransformer, head: nn.Sequential, *, pools: bool):
        super().__init__(encoder, pools=pools)
        self.pool, self.norm, self.head = head
        self.train(self.training)

    def forward_pooled(self, clip: Tensor) -> Tensor:
        """Input of the linear layer: clip (B,3,T,H,W) -> (B,D), with slot pooling (B,T'*D)."""
        return self.norm(self.pool(self.encode(clip)))  # (B,D) or (B,T'*D)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.forward_pooled(clip))  # (B,classes)


class ProbeGrid(FrozenEncoder):
    """K probes of one frozen encoder, trained independently over one forward pass: clip -> logits (K,B,classes).

    All start from the same weights. The gradient of a sum of losses of which each is one probe's is, for each probe,
    that of its own loss; its rate and decay are in `group_settings`. A probe whose logits are not finite in training
    contributes constant ones and no gradient, so that it spoils neither the others nor their steps; where no probe's
    are finite, all are left as they are.

    Args:
        head: as `create_head` makes it; K copies are trained.
        settings: learning rate and weight decay of each probe.
    """

    def __init__(
        self, encoder: VisionTransformer, head: nn.Sequential, *, pools: bool, settings: Sequence[tuple[float, float]]
    ):
        super().__init__(encoder, pools=pools)
        self.settings = [tuple(pair) for pair in settings]
        self.probes = nn.ModuleList(deepcopy(head) for _ in settings)
        self.sound: Tensor | None = None  # bool (K,), of the last forward pass in training
        for k, probe in enumerate(self.probes):
            for p in probe.parameters():
                p.register_hook(lambda gradient, k=k: torch.where(self.sound[k], gradient, 0.0))
        self.train(self.training)

    @property
    def names(self) -> list[str]:
        """The names of the probes, one for each of `settings`."""
        return [name_of(pair) for pair in self.settings]

    def group_settings(self) -> dict[str, tuple[float, float]]:
        """Learning rate and weight decay of each trained parameter."""
        return {
            f"probes.{k}.{name}": self.settings[k]
            for k, probe in enumerate(self.probes)
            for name, _ in probe.named_parameters()
        }

    def select(self, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """From a state dict of the grid that of one probe, by its name."""
        own = f"probes.{self.names.index(name)}."
        return {key.removeprefix(own): v for key, v in state.items() if key.startswith((own, "encoder."))}

    def probe(self, name: str) -> Probe:
        """One probe by its name, with the grid's own weights."""
        return Probe(self.encoder, self.probes[self.names.index(name)], pools=self.pools)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.encode(clip)  # (B,N,D) or (B,D)
        logits = torch.stack([probe(x) for probe in self.probes])  # (K,B,classes)
        if not self.training:
            return logits
        finite = logits.detach().isfinite().all(2).all(1)  # (K,)
        self.sound = finite | ~finite.any()
        return torch.where(self.sound[:, None, None], logits, 0.0)


def attentive_pool(*, dim: int, heads: int, blocks: int = 1) -> nn.Sequential:
    """Attentive pooling (B,N,D) -> (B,D): `blocks` - 1 of self-attention, then one in which a learned query attends.

    That one is LayerNorm, cross-attention and a residual MLP. The query's own residual of the published code is
    contained in the bias of the attention's projection. One block is V-JEPA's; V-JEPA 2 has four, with 16 heads, and
    smaller initial weights of the layers that end a residual branch.
    """
    norm = partial(nn.LayerNorm, eps=1e-6)
    first = [create_block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(blocks - 1)]
    pool = nn.Sequential(*first, norm(dim), AttentionPoolLatent(dim, num_heads=heads, norm_layer=norm))
    for module in pool.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    ends = [(block.attn.proj, block.mlp.fc2) for block in first]
    if first:
        ends.append((pool[-1].mlp.fc2,))
    with torch.no_grad():
        for depth, layers in enumerate(ends, start=1):
            for layer in layers:
                layer.weight.div_(depth**0.5)
    return pool


def create_head(model: VisionTransformer, *, kind: str, batch_norm: bool, blocks: int) -> nn.Sequential:
    """What a probe trains: pooling, normalisation, linear layer; arguments as in `make_probe`."""
    classes, width = model.head.out_features, model.head.in_features  # T'*D with slot pooling
    pool, std = nn.Identity(), 0.01
    if kind == "attentive":
        heads = 16 if blocks > 1 and model.dim % 16 == 0 else model.heads
        pool, std, width = attentive_pool(dim=model.dim, heads=heads, blocks=blocks), 0.02, model.dim
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
    head = nn.Linear(width, classes)
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    return nn.Sequential(OrderedDict(pool=pool, norm=norm, head=head))


def make_probe(
    model: VisionTransformer,
    *,
    kind: str,
    batch_norm: bool = False,
    blocks: int = 1,
    grid: Sequence[tuple[float, float]] = (),
    lr: float | None = None,
    weight_decay: float | None = None,
) -> Probe | ProbeGrid:
    """Makes a classifier with pre-trained weights into a probe of its encoder, or into a grid of them.

    Args:
        kind: "linear" for a linear layer on the model's pooled features (MAE, appendix A.1), "attentive" for
            one on the output of `attentive_pool`.
        batch_norm: standardise the features before the linear layer, by a BatchNorm without parameters (MAE).
        blocks: of `attentive_pool`.
        grid: learning rate and weight decay of each of several probes; none makes a single one.
        lr, weight_decay: those of a probe that was chosen from a grid, as its checkpoint says; they shape nothing.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in PROBES:
        raise ValueError(f"probe {kind}: no such kind; choose one of {', '.join(PROBES)}")
    head, pools = create_head(model, kind=kind, batch_norm=batch_norm, blocks=blocks), kind == "attentive"
    return ProbeGrid(model, head, pools=pools, settings=grid) if grid else Probe(model, head, pools=pools)


def name_of(pair: tuple[float, float]) -> str:
    """The name of a probe of a grid, by its learning rate and weight decay."""
    return "lr {:g}, weight decay {:g}".format(*pair)


def chosen_settings(settings: dict, name: str) -> dict:
    """The settings of one probe of a grid by its name, from those of the grid, as `build_classifier` takes both."""
    probe = dict(settings["probe"])
    lr, decay = next(pair for pair in probe.pop("grid") if name_of(pair) == name)
    return {**settings, "probe": {**probe, "lr": lr, "weight_decay": decay}}


def build_classifier(
    settings: dict, prepare: Callable[[VisionTransformer], object] = lambda model: None
) -> VisionTransformer | Probe | ProbeGrid:
    """Builds a classifier, or a probe or a grid of them where the settings ask for one.

    Args:
        settings: arguments of `create_classifier`; under `probe`, where present, those of `make_probe`.
        prepare: called with the classifier before it becomes a probe, to load its weights.
    """
    model = create_classifier(**{name: value for name, value in settings.items() if name != "probe"})
    prepare(model)
    return make_probe(model, **settings["probe"]) if settings.get("probe") else model
