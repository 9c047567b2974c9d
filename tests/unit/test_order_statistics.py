"""Best of K from N answers: expectations over all subsets, worked by hand or by going through them."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, median

import numpy as np
import pytest

from llama2.align.order_statistics import best_of, kl_bound, median_of, weights


def test_the_best_of_two_from_four_by_hand() -> None:
    # Of the 6 pairs of answers 1, 2, 3, 4, none has answer 1 as its best, one answer 2, two answer 3, three answer 4.
    assert weights(4, 2, 2).tolist() == [0, 1 / 6, 2 / 6, 3 / 6]
    # (0.2 · 1 + 0.3 · 2 + 0.4 · 3) / 6 = 2 / 6
    assert best_of([[0.1, 0.4, 0.2, 0.3]])[0, 1] == pytest.approx(1 / 3)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_every_k_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(n)
    rewards, lengths = rng.random((3, n)), rng.random((3, n))
    for prompt in range(3):
        for k in range(1, n + 1):
            subsets = [*combinations(range(n), k)]
            best = [max(subset, key=lambda i: rewards[prompt, i]) for subset in subsets]
            assert best_of(rewards)[prompt, k - 1] == pytest.approx(fmean(rewards[prompt, best]))
            assert best_of(rewards, lengths)[prompt, k - 1] == pytest.approx(fmean(lengths[prompt, best]))
            medians = [median(rewards[prompt, list(subset)]) for subset in subsets]
            assert median_of(rewards)[prompt, k - 1] == pytest.approx(fmean(medians))


def test_of_equal_rewards_the_first_drawn_is_the_best() -> None:
    # Of pairs of (0, 1, 2), answers 0 and 1 are equal and best: 0 is chosen in (0, 1) and (0, 2), 1 in (1, 2).
    assert best_of([[1, 1, 0]], [[10, 20, 30]])[0, 1:] == pytest.approx([(10 + 10 + 20) / 3, 10])


def test_large_numbers_of_answers_stay_exact() -> None:
    # The best of K uniform numbers is K / (K + 1) on average; of N evenly spaced ones, K (N + 1) / ((K + 1) N).
    n = 1000
    found = best_of([[(i + 1) / n for i in range(n)]])[0]
    assert found == pytest.approx([k * (n + 1) / ((k + 1) * n) for k in range(1, n + 1)])


def test_the_bound_of_the_divergence() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 1 / 2)
    # K equally likely answers that all differ, without ties: the exact divergence from N equal answers nears the bound.
    n, k = 4000, 4
    chosen = weights(n, k, k)
    inside = chosen > 0
    assert float((chosen[inside] * np.log(chosen[inside] * n)).sum()) == pytest.approx(kl_bound(k), rel=2e-3)


def test_places_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="must not decrease"):
        weights(2, 3, 1)
