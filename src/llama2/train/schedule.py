"""The learning rate: linear warm-up, then a cosine down to a share of its peak (paper 2.2, spec 3.2)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, final: float = 0.1) -> float:
    """Of step 1 … `steps`: step / warmup of the peak while that is less than one, `final` of it at the end."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) / 2 * (1 + math.cos(math.pi * done)))
