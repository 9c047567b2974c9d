"""When a model should say nothing: does its own probability distinguish right answers from wrong ones?

A model that is asked for facts may answer the questions of which it is surest, and abstain from the rest. Risk is the
share of wrong answers among those given, coverage the share of questions answered (El-Yaniv and Wiener 2010).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama2.classify.calibration import calibration_error

#: The coverages whose accuracy is reported.
COVERAGES = (1.0, 0.75, 0.5, 0.25, 0.1)


def confidence(sample: Mapping[str, Any]) -> float:
    """A model's probability of its answer to an item of a run.

    Of choices, the likeliest one's share of the probability that they have together. Of an answer in its own words, the
    geometric mean of its tokens' probabilities. Raises KeyError for a sample without log-likelihoods.
    """
    if "continuations" in sample:
        logprobs = [each["logprob"] for each in sample["continuations"]]
        return 1 / math.fsum(math.exp(each - max(logprobs)) for each in logprobs)
    return math.exp(sample["logprobs"][0] / max(1, sample["tokens"][0]))


def abstention(confidences: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """How well confidences (n,) distinguish right answers (n,) of 1 from wrong ones of 0.

    `aurc` is the mean risk over all coverages, `risk` the one of all answers: by chance they are equal. `accuracy` and
    `threshold` are by coverage, where the surest are answered. A tie counts by the mean of its members.
    """
    sure, correct = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    order = np.argsort(-sure, kind="stable")
    tied = _means_of_ties(sure[order], correct[order])
    answered = np.arange(1, len(tied) + 1)
    risks = 1 - np.cumsum(tied) / answered  # of the k surest
    return {
        "n": len(tied),
        "risk": float(risks[-1]),
        "aurc": float(risks.mean()),
        "calibration_error": calibration_error(sure, correct > 0.5),
        "accuracy": {f"{share:g}": float(1 - risks[max(1, round(share * len(tied))) - 1]) for share in COVERAGES},
        "threshold": {f"{share:g}": float(sure[order][max(1, round(share * len(tied))) - 1]) for share in COVERAGES},
    }


def _means_of_ties(sure: np.ndarray[Any, Any], correct: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Each value of `correct` as the mean of those whose confidence is the same."""
    _, group, counts = np.unique(-sure, return_inverse=True, return_counts=True)
    return np.asarray(np.bincount(group, correct) / counts)[group]
