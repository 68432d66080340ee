"""Masking rules: counts, partitions, independence, repeatability; the distribution of the adaptive draw."""

import ast
import itertools
import math

import pytest
import torch
from golden import needs_golden, table

from masking_generator import (
    DECODER_ORDERS,
    RULES,
    MaskingGenerator,
    draw_without_replacement,
    split_tokens,
    visible_count,
)
from sampling import sampler_network

WINDOWS = [(8, 14, 14), (4, 3, 3), (8, 4, 4), (2, 5, 7)]
RATIOS = [0.5, 0.75, 0.8, 0.9]


def uniform(batch: int, window: tuple[int, int, int]) -> torch.Tensor:
    return torch.zeros(batch, math.prod(window)).log_softmax(1)


@needs_golden
@pytest.mark.parametrize("key", [k for k in table("mask_counts") if k.startswith("(")])
def test_counts_equal_the_published_ones(key):
    window, ratio = key.rsplit("_", 1)
    window, ratio, counts = ast.literal_eval(window), float(ratio), table("mask_counts")[key]
    tokens = math.prod(window)
    assert visible_count("tube", ratio, window) == tokens - counts["tube_total"]
    assert visible_count("random", ratio, window) == tokens - counts["random_total"]
    assert visible_count("adaptive", ratio, window) == counts["adamae_visible"] == counts["mae_st_keep"]


@needs_golden
@pytest.mark.parametrize("key", [k for k in table("mask_counts") if k.startswith("visible_of_1568")])
def test_adaptive_counts_of_the_paper(key):
    ratio = float(key.rsplit("_", 1)[1])
    assert visible_count("adaptive", ratio, (8, 14, 14)) == table("mask_counts")[key]


@pytest.mark.parametrize("mask_type", RULES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_visible_and_masked_partition_all_tokens(mask_type, window, ratio):
    masking = MaskingGenerator(mask_type=mask_type, mask_ratio=ratio, window=window)
    visible, masked = masking(uniform(5, window))
    tokens = math.prod(window)
    assert visible.shape == (5, masking.num_visible) and masked.shape == (5, tokens - masking.num_visible)
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(tokens).expand(5, -1))
    assert (visible.diff(dim=1) > 0).all() and (masked.diff(dim=1) > 0).all()


@pytest.mark.parametrize("mask_type", RULES)
def test_samples_differ_draws_differ_and_a_seed_repeats(mask_type):
    masking = MaskingGenerator(mask_type=mask_type, mask_ratio=0.75, window=(8, 6, 6))
    log_p = uniform(16, (8, 6, 6))
    torch.manual_seed(1)
    first, second = masking(log_p).visible, masking(log_p).visible
    torch.manual_seed(1)
    again = masking(log_p).visible
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) > 1


def test_tube_masks_the_same_places_in_every_slot():
    masking = MaskingGenerator(mask_type="tube", mask_ratio=0.9, window=(8, 14, 14))
    visible = masking(uniform(3, (8, 14, 14))).visible.view(3, 8, 20)
    assert torch.equal(visible % 196, (visible[:, :1] % 196).expand(-1, 8, -1))


def test_frame_shows_whole_slots():
    masking = MaskingGenerator(mask_type="frame", mask_ratio=0.875, window=(8, 14, 14))
    visible = masking(uniform(3, (8, 14, 14))).visible
    assert masking.num_visible == 196
    assert all(len(set((row // 196).tolist())) == 1 for row in visible)


def test_block_masks_connected_regions():
    """Masked tokens of the block rule have far more masked neighbours than at random."""

    def masked_neighbours(mask_type):
        masking = MaskingGenerator(mask_type=mask_type, mask_ratio=0.5, window=(8, 14, 14))
        hidden = torch.zeros(64, 8 * 14 * 14).scatter(1, masking(uniform(64, (8, 14, 14))).masked, 1.0)
        hidden = hidden.view(64, 8, 14, 14)
        return (hidden[..., 1:] * hidden[..., :-1]).sum() / hidden[..., :-1].sum()

    torch.manual_seed(0)
    assert masked_neighbours("random") < 0.55
    assert masked_neighbours("block") > 0.75


def exact_inclusion(p: list[float], count: int) -> torch.Tensor:
    """P(i drawn) in `count` draws without replacement, by summing over all ordered draws."""
    included = torch.zeros(len(p), dtype=torch.float64)
    for order in itertools.permutations(range(len(p)), count):
        left, chance = 1.0, 1.0
        for i in order:
            chance *= p[i] / left
            left -= p[i]
        included[list(order)] += chance
    return included


@pytest.mark.parametrize("count", [1, 2, 4])
def test_adaptive_draw_has_the_exact_inclusion_probabilities(count):
    p = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
    draws = 40_000
    torch.manual_seed(3)
    drawn = draw_without_replacement(torch.tensor(p).log().expand(draws, -1), torch.rand(draws, len(p)), count)
    frequency = torch.bincount(drawn.flatten(), minlength=len(p)).double() / draws
    expected = exact_inclusion(p, count)
    standard_error = (expected * (1 - expected) / draws).sqrt().clamp_min(1e-4)
    assert ((frequency - expected).abs() / standard_error).max() < 4.5


def test_adaptive_draw_with_probabilities_of_zero():
    """More draws than probabilities above zero: the likely ones first, no duplicates, nothing non-finite."""
    logits = torch.full((100, 64), -1e4)
    logits[:, :3] = 0.0
    log_p = logits.log_softmax(1)
    assert (log_p.exp() > 0).sum() == 300
    drawn = draw_without_replacement(log_p, torch.rand(100, 64), 8)
    assert all(len(set(row.tolist())) == 8 and {0, 1, 2} <= set(row.tolist()) for row in drawn)
    later = drawn[:, 3:].flatten()
    assert len(later.unique()) > 40  # among equals the draw stays random


def test_adaptive_draw_in_half_precision_is_made_in_float32():
    log_p = torch.tensor([[0.0, -0.0625, -8.0, -8.0]]).log_softmax(1).half()
    assert draw_without_replacement(log_p, torch.rand(1, 4), 2).dtype == torch.int64


def test_split_tokens_takes_any_order():
    visible, masked = split_tokens(torch.tensor([[5, 0, 3]]), 6)
    assert visible.tolist() == [[0, 3, 5]] and masked.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("mask_type", "ratio", "words"),
    [
        ("tubes", 0.9, "no such rule"),
        ("tube", 1.0, "between 0 and 1"),
        ("adaptive", 0.9999, "shows 0 of 1568"),
        ("frame", 0.05, "shows 1568 of 1568"),
    ],
)
def test_impossible_settings_are_refused(mask_type, ratio, words):
    with pytest.raises(ValueError, match=words):
        MaskingGenerator(mask_type=mask_type, mask_ratio=ratio, window=(8, 14, 14))


def decoder_masking(decoder_mask_type: str, ratio: float = 0.5, **settings) -> MaskingGenerator:
    settings = {"mask_type": "adaptive", "mask_ratio": 0.9, "window": (8, 14, 14), **settings}
    return MaskingGenerator(decoder_mask_type=decoder_mask_type, decoder_mask_ratio=ratio, **settings)


@pytest.mark.parametrize("decoder_mask_type", DECODER_ORDERS)
@pytest.mark.parametrize("mask_type", RULES)
@pytest.mark.parametrize(("window", "ratio"), [((8, 4, 4), 0.5), ((4, 5, 3), 0.75), ((2, 6, 6), 0.1)])
def test_the_decoder_gets_a_fixed_number_of_masked_tokens(decoder_mask_type, mask_type, window, ratio):
    masking = decoder_masking(decoder_mask_type, ratio, mask_type=mask_type, mask_ratio=0.5, window=window)
    masked = masking(uniform(6, window)).masked
    decoded = masking.decoded(masked)
    assert decoded.shape == (6, masked.shape[1] - int(ratio * masked.shape[1]))
    assert (decoded.diff(dim=1) > 0).all()
    assert all(set(some.tolist()) <= set(every.tolist()) for some, every in zip(decoded, masked, strict=True))


@pytest.mark.parametrize("decoder_mask_type", DECODER_ORDERS)
def test_every_masked_token_is_decoded_equally_often(decoder_mask_type):
    masking = decoder_masking(decoder_mask_type, 0.7, window=(4, 4, 4))
    torch.manual_seed(0)
    every = torch.arange(64).expand(20_000, -1)
    share = torch.bincount(masking.decoded(every).flatten(), minlength=64) / 20_000
    assert (share - 20 / 64).abs().max() < 4.5 * (20 / 64 * 44 / 64 / 20_000) ** 0.5


def test_running_cells_decode_half_of_each_cell_and_move_on_clockwise():
    masking = decoder_masking("running_cell")
    torch.manual_seed(0)
    decoded = masking.decoded(torch.arange(1568).expand(16, -1))
    kept = torch.zeros(16, 1568, dtype=torch.bool).scatter(1, decoded, True).view(16, 8, 7, 2, 7, 2)
    assert (kept == kept[:, :, :1, :, :1]).all(), "all cells of a slot alike"
    clockwise = kept[:, :, 0, :, 0].flatten(2)[:, :, [0, 1, 3, 2]]  # (16,8,4)
    assert (clockwise.sum(2) == 2).all()
    assert all((row & row.roll(1, 1)).any(1).all() for row in clockwise), "two neighbours"
    assert torch.equal(clockwise[:, 1:], clockwise[:, :-1].roll(1, 2)), "a place further in each slot"
    assert len({tuple(row.flatten().tolist()) for row in clockwise}) == 4, "each clip starts at a random place"


def test_without_decoder_masking_nothing_changes():
    plain, half = (decoder_masking("running_cell", ratio) for ratio in (0.0, 0.5))
    assert plain.num_draws == 1568 and half.num_draws == 1568 + 1 + 1568
    numbers, log_p = torch.rand(3, half.num_draws), torch.randn(3, 1568).log_softmax(1)
    visible, masked = half(log_p, numbers)
    assert torch.equal(visible, plain(log_p, numbers[:, :1568]).visible)
    assert plain.decoded(masked) is masked


@pytest.mark.parametrize(("kind", "ratio", "words"), [("cell", 0.5, "mask_type cell"), ("random", 1.0, "below 1")])
def test_impossible_decoder_masks_are_refused(kind, ratio, words):
    with pytest.raises(ValueError, match=words):
        decoder_masking(kind, ratio)


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"depth": 2}, {"width": 16}, {"width": 16, "depth": 2}, {"kind": "mlp"}, {"kind": "mlp", "width": 8}),
        *({"kind": "attention"}, {"kind": "attention", "width": 16, "depth": 2}),
    ],
)
def test_sampler_networks_score_every_token(settings):
    network = sampler_network(dim=32, **settings)
    assert network(torch.randn(2, 10, 32)).shape == (2, 10, 1)


def test_the_published_sampler_drops_where_the_published_one_does():
    block = sampler_network(dim=32)[0]
    assert block.attn.proj_drop.p == block.mlp.drop2.p == 0.1
    assert block.attn.attn_drop == 0 and not hasattr(block.mlp, "drop1")


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        ({"kind": "mlp"}, 768 * 3072 + 3072 + 3073),
        ({"width": 384}, 768 * 384 + 384 + 12 * 384**2 + 10 * 384 + 385),
        ({}, 7_086_337),
        ({"width": 384, "depth": 2}, 768 * 384 + 384 + 2 * (12 * 384**2 + 10 * 384) + 385),
        ({"kind": "attention"}, 4 * 768**2 + 768 + 769),
    ],
)
def test_the_samplers_of_the_ablation(settings, parameters):
    """MLP, MHA(D,d) with D blocks of width d, each with 12 d^2 weights and 10 d biases and scales; the paper's text."""
    network = sampler_network(dim=768, **settings)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_the_sampler_of_the_paper_is_attention_and_a_linear_layer():
    network = sampler_network("attention", dim=32).train()
    x = torch.randn(2, 10, 32)
    query, key, value = (x @ w.T for w in network[0].qkv.weight.chunk(3))
    heads = [part.split(4, dim=2) for part in (query, key, value)]
    attended = [(q @ k.mT / 2).softmax(2) @ v for q, k, v in zip(*heads)]
    by_hand = network[1](network[0].proj(torch.cat(attended, dim=2)))
    torch.testing.assert_close(network(x), by_hand, rtol=1e-4, atol=1e-5)


def test_sampler_width_must_suit_its_heads():
    with pytest.raises(ValueError, match="sampler_dim 20"):
        sampler_network(dim=32, width=20)
