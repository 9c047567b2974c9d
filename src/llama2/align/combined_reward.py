"""One reward of two: safety where it matters, helpfulness elsewhere (paper 3.2.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Below this safety reward, 0.89 of answers are unsafe, and 0.55 of the unsafe ones are found (paper 3.2.3).
THRESHOLD = 0.15


def combined(
    helpful: ArrayLike, safety: ArrayLike, tagged: ArrayLike, threshold: float = THRESHOLD
) -> NDArray[np.float64]:
    """R_c (n,): the safety reward where the prompt is tagged or that reward is below the threshold, else the other."""
    r_s = np.asarray(safety, np.float64)
    return np.where(np.asarray(tagged, np.bool_) | (r_s < threshold), r_s, np.asarray(helpful, np.float64))
