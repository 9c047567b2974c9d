"""Best of K: what the best, or the median, of K answers is worth on average, from N ≥ K that were drawn.

A subset of K of the N answers, drawn without replacement, is distributed as K fresh answers are. The mean over all
subsets is therefore unbiased, and its weights are known (order statistics, David and Nagaraja 2003, 2). One subset
alone would waste the others.

P prompts  N answers to each  K = 1 … N
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@cache
def weights(n: int, k: int, place: int) -> Floats:
    """Probability (n,) that each of n ordered answers is number `place` (1: the worst) of k random ones among them.

    For answer i it is C(i − 1, place − 1) · C(n − i, k − place) / C(n, k). Raises ValueError unless 1 ≤ place ≤ k ≤ n.
    """
    if not 1 <= place <= k <= n:
        raise ValueError(f"place={place}, k={k}, n={n} must not decrease, from 1")
    subsets = math.comb(n, k)
    found = np.array([math.comb(i - 1, place - 1) * math.comb(n - i, k - place) / subsets for i in range(1, n + 1)])
    found.flags.writeable = False  # because it is cached
    return found


def best_of(rewards: ArrayLike, values: ArrayLike | None = None) -> Floats:
    """Expected reward (P, K) of the best of each number of answers, from rewards (P, N) in the order of drawing.

    With `values` (P, N), the expected value of that best answer instead, such as its length. Of equal answers, the one
    drawn first is the best.
    """
    given = np.asarray(rewards, np.float64)
    latest = np.broadcast_to(-np.arange(given.shape[1]), given.shape)
    order = np.lexsort((latest, given))  # (P, N), from the worst to the best
    of_each = given if values is None else np.asarray(values, np.float64)
    n = given.shape[1]
    maxima = np.stack([weights(n, k, k) for k in range(1, n + 1)])  # (K, N)
    return np.take_along_axis(of_each, order, 1) @ maxima.T


def median_of(rewards: ArrayLike) -> Floats:
    """Expected median (P, K) of each number of answers; of an even one, the mean of the middle two."""
    ordered = np.sort(np.asarray(rewards, np.float64), 1)
    n = ordered.shape[1]
    medians = np.stack([(weights(n, k, (k + 1) // 2) + weights(n, k, k // 2 + 1)) / 2 for k in range(1, n + 1)])
    return ordered @ medians.T


def kl_bound(k: int) -> float:
    """The most KL divergence, in nats, of the best of k answers from the policy that drew them: log k − (k − 1) / k.

    It is exact where no two answers are equal (Stiennon et al. 2020, G.3), else an upper bound (Beirami et al. 2024).
    """
    return math.log(k) - (k - 1) / k
