"""PPO's formulas by hand: LOGIT and whitening (spec 12.6), GAE, token rewards, both clipped losses."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from llama2.align.advantages import gae, logit, token_rewards, whiten
from llama2.align.combined_reward import combined
from llama2.align.surrogate import surrogate_losses, value_losses


def test_the_combined_reward_of_the_check_table() -> None:
    safety, helpful = [0.9, 0.10, 0.5, 0.14, 0.8, 0.3], [0.2, 0.9, 0.7, 0.95, 0.6, 0.4]
    logits = logit(combined(helpful, safety, [True, False, False, False, False, True]))
    assert logits.tolist() == pytest.approx([2.197225, -2.197225, 0.847298, -1.815290, 0.405465, -0.847298], abs=1e-6)
    assert (logits.mean(), logits.std()) == (pytest.approx(-0.234971, abs=1e-6), pytest.approx(1.539471, abs=1e-6))
    whitened = [1.579890, -1.274628, 0.703013, -1.026534, 0.416010, -0.397752]
    assert whiten(logits).tolist() == pytest.approx(whitened, abs=1e-6)
    assert logit([0.15])[0] == pytest.approx(-1.734601, abs=1e-6)


def test_logits_are_finite_at_both_ends() -> None:
    ends = logit([0.0, 1.0, 1e-300, 1 - 1e-17])
    assert np.isfinite(ends).all()
    assert ends.tolist() == pytest.approx([math.log(1e-6), -math.log(1e-6), math.log(1e-6), -math.log(1e-6)], rel=1e-5)
    assert np.isfinite(whiten(ends)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e9])
def test_equal_rewards_teach_nothing(value: float) -> None:
    """Three times 0.1 has a mean of another last bit: dividing by that deviation would make noise of it."""
    assert whiten([value] * 3).tolist() == [0, 0, 0]


def test_generalised_advantages_by_hand() -> None:
    # last: 1 − 1/2 = 1/2.   first: (0 + 1·1/2 − 1/2) + (1 · 1/2) · 1/2 = 1/4
    assert gae([Fraction(0), Fraction(1)], [Fraction(1, 2), Fraction(1, 2)], Fraction(1), Fraction(1, 2)) == [
        Fraction(1, 4),
        Fraction(1, 2),
    ]
    # γ = 1/2, λ = 1/2: δ₂ = 2 − 1 = 1; δ₁ = 1 + 1/2·1 − 3 = −3/2, A₁ = −3/2 + 1/4·1 = −5/4;
    # δ₀ = 0 + 1/2·3 − 2 = −1/2, A₀ = −1/2 + 1/4·(−5/4) = −13/16
    found = gae(
        [Fraction(0), Fraction(1), Fraction(2)], [Fraction(2), Fraction(3), Fraction(1)], Fraction(1, 2), Fraction(1, 2)
    )
    assert found == [Fraction(-13, 16), Fraction(-5, 4), Fraction(1)]
    # λ = 1, γ = 1: the sum of what comes, less the value
    assert gae(
        [Fraction(1), Fraction(2), Fraction(3)], [Fraction(5), Fraction(5), Fraction(5)], Fraction(1), Fraction(1)
    ) == [Fraction(1), Fraction(0), Fraction(-2)]
    assert gae([Fraction(3)], [Fraction(1)], Fraction(1), Fraction(1, 2)) == [Fraction(2)]


def test_the_answers_reward_is_on_its_last_token_and_the_divergence_on_each() -> None:
    logprobs, reference = np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -1.0, -0.5])
    # −0.1 × (0.5, −1, 0), and 2 on the last
    assert token_rewards(2.0, logprobs, reference, 0.1).tolist() == pytest.approx([-0.05, 0.1, 2.0])
    assert logprobs.tolist() == [-1.0, -2.0, -0.5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"), [(1.3, 1, 1.2), (0.7, 1, 0.7), (1.3, -1, -1.3), (0.7, -1, -0.8), (1.1, 2, 2.2)]
)
def test_the_surrogate_of_the_check_table(ratio: float, advantage: float, objective: float) -> None:
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = surrogate_losses(log_ratio, torch.tensor([float(advantage)]), 0.2)
    assert loss.item() == pytest.approx(-objective, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert log_ratio.grad is not None
    clipped = objective not in (ratio * advantage,)
    assert log_ratio.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "before", "returns", "loss"),
    [
        (1.0, 0.5, 2.0, 0.5 * 1.3**2),  # V′ = 0.5 + 0.2: farther from the return than V
        (0.6, 0.5, 2.0, 0.5 * 1.4**2),  # within 0.2: V itself
        (3.0, 0.5, 0.5, 0.5 * 2.5**2),  # V is farther than V′ = 0.7
        (0.5, 0.5, 0.5, 0.0),
    ],
)
def test_the_value_loss_by_hand(value: float, before: float, returns: float, loss: float) -> None:
    found = value_losses(torch.tensor([value]), torch.tensor([before]), torch.tensor([returns]), 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_values_of_another_shape_are_refused() -> None:
    """(N,) − (N, 1) would be (N, N): losses of tokens that do not exist."""
    with pytest.raises(ValueError, match=r"one shape, not \(3,\), \(3, 1\)"):
        surrogate_losses(torch.zeros(3), torch.zeros(3, 1), 0.2)
    with pytest.raises(ValueError, match=r"one shape, not \(3, 1\), \(3,\), \(3,\)"):
        value_losses(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), 0.2)


def test_divergence_as_a_loss_has_no_gradient_and_as_a_reward_it_has() -> None:
    """E[∇ log π/π₀] = 0 whatever π is, so that loss teaches nothing; the score function times that log-ratio does."""
    logits = torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64, requires_grad=True)
    start = torch.log_softmax(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), -1)
    logs = torch.log_softmax(logits, -1)
    probabilities = logs.exp().detach()
    as_loss = (probabilities * (logs - start)).sum()  # the mean over draws of the log-ratio, differentiated
    (gradient,) = torch.autograd.grad(as_loss, logits, retain_graph=True)
    assert gradient.abs().max() < 1e-12
    penalty = np.array([token_rewards(0.0, np.array([log]), np.array([ref]), 1.0)[0]
                        for log, ref in zip(logs.tolist(), start.tolist(), strict=True)])  # fmt: skip
    as_reward = (probabilities * surrogate_losses(logs - logs.detach(), torch.from_numpy(penalty), 0.2)).sum()
    (gradient,) = torch.autograd.grad(as_reward, logits, retain_graph=True)
    kl = (logs.exp() * (logs - start)).sum()
    (exact,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(gradient, exact)
