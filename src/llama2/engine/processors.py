"""Rules of sampling that the engine's own sampler does not have, as processors of logits (`request.Processor`)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from llama2.engine.request import Processor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def penalise_recent(
    window: int, *, repetition: float = 1.0, presence: float = 0.0, frequency: float = 0.0
) -> Processor:
    """Penalties that look at the last `window` tokens of prompt and answer alone, as llama.cpp's do.

    A token among them has its logit divided by `repetition`, or multiplied where it is negative. Then `presence` is
    subtracted once, and `frequency` for each time.
    """

    def process(logits: NDArray[np.float32], tokens: NDArray[np.int32], prompt: int) -> None:
        recent, counts = np.unique(tokens[-window:], return_counts=True)
        found = logits[recent]
        found = np.where(found > 0, found / repetition, found * repetition)
        logits[recent] = found - presence - frequency * counts

    return process


def keep_typical(mass: float) -> Processor:
    """Locally typical sampling (Meister et al. 2022): those tokens stay whose information is nearest to the entropy.

    They are the fewest whose probability is at least `mass`, of (0, 1). Temperature comes after it.
    """

    def process(logits: NDArray[np.float32], tokens: NDArray[np.int32], prompt: int) -> None:
        logprobs = logits.astype(np.float64) - np.max(logits)
        logprobs -= np.log(np.sum(np.exp(logprobs)))
        probabilities = np.exp(logprobs)
        possible = probabilities > 0
        entropy = -np.sum(probabilities[possible] * logprobs[possible])
        order = np.argsort(np.abs(-logprobs - entropy), kind="stable")
        kept = int(np.searchsorted(np.cumsum(probabilities[order]), mass)) + 1
        logits[order[kept:]] = -np.inf

    return process


def forbid_ends(ends: Collection[int], before: int | None) -> Processor:
    """None of the tokens `ends` comes before the answer has `before` tokens; None: never."""
    least, forbidden = math.inf if before is None else before, sorted(ends)

    def process(logits: NDArray[np.float32], tokens: NDArray[np.int32], prompt: int) -> None:
        if len(tokens) - prompt < least:
            logits[forbidden] = -np.inf

    return process
