"""Whether probabilities are as often right as they say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BINS = 10


class ReliabilityBin(NamedTuple):
    """Predictions whose confidence is from `low` to `high`: how many, mean confidence, and the share that is right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(confidence: NDArray[np.float64], right: NDArray[Any], *, lowest: float = 0.0) -> list[ReliabilityBin]:
    """Ten bins of equal width from `lowest` to 1, without empty ones, of confidences (n,) and what was right (n,)."""
    places = np.minimum(((confidence - lowest) / (1 - lowest) * _BINS).astype(int), _BINS - 1)
    found = []
    for number in range(_BINS):
        inside = places == number
        if inside.any():
            low, high = (lowest + (1 - lowest) * (number + end) / _BINS for end in (0, 1))
            means = float(confidence[inside].mean()), float(right[inside].mean())
            found.append(ReliabilityBin(low, high, int(inside.sum()), *means))
    return found


def expected_error(bins: Iterable[ReliabilityBin]) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy (Naeini et al. 2015)."""
    some = list(bins)
    return sum(each.n * abs(each.confidence - each.accuracy) for each in some) / sum(each.n for each in some)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[Any]) -> float:
    """Expected calibration error of confidences (n,) from 0 to 1; n is at least 1."""
    return expected_error(reliability(confidence, right))
