"""Targets and losses: layout, round trips, the published log-probabilities, and the closed-form gradient."""

import pytest
import torch
from golden import needs_golden, tensors

from sampling import LOG_P_RANGE, sampling_loss
from targets import create_target, patch_statistics, patchify, unpatchify
from utils import SettingError
from weights.pretraining import trained_target

NORMALISED = create_target("pixels", patch=8)
RAW = create_target("pixels", patch=8, normalize=False)


def test_patchify_follows_the_published_order():
    """Pixel (frame f, row r, column c, channel k) of a token is at ((f*p + r)*p + c)*3 + k."""
    p, clip = 4, torch.rand(1, 3, 4, 8, 12)
    tokens = patchify(clip, p)
    assert tokens.shape == (1, 2 * 2 * 3, 2 * p * p * 3)
    t, h, w, f, r, c, k = 1, 0, 2, 1, 3, 2, 1
    value = tokens[0, (t * 2 + h) * 3 + w, ((f * p + r) * p + c) * 3 + k]
    assert value == clip[0, k, 2 * t + f, h * p + r, w * p + c]


@pytest.mark.parametrize(("patch", "shape"), [(8, (2, 3, 16, 32, 32)), (4, (1, 3, 2, 12, 20))])
def test_patchify_round_trip(patch, shape):
    clip = torch.rand(shape)
    window = (shape[2] // 2, shape[3] // patch, shape[4] // patch)
    assert torch.equal(unpatchify(patchify(clip, patch), window, patch), clip)


def test_normalised_targets_are_standardised_by_token_and_channel():
    pixels, masked = torch.rand(2, 3, 4, 16, 16), torch.tensor([[0, 3, 5], [1, 2, 7]])
    target = NORMALISED(pixels, masked).view(2, 3, -1, 3)
    torch.testing.assert_close(target.mean(2), torch.zeros(2, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.std(2), torch.ones(2, 3, 3), rtol=0, atol=1e-4)
    raw = RAW(pixels, masked)
    assert torch.equal(raw[1, 2], patchify(pixels, 8)[1, 7])


def test_patch_statistics_undo_the_normalisation():
    pixels, masked = torch.rand(1, 3, 2, 16, 16), torch.tensor([[0, 1, 2, 3]])
    raw = RAW(pixels, masked)
    mean, std = patch_statistics(raw)
    back = NORMALISED(pixels, masked).view(1, 4, -1, 3) * std + mean
    torch.testing.assert_close(back.flatten(2), raw, rtol=0, atol=1e-6)


def test_targets_of_flat_patches_are_finite():
    target = NORMALISED(torch.full((1, 3, 2, 8, 8), 0.3), torch.tensor([[0]]))
    assert target.isfinite().all()


def test_errors_are_computed_in_float32():
    prediction = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    target = torch.randn(2, 5, 12)
    error = NORMALISED.error(prediction, target)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, (prediction.float() - target).pow(2).mean(2))
    difference = prediction.float() - target
    torch.testing.assert_close(NORMALISED.error(prediction, target, "l1"), difference.abs().mean(2))
    torch.testing.assert_close(NORMALISED.error(prediction, target, "l2"), difference.square().sum(2).sqrt())


def test_an_unknown_target_is_refused():
    with pytest.raises(SettingError, match="--target voxels: no such target; choose one of pixels"):
        create_target("voxels", patch=8)


@pytest.mark.parametrize(
    ("settings", "flags", "normalize"),
    [
        ({}, {}, True),
        ({"target": "pixels"}, {"normalize_target": False}, False),
        ({}, {"normlize_target": False}, False),
    ],
)
def test_the_target_of_a_checkpoint(settings, flags, normalize):
    """Files of before there were targets, and of the published code, have normalised pixels by default."""
    target = trained_target(settings, flags, patch=4)
    assert (type(target), target.patch, target.normalize) == (type(NORMALISED), 4, normalize)


@needs_golden
def test_clamped_log_probabilities_equal_the_published_ones():
    golden = tensors("misc")
    ours = golden["logprob.logits"].log_softmax(1).clamp(*LOG_P_RANGE)
    torch.testing.assert_close(ours, golden["logprob.official_log_probs"], rtol=1e-5, atol=1e-6)


def test_sampling_loss_gradient_is_a_cross_entropy_against_the_loss_map():
    """d L_S / d logit_j = P_j mean(w) - 1[j masked] w_j / M for one sample."""
    logits = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[1, 2, 4, 6]])
    error = torch.rand(1, 4, dtype=torch.float64, requires_grad=True)
    sampling_loss(logits.log_softmax(1), masked, error).backward()
    expected = logits.detach().softmax(1) * error.detach().mean()
    expected[0, masked[0]] -= error.detach()[0] / 4
    torch.testing.assert_close(logits.grad, expected)
    assert error.grad is None


def test_sampling_loss_of_the_paper():
    log_p = torch.randn(3, 9).log_softmax(1)
    masked, error = torch.tensor([[0, 1], [4, 8], [2, 3]]), torch.rand(3, 2)
    by_hand = -sum(log_p[b, masked[b, i]].exp() * error[b, i] for b in range(3) for i in range(2)) / 3
    torch.testing.assert_close(sampling_loss(log_p, masked, error, "linear"), by_hand)


def test_no_gradient_through_clamped_probabilities():
    logits = torch.tensor([[0.0, -40.0, 1.0]], requires_grad=True)
    sampling_loss(logits.log_softmax(1), torch.tensor([[1]]), torch.ones(1, 1)).backward()
    assert (logits.grad == 0).all()
