"""AdaMAE's sampler: the network that gives each token a probability, and the losses that train it (L_S)."""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling_blocks import create_attention, create_block
from utils import SettingError

EPS = torch.finfo(torch.float32).eps
LOG_P_RANGE = math.log(EPS), math.log(1 - EPS)  # a Categorical of the published code clamps P to [EPS, 1-EPS]


def sampler_network(
    kind: str = "mha", *, dim: int, depth: int = 1, width: int | None = None, heads: int = 8
) -> nn.Sequential:
    """The network that scores tokens, (B,N,D) -> logits (B,N,1) (AdaMAE section 3.1 and its ablation of samplers).

    Args:
        kind: "mha", `depth` transformer blocks and a linear layer. The published sampler is one block of the
            encoder's width with 8 heads, dropout 0.1, no query and value bias and LayerNorm eps 1e-5. "attention",
            the paper's text: attention in place of each block, with no MLP, LayerNorm, residual or dropout. "mlp",
            Linear - GELU - Linear on each token alone; the paper says no more of its MLP variant.
        dim: channels of the tokens, D.
        width: channels of "mha" and "attention", by default D; a linear projection leads to any other. Hidden
            channels of "mlp", by default 4 D.

    Raises:
        SettingError: an unknown kind, or a width that the heads do not divide.
    """
    if kind == "mlp":
        hidden = width or 4 * dim
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
    layers = {"mha": partial(create_block, proj_drop=0.1, norm_layer=nn.LayerNorm), "attention": create_attention}
    if kind not in layers:
        raise SettingError(f"--sampler {kind}: no such sampler; choose mha, attention or mlp")
    width = width or dim
    if width % heads:
        raise SettingError(f"--sampler_dim {width} must be a multiple of the sampler's {heads} heads")
    project = [] if width == dim else [nn.Linear(dim, width)]
    return nn.Sequential(*project, *(layers[kind](width, heads) for _ in range(depth)), nn.Linear(width, 1))


def log_prob_of_draw(log_p: Tensor, drawn: Tensor) -> Tensor:
    """log of the probability that `draw_without_replacement` draws just these tokens in just this order, (B).

    It is the sum over the draws of log(p_k / what is left of P at draw k), the Plackett-Luce distribution.

    Args:
        log_p: (B,N), normalised.
        drawn: indices (B,Nv), the first drawn one first.
    """
    chosen = log_p.gather(1, drawn)  # (B,Nv)
    never = log_p.scatter(1, drawn, -math.inf).logsumexp(1, keepdim=True)  # (B,1)
    left = torch.cat([never, chosen.flip(1)], dim=1).logcumsumexp(1)[:, 1:]  # (B,Nv), the last draw first
    return (chosen - left.flip(1)).sum(1)


def log_form(log_probs: Tensor, masked: Tensor, error: Tensor, drawn: Tensor | None) -> Tensor:
    """The published code: -mean(log p * error) of the masked tokens.

    A cross-entropy against the map of errors, stationary where P_j is proportional to E[1(j masked) error_j].
    """
    return -(log_probs.gather(1, masked).clamp(*LOG_P_RANGE) * error).mean()


def linear_form(log_probs: Tensor, masked: Tensor, error: Tensor, drawn: Tensor | None) -> Tensor:
    """The paper: -sum(p * error) over the masked tokens, averaged over the clips."""
    return -(log_probs.gather(1, masked).clamp(*LOG_P_RANGE).exp() * error).sum(1).mean()


def score_function_form(log_probs: Tensor, masked: Tensor, error: Tensor, drawn: Tensor | None) -> Tensor:
    """Minimises J = E[C] over the sampler's draws, C being the mean error of the tokens that a draw leaves masked.

    Its gradient is an unbiased estimate of J's, (C - b) d log P(draw) (Williams, 1992). The baseline b is the mean C
    of the batch's other clips, those of other ranks included, so it does not depend on the clip's own draw.
    """
    cost = error.mean(1)  # (B)
    total, count = cost.sum(), len(cost)
    if dist.is_initialized():
        dist.all_reduce(total)
        count *= dist.get_world_size()
    baseline = (total - cost) / max(1, count - 1)  # (B); 0 for a batch of one
    return ((cost - baseline) * log_prob_of_draw(log_probs, drawn)).mean()


SAMPLING_LOSSES = {"log": log_form, "linear": linear_form, "score_function": score_function_form}


def sampling_loss(
    log_probs: Tensor, masked: Tensor, error: Tensor, form: str = "log", drawn: Tensor | None = None
) -> Tensor:
    """The sampler's loss L_S (AdaMAE section 3.2), a scalar: hard tokens are to become visible.

    Args:
        log_probs: log P, (B,N) float32.
        masked: int64 (B,Nm).
        error: reconstruction error of the masked tokens (B,Nm); no gradient flows into it.
        form: one of `SAMPLING_LOSSES`.
        drawn: the visible tokens in the order of drawing, int64 (B,Nv); only "score_function" reads them.
    """
    return SAMPLING_LOSSES[form](log_probs, masked, error.detach(), drawn)
