"""The ranking objective: values worked out by hand (spec 12.5), margins, the safety loss, and what does not matter."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from llama2.align.ranking import pair_scores, ranking, ranking_losses, safety_losses
from llama2.data.pairs import Pairs, TokenizedPair
from llama2.model.heads import RewardTransformer
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Step
from models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of spec 12.5, by the difference of the scores, for margins of 0, 1/3, 2/3, 1, 2 and 3.
MARGINS = (0, 1 / 3, 2 / 3, 1, 2, 3)
LOSSES = {
    2.0: (0.126928, 0.173008, 0.233963, 0.313262, 0.693147, 1.313262),
    0.5: (0.474077, 0.613282, 0.779949, 0.974077, 1.701413, 2.578890),
    -1.0: (1.313262, 1.567296, 1.839675, 2.126928, 3.048587, 4.018150),
}


@pytest.mark.parametrize("difference", [*LOSSES])
def test_losses_of_the_check_table(difference: float) -> None:
    scores = torch.tensor([0.25 + difference] * 6), torch.full((6,), 0.25)
    losses = ranking_losses(*scores, torch.tensor(MARGINS))
    assert losses.tolist() == pytest.approx(LOSSES[difference], abs=1e-6)
    assert ranking_losses(torch.tensor([-200.0]), torch.tensor([200.0]), torch.zeros(1)).item() == 400


def test_margins_of_another_shape_are_refused() -> None:
    """(B,) − (B, 1) would be (B, B): losses of pairs that do not exist."""
    with pytest.raises(ValueError, match=r"one shape, not \(3,\), \(3,\), \(3, 1\)"):
        ranking_losses(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))


def test_the_safety_loss_by_hand() -> None:
    """−log σ(2) = log(1 + e^−2), −log(1 − σ(1)) = log(1 + e); a pair without a label has none."""
    scores = torch.tensor([[2.0, 1.0], [3.0, -3.0], [0.0, 0.0]], requires_grad=True)
    safe = torch.tensor([[1.0, 0.0], [math.nan, math.nan], [0.0, 0.0]])
    losses = safety_losses(scores, safe)
    expected = [(math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2, 0.0, math.log(2)]
    assert losses.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    sigma = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert gradient.flatten().tolist() == pytest.approx([(sigma[0] - 1) / 2, sigma[1] / 2, 0, 0, 0.25, 0.25])


def network() -> RewardTransformer:
    model = RewardTransformer(tiny_config())
    model.initialise(torch.Generator().manual_seed(0))
    return model


def pairs(*sizes: tuple[int, int], label: float = 1.0) -> list[TokenizedPair]:
    rng = np.random.default_rng(0)
    return [
        TokenizedPair(
            rng.integers(3, 319, a).astype(np.int32), rng.integers(3, 319, b).astype(np.int32), i / 3, (label, 0.0)
        )
        for i, (a, b) in enumerate(sizes)
    ]


def step_of(model: RewardTransformer, weight: float = 0.0) -> Step:
    objective = partial(ranking, safety_weight=weight)
    return Step(model, objective, optimizer=OptimizerSettings(clip=1e9), precision="fp32")


SIZES = ((5, 60), (30, 7), (64, 2), (9, 9), (100, 3))


def test_a_score_does_not_depend_on_what_is_beside_it() -> None:
    """Neither on the pairs of a batch, nor on padding: each sequence alone, in a row of its own, is the truth."""
    model, examples = network(), pairs(*SIZES)
    running = step_of(model).running
    with torch.no_grad():
        together = pair_scores(running, Pairs("p", examples).batch([3, 0, 4, 2, 1]))
        padded = pair_scores(running, Pairs("p", examples, fixed=True).batch([1]))
        for place, number in enumerate([3, 0, 4, 2, 1]):
            for side, tokens in enumerate((examples[number].chosen, examples[number].rejected)):
                states = model.hidden_states(torch.from_numpy(tokens.astype(np.int64))[None])
                alone = model.scores(states[0, -1])
                assert together[place, side].item() == pytest.approx(alone.item(), abs=1e-6)
        assert torch.equal(padded[0].sign(), together[4].sign())
        torch.testing.assert_close(padded[0], together[4], rtol=0, atol=1e-6)


def test_a_step_is_the_mean_over_pairs_however_they_are_divided() -> None:
    """Two micro-batches of unlike sizes against one batch, and the loss against the formula written out."""
    model, examples = network(), pairs(*SIZES)
    source = Pairs("p", examples)
    step = step_of(model, 0.5)
    with torch.no_grad():
        scores = pair_scores(step.running, source.batch(range(5)))
    safe = torch.tensor([[1.0, 0.0]] * 5)
    bce = -(safe * scores.sigmoid().log() + (1 - safe) * (1 - scores.sigmoid()).log()).mean(-1)
    rank = torch.log1p(torch.exp(-(scores[:, 0] - scores[:, 1] - torch.arange(5) / 3)))
    whole = step.step([source.batch(range(5))], 0.0)
    parts = step.step([source.batch([0, 1, 2, 3]), source.batch([4])], 0.0)
    assert whole.loss == pytest.approx((rank + 0.5 * bce).mean().item(), rel=1e-5)
    assert (parts.loss, parts.norm) == (pytest.approx(whole.loss), pytest.approx(whole.norm, rel=1e-4))
    assert (whole.count, parts.count) == (5, 5)


def test_what_comes_after_the_end_token_has_no_gradient() -> None:
    """The states of every other token but the two that are read, and those that these read, get exactly nothing."""
    model, source = network(), Pairs("p", pairs((5, 60)))
    batch = source.batch([0])
    batch.tokens[batch.documents == batch.documents[0, -1]] = 319  # the filler, which no sequence has
    examples = source._pairs[0]
    ranking(step_of(model).running, batch).backward()  # type: ignore[no-untyped-call]
    gradient = model.tok_embeddings.weight.grad
    assert gradient is not None
    assert not gradient[319].any()
    assert gradient[int(examples.chosen[-1])].any()
    assert model.score.weight.grad is not None


def test_training_ranks_what_it_was_shown() -> None:
    model, source = network(), Pairs("p", pairs(*SIZES))
    step = step_of(model)
    before = step.evaluate([source.batch(range(5))])
    for _ in range(30):
        step.step([source.batch(range(5))], 3e-3)
    assert step.evaluate([source.batch(range(5))]) < before / 3
