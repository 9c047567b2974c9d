"""Native sampling against hand arithmetic, published vectors, and the sampler written out in NumPy."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import oracle_sampling as oracle
from llama2 import native
from llama2.engine.request import Request, Sampling
from llama2.engine.sampling import Sampler, logprob
from llama2.errors import EngineError, RequestError


@pytest.fixture(params=native.supported(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on each instruction set of this machine."""
    monkeypatch.setenv("LLAMA2_ISA", request.param)
    return request.param


def draw(
    logits: list[float] | NDArray[np.float32], answer: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), **s: Any
) -> int:
    request = Request(prompt, sampling=Sampling(**s))
    return Sampler(request).draw(np.array(logits, np.float32), np.array(prompt + answer, np.int32))


def frequencies(logits: list[float], n: int = 4000, **s: Any) -> list[float]:
    """How often each token is drawn at the positions 1 … n of one answer."""
    sampler = Sampler(Request((0,), sampling=Sampling(**{"top_p": 1, "temperature": 1, **s})))
    row = np.array(logits, np.float32)
    counts = Counter(sampler.draw(row, np.zeros(i + 1, np.int32)) for i in range(n))
    return [counts[token] / n for token in range(len(logits))]


def test_random_numbers_are_philox_of_seed_choice_and_position() -> None:
    # Known answers of Random123 for philox4x64-10: the first word of each output block.
    uniform = native.module().uniform
    assert uniform(0, 0, 0) == (0x16554D9ECA36314C >> 11) * 2**-53
    keys = [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2**64 - 1, 5, 2**40), (123, 2**63, 7)]
    assert [uniform(*key) for key in keys] == [oracle.uniform(*key) for key in keys]
    # 2 ** 16 equally likely tokens in the order of their ids: the draw is the number's upper sixteen bits.
    equal = np.zeros(1 << 16, np.float32)
    for seed, choice, position in keys[1:3]:
        request = Request((0,), sampling=Sampling(temperature=1, top_p=1, seed=seed), choice=choice)
        token = Sampler(request).draw(equal, np.zeros(position, np.int32))
        assert token == math.floor(oracle.uniform(seed, choice, position) * (1 << 16))


THIRD = 1 / 3


@pytest.mark.parametrize(
    ("p", "top_p", "expected"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.9, [0.526316, 0.315789, 0.157895, 0]),  # spec 12.3
        ([0.5, 0.3, 0.15, 0.05], 0.500001, [0.625, 0.375, 0, 0]),
        ([0.5, 0.3, 0.15, 0.05], 0.499999, [1, 0, 0, 0]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [THIRD, THIRD, THIRD, 0]),  # exactly half lies before the third
        ([0.25, 0.25, 0.25, 0.25], 0, [1, 0, 0, 0]),
    ],
)
def test_top_p_keeps_a_token_while_the_mass_before_it_is_at_most_p(
    p: list[float], top_p: float, expected: list[float]
) -> None:
    drawn = frequencies(np.log(p).tolist(), top_p=top_p)
    assert drawn == pytest.approx(expected, abs=0.03)
    assert [f > 0 for f in drawn] == [e > 0 for e in expected]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [4 / 7, 2 / 7, 1 / 7, 0]),  # of two equal ones the lower id
        ({"min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.6, "top_k": 3}, [2 / 3, 1 / 3, 0, 0]),  # 4/7 ≤ 0.6 < 6/7: top-k first
        ({"logit_bias": {0: -math.inf, 2: math.log(2)}}, [0, 0.4, 0.4, 0.2]),
    ],
)
def test_how_often_tokens_are_drawn(settings: dict[str, Any], expected: list[float]) -> None:
    drawn = frequencies(np.log([4, 2, 1, 1]).tolist(), **settings)
    assert drawn == pytest.approx(expected, abs=0.03)
    assert [f > 0 for f in drawn] == [p > 0 for p in expected]


@pytest.mark.parametrize(
    ("logits", "prompt", "answer", "settings", "token"),
    [
        ([1, 3, 3, 2], (0,), (), {}, 1),  # of equal ones the lowest id
        ([3, 2.9], (0,), (), {"repetition_penalty": 1.1}, 1),  # 3 / 1.1 < 2.9
        ([-1, -1.05], (0,), (), {"repetition_penalty": 1.1}, 1),  # -1 * 1.1 < -1.05
        ([3, 2.9], (0,), (), {"presence_penalty": 1, "frequency_penalty": 1}, 0),  # the prompt does not count
        ([3, 2.9], (1,), (0,), {"presence_penalty": 0.2}, 1),
        ([3, 2.5], (1,), (0, 0), {"presence_penalty": 0.4}, 0),  # once, however often
        ([3, 2.5], (1,), (0, 0), {"frequency_penalty": 0.3}, 1),  # for each time: 3 - 0.6
        ([3, 2.5], (1,), (0,), {"frequency_penalty": 0.3}, 0),
        ([3, 0, 0], (1,), (), {"logit_bias": {2: 4.0, 1: -9.0}}, 2),
    ],
)
def test_penalties_and_bias_by_hand(
    logits: list[float], prompt: tuple[int, ...], answer: tuple[int, ...], settings: dict[str, Any], token: int
) -> None:
    assert draw(logits, answer, prompt, temperature=0, **settings) == token
    assert draw(logits, answer, prompt, temperature=1, top_k=1, **settings) == token


def test_draws_equal_those_of_the_oracle() -> None:
    rng = np.random.default_rng(1)
    for _ in range(400):
        size = int(rng.choice([2, 33, 320, 5000]))
        logits = (rng.normal(0, rng.choice([0.1, 2, 8]), size)).astype(np.float32)
        logits[rng.integers(0, size, 3)] = logits[0]
        prompt = rng.integers(0, size, int(rng.integers(1, 20)))
        history = np.concatenate([prompt, rng.integers(0, size, int(rng.integers(0, 20)))]).astype(np.int32)
        s = Sampling(
            temperature=float(rng.choice([0, 0.3, 1, 2.5])),
            top_p=float(rng.choice([1, 0.9, 0.5, 0.1])),
            top_k=int(rng.choice([0, 1, 40, 10_000])),
            min_p=float(rng.choice([0, 0.05])),
            repetition_penalty=float(rng.choice([1, 1.3, 0.8])),
            presence_penalty=float(rng.choice([0, 0.5, -1])),
            frequency_penalty=float(rng.choice([0, 0.25])),
            logit_bias={int(t): float(v) for t, v in zip(rng.integers(0, size, 2), rng.normal(0, 2, 2), strict=True)},
            seed=int(rng.integers(0, 2**63)),
        )
        request = Request(tuple(prompt.tolist()), sampling=s, choice=int(rng.integers(0, 9)))
        expected = oracle.draw(logits, s, history, len(prompt), request.choice)
        untouched = logits.copy()
        assert Sampler(request).draw(logits, history) == expected, s
        assert np.array_equal(logits, untouched)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_temperature_near_zero_is_nearly_greedy(temperature: float) -> None:
    assert draw([1, 30, 2, 29.5], temperature=temperature) == 1


@pytest.mark.parametrize("logits", [[math.nan, 1, 2], [1, math.nan, 2], [1, 2, math.inf], [-math.inf] * 3])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_leave_no_choice_are_an_error(logits: list[float], temperature: float) -> None:
    with pytest.raises(EngineError, match="position 1: there is nothing to draw"):
        draw(logits, temperature=temperature)
    with pytest.raises(EngineError, match="nothing to draw"):
        draw([1, 2, 3], temperature=temperature, logit_bias=dict.fromkeys(range(3), -math.inf))


def test_log_probabilities() -> None:
    half = logprob(np.log(np.array([0.25, 0.5, 0.25], np.float32)), 1, 3)
    assert (half.token, half.logprob) == (1, pytest.approx(math.log(0.5)))
    assert [token for token, _ in half.top] == [1, 0, 2]
    logits = np.random.default_rng(0).normal(0, 5, 49_152).astype(np.float32)
    logits[100] = -np.inf
    expected = oracle.log_softmax(logits)
    for token, top in [(0, 0), (7, 1), (49_151, 20)]:
        found = logprob(logits, token, top)
        assert found.logprob == pytest.approx(expected[token], abs=2e-6)
        best = np.argsort(-expected)[:top]
        assert [t for t, _ in found.top] == best.tolist()
        assert [v for _, v in found.top] == pytest.approx(expected[best].tolist(), abs=2e-6)
    assert logprob(logits, 100, 0).logprob == -math.inf
    with pytest.raises(EngineError, match="not a number"):
        logprob(np.array([1, math.nan], np.float32), 1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("temperature", 1e308), ("temperature", "1"), ("top_p", 1.1),
     ("top_k", -1), ("top_k", 1.5), ("min_p", 2), ("repetition_penalty", 0), ("presence_penalty", math.inf),
     ("seed", -1), ("seed", 2**64), ("seed", True), ("logit_bias", {-1: 0.0}), ("logit_bias", {"a": 0.0}),
     ("logit_bias", {1: math.nan}), ("logit_bias", {1: "x"})],
)  # fmt: skip
def test_sampling_values_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]
