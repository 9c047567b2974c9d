"""From rewards of whole answers to advantages of their tokens (paper 3.2.3; GAE: Schulman et al. 2016).

B answers  T tokens of an answer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Rewards are held this far from 0 and 1, where LOGIT is infinite. The paper does not say how.
CLAMP = 1e-6
#: A float, or a Fraction for those who check the arithmetic.
Number = Any


def logit(rewards: ArrayLike, clamp: float = CLAMP) -> NDArray[np.float64]:
    """LOGIT: log(q / (1 − q)) of rewards from 0 to 1, which are finite also at both ends."""
    q = np.clip(np.asarray(rewards, np.float64), clamp, 1 - clamp)
    return np.log(q) - np.log1p(-q)


def whiten(values: ArrayLike) -> NDArray[np.float64]:
    """WHITEN: mean 0 and population variance 1; all 0 where the values are equal, since none is better then."""
    given = np.asarray(values, np.float64)
    away = given - given.mean()
    deviation = given.std()
    # Equal values may have a mean that is another number by rounding.
    return np.zeros_like(away) if deviation <= 1e-12 * np.abs(given).max() else away / deviation


def token_rewards(
    reward: float, logprobs: NDArray[np.float64], reference: NDArray[np.float64], beta: float
) -> NDArray[np.float64]:
    """Rewards (T,) of an answer's tokens: −β × the log-ratio to the reference at each, and the answer's at its last.

    The sum of log-ratios has the KL divergence as its mean over answers. As a reward it has the right gradient. As a
    loss it would have one of zero, because the mean of a score function is 0.
    """
    rewards = -beta * (logprobs - reference)
    rewards[-1] += reward
    return rewards


def gae(rewards: Sequence[Number], values: Sequence[Number], gamma: Number, lam: Number) -> list[Number]:
    """Generalised advantage estimates of an answer's T tokens; nothing comes after the last."""
    found: list[Number] = []
    later = after = None  # the advantage and the value at the next token
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        here = reward - value
        if after is not None:
            here = here + gamma * after + gamma * lam * later
        found.append(here)
        later, after = here, value
    return found[::-1]
