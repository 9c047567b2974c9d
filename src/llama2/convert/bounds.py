"""How far a rounded number may be from its source: what each number format allows, from the source's numbers alone.

A block's scale d and minimum m are float16: they are off by up to 2^−11 of themselves, or 2^−25 where they are tiny. A
code of n stands for n·d and carries n times that. Shapes: n blocks of B numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_HALF, _TINY = 2.0**-11, 2.0**-25  # of float16: relative, and absolute where it has no leading one

#: Mean Kullback-Leibler divergence, in nats, of the next token's distribution from the source's, over the greedy text.
#: Three and more times what SmolLM2-135M showed, rounded a second time from Q4_1; a limit on gross mistakes alone.
DIVERGENCE = {
    "F16": 0.01,
    "BF16": 0.02,
    "Q8_0": 0.05,
    "Q5_1": 0.5,
    "Q5_0": 0.5,
    "Q4_1": 2.0,
    "Q4_0": 2.0,
}


def _largest(x: Floats) -> Floats:
    largest: Floats = np.abs(x).max(axis=1, keepdims=True)
    return largest  # (n, 1)


def _float(x: Floats, relative: float, tiny: float) -> Floats:
    return np.maximum(relative * np.abs(x), tiny)


def _q8_0(x: Floats) -> Floats:
    """Half of d = max|x| / 127."""
    return _largest(x) * (0.5 / 127 + _HALF) + 127 * _TINY


def _signed(x: Floats, half: int) -> Floats:
    """Half of d = max|x| / half, with codes −half to half − 1.

    −half has the sign of the largest, so the other end of the range falls short by up to d.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = np.abs(largest) / half
    beyond = -x * np.sign(largest) - (half - 1) * d
    return np.maximum(d / 2, beyond) + half * (d * _HALF + _TINY)


def _affine(x: Floats, top: int) -> Floats:
    """Half of d = (max − min) / top, and what the minimum is off by."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    d = (high - low) / top
    bound: Floats = d / 2 + top * (d * _HALF + _TINY) + np.abs(low) * _HALF + _TINY
    return bound


def groups(x: Floats) -> Floats:
    """llama2.c's integers: half of s = max|x| / 127, which is float32."""
    return _largest(x) * (0.5 / 127 + 2.0**-22)


#: (n, B) numbers of the source → the largest difference of each, (n, B) or (n, 1).
Bound = Callable[[Floats], Floats]

BOUNDS: dict[str, Bound] = {
    "F16": partial(_float, relative=_HALF, tiny=_TINY),
    "BF16": partial(_float, relative=2.0**-8, tiny=2.0**-134),
    "Q8_0": _q8_0,
    "Q4_0": partial(_signed, half=8),
    "Q5_0": partial(_signed, half=16),
    "Q4_1": partial(_affine, top=15),
    "Q5_1": partial(_affine, top=31),
}
