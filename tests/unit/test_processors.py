"""Rules of sampling as processors, beside transformers' and arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TypicalLogitsWarper

from llama2.engine.processors import keep_typical, penalise_recent

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], np.int32)


def row(seed: int, size: int = 200, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.7, 0.95])
def test_typical_tokens_are_transformers(mass: float) -> None:
    for seed in range(20):
        logits = row(seed)
        if seed % 2:
            logits[::3] = -np.inf  # as a grammar's mask does
        expected = TypicalLogitsWarper(mass)(torch.tensor([[0]]), torch.tensor(logits[None]).double())[0]
        keep_typical(mass)(logits, TOKENS, 3)
        assert np.array_equal(np.isfinite(logits), np.isfinite(expected.numpy()))


def test_typical_tokens_of_a_small_row() -> None:
    """Of 0.6, 0.3 and 0.1, with 0.74, 1.74 and 3.32 bits, the entropy is 1.30: 0.3 is nearest to it, then 0.6."""
    for mass, kept in ((0.2, [1]), (0.5, [0, 1]), (0.95, [0, 1, 2])):
        logits = np.log(np.array([0.6, 0.3, 0.1])).astype(np.float32)
        keep_typical(mass)(logits, TOKENS, 1)
        assert np.flatnonzero(np.isfinite(logits)).tolist() == kept


@pytest.mark.parametrize("window", [1, 4, 10, 64])
def test_repeated_tokens_are_penalised_within_the_window(window: int) -> None:
    logits = row(7)
    recent = torch.tensor(TOKENS[None, -window:].astype(np.int64))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(recent, torch.tensor(logits[None]))[0]
    penalise_recent(window, repetition=1.7)(logits, TOKENS, 3)
    assert np.allclose(logits, expected.numpy(), rtol=1e-6)


def test_presence_counts_once_and_frequency_each_time() -> None:
    """The last four tokens are 2, 6, 5 and 3, and of the last seven 5 stands there twice."""
    for window, fives in ((4, 1), (7, 2)):
        logits = np.zeros(10, np.float32)
        penalise_recent(window, presence=0.5, frequency=0.25)(logits, TOKENS, 3)
        assert logits[5] == pytest.approx(-0.5 - 0.25 * fives)
        assert logits[6] == pytest.approx(-0.75)
        assert logits[4] == 0 == logits[0]
