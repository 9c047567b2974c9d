"""How far raters agree beyond chance: Gwet's AC1 and AC2 (Gwet 2014, *Handbook of Inter-Rater Reliability*, 4th ed.).

n items · q categories · r ratings of an item
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama2.evaluate.intervals import finite_fields


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement beyond chance, with its standard error and 95 % interval; infinite where one item says nothing of it.

    `observed` is the agreement seen, `expected` the one by chance, `n` the items with two ratings or more.
    """

    value: float
    observed: float
    expected: float
    se: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Its fields; null for what is not finite."""
        return finite_fields(self)


def weights(q: int, kind: Literal["identity", "quadratic"]) -> NDArray[np.float64]:
    """How much two categories agree, (q, q): all or nothing for AC1; by the square of their distance for AC2."""
    if kind == "identity":
        return np.eye(q)
    places = np.arange(q)
    return np.asarray(1 - (places[:, None] - places) ** 2 / (q - 1) ** 2)


def gwet(counts: Sequence[Sequence[int]], kind: Literal["identity", "quadratic"] = "identity") -> Agreement:
    """Agreement of ratings, given for each item as how many raters chose each category (n, q).

    `identity` weights give AC1, `quadratic` ones AC2; the paper does not say which weights its AC2 has. The interval
    takes the items as a sample of all that could be rated. Items with one rating count towards chance alone. Raises
    ValueError without an item that has two ratings, and for fewer than two categories.
    """
    r = np.array(counts, np.float64)  # (n, q)
    if r.ndim != 2 or r.shape[1] < 2 or not (r.sum(axis=1) >= 2).any():
        raise ValueError("agreement needs an item with two ratings, of at least two categories")
    q = r.shape[1]
    w = weights(q, kind)
    raters = r.sum(axis=1)
    r, raters = r[raters > 0], raters[raters > 0]
    several = raters >= 2
    shares = (r / raters[:, None]).mean(axis=0)  # (q,)
    scale = w.sum() / (q * (q - 1))
    expected = float(scale * (shares * (1 - shares)).sum())
    pairs = (r * (r @ w.T - 1)).sum(axis=1)[several] / (raters * (raters - 1))[several]
    observed = float(pairs.mean())
    value = (observed - expected) / (1 - expected)
    n, m = len(r), int(several.sum())
    if n < 2:
        return Agreement(value, observed, expected, math.inf, -math.inf, math.inf, m)
    own = np.zeros(n)
    own[several] = n / m * (pairs - expected) / (1 - expected)
    by_chance = scale * ((r / raters[:, None]) * (1 - shares)).sum(axis=1)
    influence = own - 2 * (1 - value) * (by_chance - expected) / (1 - expected)
    se = math.sqrt(((influence - value) ** 2).sum() / (n * (n - 1)))
    half = _student(n - 1) * se
    return Agreement(value, observed, expected, se, max(-1.0, value - half), min(1.0, value + half), m)


def _student(df: int) -> float:
    """Student's quantile of a two-sided interval of 95 %, by the expansion of Hill 1970, to 1e-4 from df = 3 on."""
    exact = {1: 12.7062, 2: 4.3027}
    if df in exact:
        return exact[df]
    z = 1.959964
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / df + g2 / df**2 + g3 / df**3 + g4 / df**4


def counted(ratings: Mapping[str, Sequence[int]], q: int) -> list[list[int]]:
    """Ratings of each item, from 0 to q - 1, as how many raters chose each of the q categories."""
    return [[list(some).count(category) for category in range(q)] for some in ratings.values()]
