"""The masking rules, which choose the tokens that the encoder sees, and the adaptive sampler.

A rule maps log-probabilities (B,N) and uniform random numbers (B,num_draws) to the indices (B,Nv) of the visible
tokens, on the device of its inputs. Only an adaptive rule reads the probabilities. The mask ratio alone fixes Nv,
so every shape is known in advance. A new rule is a function and a row in `RULES`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils import SettingError

Window = tuple[int, int, int]  # tokens in (time, height, width)


class Masking(NamedTuple):
    """Which tokens are visible and which are masked, both ascending int64: (B,Nv) and (B,N-Nv)."""

    visible: Tensor
    masked: Tensor


def draw_without_replacement(log_p: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Draws without replacement from the distribution exp(log_p), by Gumbel top-k: indices (B,count) int64.

    The draws are distributed exactly as successive ones from a Categorical whose drawn entries are removed (Kool et
    al., "Stochastic Beams and Where to Find Them", 2019). In log space that holds even where probabilities underflow.

    Args:
        log_p: (B,N), of any floating-point type.
        uniform: random numbers (B,N) in [0,1).
    """
    exponential = -uniform.log()
    return (log_p.detach().float() - exponential.log()).topk(count, dim=1).indices  # (B,count)


def draw_evenly(uniform: Tensor, count: int) -> Tensor:
    """Draws without replacement, all entries alike: random numbers (B,N) in [0,1) -> indices (B,count)."""
    return uniform.topk(count, dim=1).indices  # (B,count)


def adaptive_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """AdaMAE (section 3.1): drawn without replacement from the sampler's distribution over all tokens."""
    return draw_without_replacement(log_p, uniform, count)


def random_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Space-time-agnostic masking (VideoMAE "random", MAE-ST "agnostic"): all tokens alike."""
    return draw_evenly(uniform, count)


def tube_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Tube masking (VideoMAE; MAE-ST "space-only"): the same positions are visible in every time slot."""
    time, space = window[0], window[1] * window[2]
    tubes = draw_evenly(uniform[:, :space], count // time)  # (B,Nv/T')
    slots = torch.arange(time, device=log_p.device) * space  # (T')
    return (slots[:, None] + tubes[:, None, :]).flatten(1)  # (B,Nv)


def frame_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Frame masking (AdaMAE's ablation; MAE-ST "time-only"): whole time slots are visible or masked."""
    time, space = window[0], window[1] * window[2]
    slots = draw_evenly(uniform[:, :time], count // space)  # (B,visible slots)
    return (slots[:, :, None] * space + torch.arange(space, device=log_p.device)).flatten(1)  # (B,Nv)


NUM_BLOCKS = 32  # cuboids drawn for a clip: they cover all but a few scattered tokens
BLOCK_DRAWS = 3 * 2 * NUM_BLOCKS  # length and place of each in each axis


def block_visible(log_p: Tensor, uniform: Tensor, window: Window, count: int) -> Tensor:
    """Block masking (MAE-ST): random space-time cuboids are masked, one after another, until enough tokens are.

    The papers give no details. Here a cuboid's length in each axis is uniform between a quarter and half of the
    window (at least one token), and so is its place. Of the last cuboid needed, random tokens stay visible, so that
    exactly N - count tokens are masked.
    """
    batch, device = len(uniform), uniform.device
    drawn = uniform[:, :BLOCK_DRAWS].view(batch, 3, 2, NUM_BLOCKS, 1)
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
    return (order + uniform[:, BLOCK_DRAWS:]).topk(count, dim=1).indices  # (B,Nv)


def floor_visible(ratio: float, window: Window) -> int:
    return int(math.prod(window) * (1 - ratio))  # AdaMAE and MAE-ST round the visible count down


def floor_masked(ratio: float, window: Window) -> int:
    return math.prod(window) - int(ratio * math.prod(window))  # VideoMAE rounds the masked count down


def floor_masked_tubes(ratio: float, window: Window) -> int:
    space = window[1] * window[2]
    return window[0] * (space - int(ratio * space))


def floor_masked_frames(ratio: float, window: Window) -> int:
    return window[1] * window[2] * (window[0] - int(ratio * window[0]))


class Rule(NamedTuple):
    """A masking rule: `draw` maps log-probabilities (B,N), random numbers, window and Nv to indices in any order."""

    draw: Callable[[Tensor, Tensor, Window, int], Tensor]
    count: Callable[[float, Window], int]  # (mask ratio, window) -> the number of visible tokens Nv
    more_draws: int = 0  # random numbers that a clip needs beside one for each token
    adaptive: bool = False  # the model has a sampling network, and `draw` reads its log-probabilities


RULES = {
    "adaptive": Rule(adaptive_visible, floor_visible, adaptive=True),
    "random": Rule(random_visible, floor_masked),
    "agnostic": Rule(random_visible, floor_visible),  # as "random", with the rounding of MAE-ST
    "tube": Rule(tube_visible, floor_masked_tubes),
    "frame": Rule(frame_visible, floor_masked_frames),
    "block": Rule(block_visible, floor_masked, more_draws=BLOCK_DRAWS),
}
# the name in the published code of AdaMAE, and MAE-ST's names of tube and frame masking
ALIASES = {"learnable": "adaptive", "space_only": "tube", "time_only": "frame"}


def visible_count(mask_type: str, mask_ratio: float, window: Window) -> int:
    """The number of visible tokens Nv of a rule at a ratio.

    Raises:
        SettingError: an unknown rule, a ratio outside (0, 1), or one that leaves no token visible or masked.
    """
    mask_type = ALIASES.get(mask_type, mask_type)
    if mask_type not in RULES:
        raise SettingError(f"--mask_type {mask_type}: no such rule; choose one of {', '.join(RULES)}")
    if not 0 < mask_ratio < 1:
        raise SettingError(f"--mask_ratio {mask_ratio} must lie between 0 and 1")
    count, total = RULES[mask_type].count(mask_ratio, window), math.prod(window)
    if not 0 < count < total:
        raise SettingError(
            f"--mask_ratio {mask_ratio} with --mask_type {mask_type} shows {count} of {total} tokens "
            f"(window {window}); choose a ratio that leaves some visible and some masked"
        )
    return count


def random_order(uniform: Tensor, window: Window) -> Tensor:
    """Decodes masked tokens evenly: random numbers (B,1+N) -> the tokens' keys (B,N), lowest first."""
    return uniform[:, 1:]


def running_cell_order(uniform: Tensor, window: Window) -> Tensor:
    """Decodes masked tokens by running cells (VideoMAE V2): random numbers (B,1+N) -> keys (B,N), lowest first.

    A cell is 2 x 2 tokens of a time slot. Its places come in clockwise order, from one that moves on clockwise by a
    place in each slot; where it starts is random for each clip, and so is the order of the cells.
    """
    slot, row, column = (torch.arange(size, device=uniform.device) for size in window)
    place = ((column % 2) ^ (row[:, None] % 2 * 3)).flatten()  # (H'W'): 0 1 in even rows, 3 2 in odd ones
    turn = (place - slot[:, None]).flatten() + (4 * uniform[:, :1]).long()  # (B,N)
    return turn % 4 + uniform[:, 1:]


DECODER_ORDERS = {"random": random_order, "running_cell": running_cell_order}


def split_tokens(visible: Tensor, num_tokens: int) -> Masking:
    """Splits the tokens into those at the indices `visible` (B,Nv) and the rest."""
    masked = torch.ones(len(visible), num_tokens, dtype=torch.uint8, device=visible.device)
    masked.scatter_(1, visible, 0)
    order = masked.argsort(dim=1, stable=True)  # (B,N), visible ones first
    return Masking(*order.split([visible.shape[1], num_tokens - visible.shape[1]], dim=1))


class MaskingGenerator:
    """One rule at one ratio for one window of tokens, and the masked tokens that the decoder gets.

    Args:
        decoder_mask_type: one of `DECODER_ORDERS`.
        decoder_mask_ratio: share of the masked tokens that the decoder leaves out while training; 0: none.

    Raises:
        SettingError: an unknown order, a decoder ratio outside [0, 1), or as `visible_count`.
    """

    def __init__(
        self,
        *,
        mask_type: str,
        mask_ratio: float,
        window: Window,
        decoder_mask_type: str = "random",
        decoder_mask_ratio: float = 0.0,
    ):
        self.mask_type, self.window = ALIASES.get(mask_type, mask_type), window
        self.num_tokens, self.num_visible = math.prod(window), visible_count(mask_type, mask_ratio, window)
        self.rule = RULES[self.mask_type]
        self.adaptive, self.decoder_mask_ratio = self.rule.adaptive, decoder_mask_ratio
        if decoder_mask_type not in DECODER_ORDERS:
            raise SettingError(f"--decoder_mask_type {decoder_mask_type}: choose {' or '.join(DECODER_ORDERS)}")
        if not 0 <= decoder_mask_ratio < 1:
            raise SettingError(f"--decoder_mask_ratio {decoder_mask_ratio} must be from 0 to below 1")
        self.decoder_order = DECODER_ORDERS[decoder_mask_type]
        self.rule_draws = self.num_tokens + self.rule.more_draws
        self.num_draws = self.rule_draws + (1 + self.num_tokens if decoder_mask_ratio else 0)

    def random_numbers(self, like: Tensor) -> Tensor:
        """Random numbers (B,num_draws) in [0,1) for as many clips as `like` has, from its device's random state."""
        return torch.rand(len(like), self.num_draws, device=like.device)

    def draw(self, log_p: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Indices (B,Nv) int64 of the visible tokens of each clip, in the order in which its rule draws them.

        Args:
            log_p: log-probabilities (B,N); a rule that is not adaptive uses only their shape and device.
            uniform: random numbers (B,num_draws) in [0,1); None draws them from the device's random state.
        """
        uniform = self.random_numbers(log_p) if uniform is None else uniform
        return self.rule.draw(log_p, uniform[:, : self.rule_draws], self.window, self.num_visible)

    def decoded(self, masked: Tensor, uniform: Tensor | None = None) -> Tensor:
        """The masked tokens (B,Nm - floor(ratio Nm)) of all (B,Nm) that the decoder gets while training, ascending."""
        if not self.decoder_mask_ratio:
            return masked
        uniform = self.random_numbers(masked) if uniform is None else uniform
        keys = self.decoder_order(uniform[:, self.rule_draws :], self.window).gather(1, masked)  # (B,Nm)
        left_out = int(self.decoder_mask_ratio * masked.shape[1])
        chosen = keys.topk(masked.shape[1] - left_out, dim=1, largest=False).indices
        return masked.gather(1, chosen.sort(dim=1).values)

    def __call__(self, log_p: Tensor, uniform: Tensor | None = None) -> Masking:
        """Masks each clip independently of the others; arguments as in `draw`."""
        return split_tokens(self.draw(log_p, uniform), self.num_tokens)
