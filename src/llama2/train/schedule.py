"""The learning rate: linear warm-up, then a cosine down to a fraction of its peak (paper 2.2, spec 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import AliasChoices, Field

from llama2.recipe import Settings


def learning_rate(
    step: int, *, peak: float, warmup: int, steps: int, min_lr_ratio: float = 0.1, start: float = 0.0
) -> float:
    """Of step 1 … `steps`: in a straight line from `start` to the peak at step `warmup`, then along a cosine.

    At the end it is `min_lr_ratio` times the peak.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) / 2 * (1 + math.cos(math.pi * done)))


class SchedulePart(Settings):
    """A part of a run, from the step after `begin` to step `steps` of the run or the next part.

    A run has one, and one more for each time that it was continued with another schedule.
    """

    begin: int = Field(0, ge=0)
    start: float = Field(0.0, ge=0)
    peak: float = Field(gt=0)
    warmup: int = Field(ge=0)
    min_lr_ratio: float = Field(ge=0, le=1, validation_alias=AliasChoices("min_lr_ratio", "final"))  # its old name
    steps: int = Field(ge=1)


def lr_of(parts: Sequence[SchedulePart], step: int) -> float:
    """The learning rate of step 1 …: that of the last part which begins before it; the first one begins at 0."""
    part = [part for part in parts if part.begin < step][-1]
    return learning_rate(
        step - part.begin,
        peak=part.peak,
        warmup=part.warmup,
        steps=part.steps - part.begin,
        min_lr_ratio=part.min_lr_ratio,
        start=part.start,
    )
