"""Marks beside transformers' own processors for SynthID and green lists: bits, probabilities, and whole answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from transformers import SynthIDTextWatermarkLogitsProcessor, WatermarkLogitsProcessor

import oracle_sampling as oracle
from llama2.engine.request import Request, Sampling
from llama2.engine.sampling import Sampler
from llama2.engine.watermark import Kgw, SynthId, bits_of, native_of
from llama2.safety import detection

CONTEXTS, VOCABULARY = 1000, 300
rng = np.random.default_rng(0)
SYNTHID = SynthId(tuple(rng.integers(0, 2**63, 30).tolist()))
KGW = Kgw(15485863, 0.25, 2.0)


def their_synthid(watermark: SynthId) -> SynthIDTextWatermarkLogitsProcessor:
    return SynthIDTextWatermarkLogitsProcessor(
        ngram_len=watermark.ngram,
        keys=list(watermark.keys),
        sampling_table_size=1 << 16,
        sampling_table_seed=0,
        context_history_size=1024,
        device=torch.device("cpu"),
        skip_first_ngram_calls=True,
    )


def reweighed(watermark: SynthId | Kgw, before: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Our probabilities of every token, from scores (V,)."""
    weights = np.exp(scores.astype(np.float64))
    native_of(watermark).reweigh(before, np.arange(len(scores), dtype=np.int32), len(scores), weights)
    return np.asarray(weights / weights.sum())


def test_bits_and_probabilities_of_a_tournament() -> None:
    theirs = their_synthid(SYNTHID)
    contexts = rng.integers(0, VOCABULARY, (CONTEXTS, 4)).astype(np.int32)
    scores = rng.normal(0, 3, (CONTEXTS, VOCABULARY)).astype(np.float32)
    largest = 0.0
    for start in range(0, CONTEXTS, 100):
        part = torch.from_numpy(contexts[start : start + 100]).long()
        every = torch.arange(VOCABULARY).expand(100, -1)
        values = theirs.sample_g_values(theirs._compute_keys(part, every)[0])
        expected = torch.softmax(theirs.update_scores(torch.from_numpy(scores[start : start + 100]), values), 1)
        for i in range(100):
            row = start + i
            grams = np.concatenate([np.append(contexts[row], token) for token in range(0, VOCABULARY, 37)])
            bits = bits_of(SYNTHID, grams.astype(np.int32), VOCABULARY)[::5]
            layers = (bits[:, None] >> np.arange(30)) & 1
            assert (layers == values[i, ::37].numpy()).all()
            ours = reweighed(SYNTHID, contexts[row], scores[row])
            largest = max(largest, float(np.abs(ours - expected[i].numpy()).max()))
    assert largest < 1e-4  # theirs are in float32


@pytest.mark.parametrize("watermark", [KGW, Kgw((1 << 40) - 1, 0.5, 0.7)])
def test_green_lists(watermark: Kgw) -> None:
    theirs = WatermarkLogitsProcessor(VOCABULARY, "cpu", watermark.share, watermark.bias, watermark.key)
    contexts = rng.integers(0, VOCABULARY, (CONTEXTS, 1)).astype(np.int32)
    scores = rng.normal(0, 3, (CONTEXTS, VOCABULARY)).astype(np.float32)
    expected = torch.softmax(theirs(torch.from_numpy(contexts).long(), torch.from_numpy(scores)), 1).numpy()
    for row in range(CONTEXTS):
        assert np.abs(reweighed(watermark, contexts[row], scores[row]) - expected[row]).max() < 1e-5
    share = int(VOCABULARY * watermark.share) / VOCABULARY
    assert detection.chance(watermark, VOCABULARY) == share


def test_chance_is_the_share_of_set_rows_of_their_table() -> None:
    table = their_synthid(SYNTHID).sampling_table
    assert detection.chance(SYNTHID, VOCABULARY) == float(table.double().mean())


@pytest.mark.parametrize("vocabulary", [3, 40])
@pytest.mark.parametrize("kept", [{}, {"top_k": 2}, {"top_p": 0.7, "min_p": 0.05, "temperature": 1.5}])
def test_a_whole_answer_is_drawn_as_theirs(vocabulary: int, kept: dict[str, float]) -> None:
    """With few tokens contexts repeat, and are not marked again. Ours see the candidates that truncation left."""
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, "seed": 5, **kept})  # type: ignore[arg-type]
    prompt = [1, 2]
    sampler = Sampler(Request(tuple(prompt), sampling=sampling, watermark=SYNTHID))
    theirs = their_synthid(SYNTHID)
    tokens = list(prompt)
    changed = 0
    for _ in range(200):
        logits = rng.normal(0, 1, vocabulary).astype(np.float32)
        drawn = sampler.draw(logits.copy(), np.array(tokens, np.int32))
        left, p = oracle.distribution(logits, sampling)
        scores = torch.full((1, vocabulary), -torch.inf)
        scores[0, left] = torch.from_numpy(np.log(p)).float()
        ids = torch.tensor([tokens])
        expected = torch.softmax(theirs(ids, scores), 1)[0].double().numpy()
        cumulative = np.cumsum(expected[left])
        target = oracle.uniform(5, 0, len(tokens)) * cumulative[-1]
        assert drawn == left[np.argmax(cumulative > target)]
        changed += bool(np.abs(expected[left] - p).max() > 0.01)
        tokens.append(drawn)
    assert 0 < changed < (200 if vocabulary == 3 else 201)


def test_over_keys_a_tournament_has_the_models_own_distribution() -> None:
    """χ² of 6,000 draws under 300 sets of keys, each after a context of its own, and the mean of the probabilities."""
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    counts, mean = np.zeros(5), np.zeros(5)
    keys = rng.integers(0, 2**63, (300, 30)).tolist()
    for i in range(6000):
        before = rng.integers(0, 50_000, 4).astype(np.int32)
        weights = p.copy()
        native_of(SynthId(tuple(keys[i // 20]))).reweigh(before, np.arange(5, dtype=np.int32), 50_000, weights)
        counts[rng.choice(5, p=weights / weights.sum())] += 1
        mean += weights / weights.sum() / 6000
    assert chisquare(counts, p * 6000).pvalue > 0.001
    assert mean == pytest.approx(p, abs=0.015)
