"""Every way to choose the tokens that the encoder sees, behind one signature.

A rule maps log-probabilities (B,N) and uniform random numbers to the indices (B,Nv) of the visible tokens, on
the device it is given. Only the adaptive rule reads the probabilities; the others take nothing but the random
numbers. How many tokens are visible is fixed by the mask ratio, so every shape is known beforehand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.models.beit import Block
from torch import Tensor, nn

Window = tuple[int, int, int]  # tokens in (time, height, width)


class Masking(NamedTuple):
    """Which tokens are visible and which are masked, both ascending int64: (B,Nv) and (B,N-Nv)."""

    visible: Tensor
    masked: Tensor


# ---------------------------------------------------------------------------------------------- the rules


def draw_without_replacement(log_p: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Gumbel top-k: `count` draws without replacement from the distribution exp(log_p), (B,N) -> (B,count).

    Distributed exactly as successive draws from a Categorical whose drawn entries are removed (Kool et al.,
    "Stochastic Beams and Where to Find Them", 2019), and in log space right for probabilities that underflow.
    `uniform` (B,N) holds one number in [0,1) for each entry.
    """
    exponential = -uniform.log()
    return (log_p.detach().float() - exponential.log()).topk(count, dim=1).indices


def draw_evenly(uniform: Tensor, count: int) -> Tensor:
    """`count` draws without replacement, all entries alike: (B,N) numbers in [0,1) -> indices (B,count)."""
    return uniform.topk(count, dim=1).indices


def adaptive_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """AdaMAE (section 3.1): drawn from the sampler's distribution over all tokens, without replacement."""
    return draw_without_replacement(log_p, uniform, count)


def random_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Space-time-agnostic masking (VideoMAE "random", MAE-ST "agnostic"): all tokens alike."""
    return draw_evenly(uniform, count)


def tube_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Tube masking (VideoMAE; MAE-ST "space-only"): the same positions are visible in every time slot."""
    time, height, width = window
    space = height * width
    tubes = draw_evenly(uniform[:, :space], count // time)  # (B,Nv/T')
    slots = torch.arange(time, device=log_p.device) * space  # (T')
    return (slots[:, None] + tubes[:, None, :]).flatten(1)


def frame_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Frame masking (AdaMAE's ablation; MAE-ST "time-only"): whole time slots are visible or masked."""
    time, height, width = window
    space = height * width
    slots = draw_evenly(uniform[:, :time], count // space)  # (B,visible slots)
    return (slots[:, :, None] * space + torch.arange(space, device=log_p.device)).flatten(1)


NUM_BLOCKS = 32  # cuboids drawn a sample: they cover all but a few scattered tokens


def block_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Block masking (MAE-ST): random space-time cuboids are masked until enough tokens are.

    The papers give no details. Here each cuboid spans, independently in each axis, a uniform length between
    a quarter and half of the window (at least one token) at a uniform place; they are laid one after another
    and the last one needed is cut at random, so that exactly N - count tokens are masked.
    """
    batch, device = len(uniform), uniform.device
    drawn = uniform[:, : _draws_of_blocks()].view(batch, 3, 2, NUM_BLOCKS, 1)
    covered = torch.ones(batch, NUM_BLOCKS, *window, dtype=torch.bool, device=device)
    for axis, size in enumerate(window):
        low, high = max(1, size // 4), max(1, size // 2)
        length = low + (drawn[:, axis, 0] * (high + 1 - low)).long()  # (B,blocks,1)
        start = (drawn[:, axis, 1] * (size - length + 1)).long()
        place = torch.arange(size, device=device)
        inside = (place >= start) & (place < start + length)  # (B,blocks,size)
        covered &= inside.view(batch, NUM_BLOCKS, *(size if a == axis else 1 for a in range(3)))
    covered = covered.flatten(2)  # (B,blocks,N)
    order = torch.where(covered.any(1), covered.int().argmax(1), NUM_BLOCKS)  # (B,N) first cuboid to cover it
    return (order + uniform[:, _draws_of_blocks() :]).topk(count, dim=1).indices


def _draws_of_blocks() -> int:
    return 3 * 2 * NUM_BLOCKS  # length and place in each axis


# ------------------------------------------------------------------- how many tokens, and the one signature


def _visible_of_tokens(ratio: float, window: Window) -> int:
    return int(math.prod(window) * (1 - ratio))  # AdaMAE and MAE-ST round the visible count down


def _masked_of_tokens(ratio: float, window: Window) -> int:
    return math.prod(window) - int(ratio * math.prod(window))  # VideoMAE rounds the masked count down


def _masked_of_tubes(ratio: float, window: Window) -> int:
    space = window[1] * window[2]
    return window[0] * (space - int(ratio * space))


def _masked_of_frames(ratio: float, window: Window) -> int:
    return window[1] * window[2] * (window[0] - int(ratio * window[0]))


class Rule(NamedTuple):
    """A masking rule: how it draws, how it rounds the number of visible tokens, and the numbers it needs.

    It draws from one random number for each token and `more_draws` beside these.
    """

    draw: Callable[[Tensor, Tensor, Window, int], Tensor]
    count: Callable[[float, Window], int]
    more_draws: int = 0


RULES = {
    "adaptive": Rule(adaptive_visible, _visible_of_tokens),
    "random": Rule(random_visible, _masked_of_tokens),
    "tube": Rule(tube_visible, _masked_of_tubes),
    "frame": Rule(frame_visible, _masked_of_frames),
    "block": Rule(block_visible, _masked_of_tokens, more_draws=_draws_of_blocks()),
}
ALIASES = {"learnable": "adaptive"}  # the published AdaMAE code's name


def visible_count(mask_type: str, mask_ratio: float, window: Window) -> int:
    """The number of visible tokens Nv of a rule at a ratio.

    Raises:
        ValueError: an unknown rule, a ratio outside (0, 1), or one that leaves no token visible or masked.
    """
    mask_type = ALIASES.get(mask_type, mask_type)
    if mask_type not in RULES:
        raise ValueError(f"--mask_type {mask_type}: no such rule; choose one of {', '.join(RULES)}")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"--mask_ratio {mask_ratio} must lie between 0 and 1")
    count, total = RULES[mask_type].count(mask_ratio, window), math.prod(window)
    if not 0 < count < total:
        raise ValueError(
            f"--mask_ratio {mask_ratio} with --mask_type {mask_type} shows {count} of {total} tokens "
            f"(window {window}); choose a ratio that leaves some visible and some masked"
        )
    return count


def split_tokens(visible: Tensor, num_tokens: int) -> Masking:
    """Sorts visible indices (B,Nv) and finds the rest: both ascending."""
    masked = torch.ones(len(visible), num_tokens, dtype=torch.uint8, device=visible.device)
    masked.scatter_(1, visible, 0)
    order = masked.argsort(dim=1, stable=True)  # (B,N) visible ones first
    return Masking(*order.split([visible.shape[1], num_tokens - visible.shape[1]], dim=1))


class MaskingGenerator:
    """One rule at one ratio for one window of tokens.

    Called with log-probabilities (B,N) it returns a `Masking` drawn independently for each sample, from the
    random numbers given (B,num_draws) in [0,1), or from the global random state of their device. Raises
    ValueError as `visible_count` does.
    """

    def __init__(self, *, mask_type: str, mask_ratio: float, window: Window):
        self.mask_type = ALIASES.get(mask_type, mask_type)
        self.window = window
        self.num_tokens = math.prod(window)
        self.num_visible = visible_count(mask_type, mask_ratio, window)
        self.num_draws = self.num_tokens + RULES[self.mask_type].more_draws

    @property
    def adaptive(self) -> bool:
        return self.mask_type == "adaptive"

    def __call__(self, log_p: Tensor, uniform: Tensor | None = None) -> Masking:
        if uniform is None:
            uniform = torch.rand(len(log_p), self.num_draws, device=log_p.device)
        visible = RULES[self.mask_type].draw(log_p, uniform, self.window, self.num_visible)
        return split_tokens(visible, self.num_tokens)


# --------------------------------------------------------------------------------- the adaptive sampler


def sampler_network(
    kind: str = "mha", *, dim: int, depth: int = 1, width: int | None = None, heads: int = 8
) -> nn.Sequential:
    """The network that scores tokens: (B,N,D) -> (B,N,1) logits.

    "mha": `depth` transformer blocks of `width` channels and a linear layer; another width than the tokens'
    `dim` is reached through a linear projection. The published sampler is one block of the encoder's width
    with 8 heads, dropout 0.1, no query and value bias and LayerNorm eps 1e-5 (AdaMAE section 3.1 and its
    sampling-network ablation).
    "mlp": each token alone, Linear - GELU - Linear, `width` (default 4 x dim) hidden channels; the paper
    doesn't say more of its MLP variant.

    Raises:
        ValueError: an unknown kind, or a width that the heads do not divide.
    """
    if kind == "mlp":
        hidden = width or 4 * dim
        return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
    if kind != "mha":
        raise ValueError(f"--sampler {kind}: no such sampler; choose mha or mlp")
    width = width or dim
    if width % heads:
        raise ValueError(f"--sampler_dim {width} must be a multiple of the sampler's {heads} heads")
    project = [] if width == dim else [nn.Linear(dim, width)]
    blocks = [Block(width, heads, proj_drop=0.1, norm_layer=nn.LayerNorm) for _ in range(depth)]
    for block in blocks:
        block.mlp.drop1 = nn.Identity()  # the published MLP has no dropout after its activation
    return nn.Sequential(*project, *blocks, nn.Linear(width, 1))
