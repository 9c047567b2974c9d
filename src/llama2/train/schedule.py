"""The learning rate: linear warm-up, then a cosine down to a share of its peak (paper 2.2, spec 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from llama2.recipe import Settings


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, final: float = 0.1, start: float = 0.0) -> float:
    """Of step 1 … `steps`: in a straight line from `start` to the peak at step `warmup`, `final` of it at the end."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) / 2 * (1 + math.cos(math.pi * done)))


class Part(Settings):
    """A part of a run, from the step after `begin` to step `steps` of the run or the next part.

    A run has one, and one more for each time that it was continued with another schedule.
    """

    begin: int = Field(0, ge=0)
    start: float = Field(0.0, ge=0)
    peak: float = Field(gt=0)
    warmup: int = Field(ge=0)
    final: float = Field(ge=0, le=1)
    steps: int = Field(ge=1)


def rate_of(parts: Sequence[Part], step: int) -> float:
    """The learning rate of step 1 …: that of the last part which begins before it; the first one begins at 0."""
    part = [part for part in parts if part.begin < step][-1]
    return learning_rate(
        step - part.begin,
        peak=part.peak,
        warmup=part.warmup,
        steps=part.steps - part.begin,
        final=part.final,
        start=part.start,
    )
