"""Confidence intervals of scores, after Miller, *Adding Error Bars to Evals* (2024, arXiv 2411.00640).

A benchmark's items are a sample of the questions that could be asked. The standard error of their mean says how far
another sample's mean would lie. All intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: The normal quantile of a two-sided interval of 95 %.
Z = NormalDist().inv_cdf(0.975)
#: Items below which a proportion's interval is Wilson's, as the normal approximation is poor.
_FEW = 100


def finite_fields(record: DataclassInstance) -> dict[str, Any]:
    """A record's fields for JSON, which has no number that is not finite: null stands for it."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(record).items()
    }


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval, in the units of the values.

    `se` is the standard error, and `n` the number of values. `clusters` is the number of groups of values that depend
    on each other, None where all are independent. `se`, `low` and `high` are infinite where one value or cluster says
    nothing about the spread.
    """

    mean: float
    se: float
    low: float
    high: float
    n: int
    clusters: int | None
    method: str

    def to_json(self) -> dict[str, Any]:
        """Its fields; null for what is not finite."""
        return finite_fields(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Interval:
        """What `to_json` returned, as it was."""
        unknown: dict[str, Any] = {"se": math.inf, "low": -math.inf, "high": math.inf, "clusters": None}
        return cls(**{name: unknown[name] if value is None else value for name, value in fields.items()})


def mean_interval(values: Sequence[float], clusters: Sequence[str] | None = None, *, proportion: bool) -> Interval:
    """The mean of values with its interval. `clusters` names the cluster of each value.

    A `proportion` is a mean of zeros and ones. Its interval is Wilson's below 100 independent values. So it is wherever
    all values are equal, as their spread is then zero; each cluster counts as one value there. Raises ValueError
    without values.
    """
    x = np.asarray(values, np.float64)  # (n,)
    if not len(x):
        raise ValueError("a mean of no values has no interval")
    count = None if clusters is None else len(set(clusters))
    mean, se = math.fsum(values) / len(x), standard_error(values, clusters)
    independent = len(x) if count is None else count
    if proportion and (bool((x == x[0]).all()) or (count is None and len(x) < _FEW)):
        low, high = wilson(mean, independent)
        return Interval(mean, se, low, high, len(x), count, "Wilson")
    low, high = mean - Z * se, mean + Z * se
    if proportion:
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(mean, se, low, high, len(x), count, "normal" if count is None else "normal, clustered")


def standard_error(values: Sequence[float], clusters: Sequence[str] | None = None) -> float:
    """Standard error of the mean of values, infinite for one value or one cluster.

    Without clusters it is the central limit theorem's, s / √n (Miller, 2.1). With clusters, deviations are added up
    within each before they are squared (Miller, 2.2), times √(G / (G - 1)) for G clusters. Clusters of one value each
    then give the first formula exactly, and so do the means of a question's samples when each has equally many.
    """
    x = np.asarray(values, np.float64)
    deviations = x - math.fsum(values) / len(x)  # (n,)
    if clusters is not None:
        _, of = np.unique(np.asarray(clusters, str), return_inverse=True)
        deviations = np.asarray(np.bincount(of, deviations), np.float64)  # (G,)
    groups = len(deviations)
    if groups < 2:
        return math.inf
    return math.sqrt(groups / (groups - 1) * math.fsum(deviations**2)) / len(x)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion `mean` of `n` independent items."""
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def weighted_mean(parts: Sequence[Interval], weights: Sequence[float] | None = None) -> Interval:
    """The mean of independent means, such as a group of tasks; `weights` are relative, by default equal.

    Raises ValueError without parts.
    """
    if not parts:
        raise ValueError("a mean of no parts has no interval")
    shares = [1.0] * len(parts) if weights is None else list(weights)
    total = math.fsum(shares)
    mean = math.fsum(w * part.mean for w, part in zip(shares, parts, strict=True)) / total
    se = math.sqrt(math.fsum((w * part.se) ** 2 for w, part in zip(shares, parts, strict=True))) / total
    n = sum(part.n for part in parts)
    return Interval(mean, se, mean - Z * se, mean + Z * se, n, None, "normal, of independent means")
