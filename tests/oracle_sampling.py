"""The sampler written out in NumPy: what native sampling must agree with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama2.engine.request import Sampling

Floats = NDArray[np.float32]


def uniform(seed: int, choice: int, position: int) -> float:
    """53 random bits of Philox4x64-10's block number `position` under the key (seed, choice).

    NumPy counts up before it makes a block, so its counter starts one below, modulo 2 ** 256.
    """
    generator = np.random.Philox(key=np.array([seed, choice], np.uint64), counter=(position - 1) % 2**256)
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


def adjusted(logits: Floats, s: Sampling, history: NDArray[np.int32], prompt_length: int) -> Floats:
    """Logits after penalties and bias."""
    x = logits.copy()
    seen = np.unique(history)
    penalty = np.float32(s.repetition_penalty)
    x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    counts = np.bincount(history[prompt_length:], minlength=len(x)).astype(np.float32)
    x -= np.float32(s.presence_penalty) * (counts > 0) + np.float32(s.frequency_penalty) * counts
    for token, value in s.logit_bias.items():
        x[token] += np.float32(value)
    return x


def distribution(x: Floats, s: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn from adjusted logits, likeliest first and equal ones by id, and their probabilities."""
    x = x / np.float32(s.temperature)
    order = np.lexsort((np.arange(len(x)), -x))[: s.top_k or None]
    p = np.exp(x[order].astype(np.float64) - x.max())
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
    p = p[before <= s.top_p]
    p = p[p >= s.min_p * p[0]]
    return order[: len(p)], p / p.sum()


def draw(logits: Floats, s: Sampling, history: NDArray[np.int32], prompt_length: int, choice: int = 0) -> int:
    """The token that follows `history`."""
    x = adjusted(logits, s, history, prompt_length)
    if s.temperature == 0:
        return int(np.argmax(x))
    tokens, p = distribution(x, s)
    cumulative = np.cumsum(p)
    return int(tokens[np.argmax(cumulative > uniform(s.seed, choice, len(history)) * cumulative[-1])])


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())
