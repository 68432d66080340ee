"""The sampling losses against brute force: all ordered draws of 2 of 5 tokens, with their exact probabilities."""

import itertools
import math

import pytest
import torch

from masking_generator import MaskingGenerator
from modeling_pretrain import create_pretrain_model
from sampling import SAMPLING_LOSSES, log_prob_of_draw, sampling_loss
from targets import Losses, create_target

N, VISIBLE = 5, 2
DRAWN = torch.tensor(list(itertools.permutations(range(N), VISIBLE)))  # (20,2)
MASKED = torch.tensor([[i for i in range(N) if i not in draw] for draw in DRAWN.tolist()])  # (20,3)
LOGITS = torch.tensor([[0.3, -1.2, 0.8, 0.1, -0.4], [1.0, 0.2, -0.7, 0.0, 0.5]], dtype=torch.float64)  # of two clips
ERROR = torch.rand(2, len(DRAWN), N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
ERROR_OF_MASKED = ERROR.gather(2, MASKED.expand(2, -1, -1))  # (2,20,3), which depends on the draw


def chances(logits: torch.Tensor) -> torch.Tensor:
    """The probability of each ordered draw, (20), multiplied up draw by draw."""
    p = logits.softmax(0)
    return torch.stack([p[i] * p[j] / (1 - p[i]) for i, j in DRAWN.tolist()])


def error_when_masked(clip: int, logits: torch.Tensor) -> torch.Tensor:
    """E[1(j masked) L_j] for each token j of a clip, (N)."""
    is_masked = torch.zeros(len(DRAWN), N, dtype=torch.float64).scatter(1, MASKED, 1)
    return (chances(logits)[:, None] * is_masked * ERROR[clip]).sum(0)


def gradients(form: str) -> torch.Tensor:
    """The gradient at the logits of the first clip, for each draw of it alone: (20,N)."""
    logits = LOGITS[0].expand(len(DRAWN), -1).clone().requires_grad_()
    for k in range(len(DRAWN)):
        sampling_loss(
            logits[k : k + 1].log_softmax(1), MASKED[k : k + 1], ERROR_OF_MASKED[0, k : k + 1], form, DRAWN[k : k + 1]
        ).backward()
    return logits.grad


OBJECTIVES = {  # of the logits of the first clip; what the two first forms multiply with P is held fixed
    "log": lambda x: -(error_when_masked(0, x.detach()) / (N - VISIBLE) * x.log_softmax(0)).sum(),
    "linear": lambda x: -(error_when_masked(0, x.detach()) * x.softmax(0)).sum(),
    "score_function": lambda x: (chances(x) * ERROR_OF_MASKED[0].mean(1)).sum(),
}


@pytest.mark.parametrize("form", SAMPLING_LOSSES)
def test_the_expected_gradient_is_that_of_the_objective(form):
    logits = LOGITS[0].clone().requires_grad_()
    OBJECTIVES[form](logits).backward()
    expected = (chances(LOGITS[0])[:, None] * gradients(form)).sum(0)
    torch.testing.assert_close(expected, logits.grad, rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 0.01


def test_the_gradient_of_the_log_form():
    """At logit j: P_j mean(L) - 1[j masked] L_j / M."""
    by_hand = LOGITS[0].softmax(0) * ERROR_OF_MASKED[0].mean(1, keepdim=True)
    by_hand = by_hand.scatter_add(1, MASKED, -ERROR_OF_MASKED[0] / (N - VISIBLE))
    torch.testing.assert_close(gradients("log"), by_hand, rtol=1e-10, atol=1e-12)


def test_the_fixed_point_of_the_log_form():
    """Where P_j is proportional to E[1(j masked) L_j], the expected gradient vanishes."""
    logits = LOGITS[0]
    for _ in range(200):
        logits = error_when_masked(0, logits).log().log_softmax(0)
    torch.testing.assert_close(logits.softmax(0), error_when_masked(0, logits) / error_when_masked(0, logits).sum())
    logits.requires_grad_()
    OBJECTIVES["log"](logits).backward()
    assert logits.grad.abs().max() < 1e-12


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of draws of the two clips, as batches: their probabilities (400), gradients at the logits (400,2,N)."""
    grads, weights = [], []
    both = torch.stack([chances(x) for x in LOGITS])
    for i, j in itertools.product(range(len(DRAWN)), repeat=2):
        rows, logits = [i, j], LOGITS.clone().requires_grad_()
        error = torch.stack([ERROR_OF_MASKED[0, i], ERROR_OF_MASKED[1, j]])
        sampling_loss(logits.log_softmax(1), MASKED[rows], error, "score_function", DRAWN[rows]).backward()
        grads.append(logits.grad)
        weights.append(both[0, i] * both[1, j])
    return torch.stack(weights), torch.stack(grads)


def test_the_baseline_of_the_other_clips_leaves_the_expectation_and_lowers_the_variance():
    logits = LOGITS.clone().requires_grad_()
    (sum((chances(x) * e.mean(1)).sum() for x, e in zip(logits, ERROR_OF_MASKED, strict=True)) / 2).backward()
    weights, grads = pairs()
    expected = (weights[:, None, None] * grads).sum(0)
    torch.testing.assert_close(expected, logits.grad, rtol=1e-10, atol=1e-12)

    alone = gradients("score_function") / 2  # a batch of one has no baseline
    spread = (weights[:, None] * (grads[:, 0] - expected[0]).square()).sum()
    spread_alone = (chances(LOGITS[0])[:, None] * (alone - expected[0]).square()).sum()
    assert spread < 0.1 * spread_alone


def test_minimising_the_expected_cost_shows_what_is_hard():
    """Tokens of constant error: following the gradient, the two hardest become visible."""
    error = torch.tensor([0.1, 2.0, 0.3, 1.5, 0.2], dtype=torch.float64)
    logits = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad((chances(logits) * error[MASKED].mean(1)).sum(), logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert set(logits.topk(2).indices.tolist()) == {1, 3}


@pytest.mark.parametrize("form", SAMPLING_LOSSES)
def test_entropy_regularisation_adds_the_gradient_of_the_entropy(form):
    """For every form: -w_H H / log N, whose gradient at logit j is w_H P_j (log P_j + H) / log N."""
    torch.manual_seed(0)
    model = create_pretrain_model("pretrain_videomae_tiny_patch8_64", input_size=32, mask_ratio=0.9)
    pixels = torch.rand(2, 3, 16, 32, 32)
    output = model(pixels)
    log_p = output.log_probs.detach().double().log_softmax(1)  # normalised to double precision
    found = {}
    for weight in (0.0, 0.5):
        logits = log_p.clone().requires_grad_()
        losses = Losses(target=create_target("pixels", patch=8), sampling_form=form, entropy_weight=weight)
        values = losses(output._replace(log_probs=logits.log_softmax(1)), pixels)
        values["loss_sampling"].backward()
        found[weight] = logits.grad
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    by_hand = 0.5 * log_p.exp() * (log_p + entropy) / math.log(128) / 2
    torch.testing.assert_close(found[0.5] - found[0.0], by_hand, rtol=1e-6, atol=1e-10)


def test_the_probability_of_a_draw():
    for logits in LOGITS:
        found = log_prob_of_draw(logits.log_softmax(0).expand(len(DRAWN), -1), DRAWN).exp()
        torch.testing.assert_close(found, chances(logits), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.sum(), torch.ones((), dtype=torch.float64))


def test_the_probability_of_a_draw_survives_a_nearly_certain_token():
    """In float32, 1 - p of the first token rounds to 0; the second draw still has a probability."""
    log_p = torch.tensor([[30.0, 0.0, 0.0, 0.0]]).log_softmax(1).requires_grad_()
    found = log_prob_of_draw(log_p, torch.tensor([[0, 2]]))
    torch.testing.assert_close(found, torch.tensor([1 / 3]).log())
    found.sum().backward()
    assert log_p.grad.isfinite().all()


def test_tokens_are_drawn_in_the_order_whose_probability_that_is():
    masking = MaskingGenerator(mask_type="adaptive", mask_ratio=0.6, window=(1, 1, 5))
    torch.manual_seed(0)
    drawn = masking.draw(LOGITS[0].float().log_softmax(0).expand(40_000, -1))
    frequency = (drawn[:, None] == DRAWN).all(2).double().mean(0)
    expected = chances(LOGITS[0])
    assert ((frequency - expected).abs() / (expected * (1 - expected) / 40_000).sqrt()).max() < 4.5


def test_the_model_returns_the_order_of_drawing():
    torch.manual_seed(0)
    model = create_pretrain_model("pretrain_videomae_tiny_patch8_64", input_size=32, mask_ratio=0.9).eval()
    clip, uniform = torch.randn(2, 3, 16, 32, 32), torch.rand(2, 128)
    out = model(clip, uniform=uniform)
    assert torch.equal(out.drawn, model.masking.draw(out.log_probs, uniform))
    assert torch.equal(out.drawn.sort(1).values, out.visible) and not torch.equal(out.drawn, out.visible)
    assert torch.equal(model(clip, out.drawn).drawn, out.drawn)
