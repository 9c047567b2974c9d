"""Continuations are scored as by one forward pass over each alone, and what they have in common is computed once."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax

from fakes import VOCABULARY, ByteTokenizer, HistoryRunner
from llama2.engine.engine import Engine
from llama2.engine.request import Request
from llama2.engine.runner import BLOCK
from llama2.engine.scoring import Pair, Scored, score
from llama2.errors import ContextError, EngineError, RequestError


def row(history: list[int]) -> NDArray[np.float32]:
    """Logits that depend on every token before, and prefer the sum of the last two."""
    logits = np.random.default_rng(history).normal(size=VOCABULARY).astype(np.float32)
    logits[sum(history[-2:]) % 256] += 6
    return logits


def engine(**settings: int) -> Engine:
    return Engine(HistoryRunner(row, n_blocks=64), ByteTokenizer(), **settings)


def alone(pair: Pair) -> tuple[list[float], bool]:
    """What a forward pass over context and continuation says, by SciPy's log-softmax and NumPy's argmax."""
    context, continuation = map(list, pair)
    rows = [row(context + continuation[:i]).astype(np.float64) for i in range(len(continuation))]
    values = [log_softmax(each)[token] for each, token in zip(rows, continuation, strict=True)]
    return values, [int(each.argmax()) for each in rows] == continuation


def check(pairs: list[Pair], scored: list[Scored]) -> None:
    assert sorted(each.pair for each in scored) == list(range(len(pairs)))
    for index, logprobs, is_greedy in scored:
        expected, greedy = alone(pairs[index])
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
        assert is_greedy == greedy


def some_pairs(count: int) -> list[Pair]:
    rng = random.Random(count)
    contexts = [tuple(rng.choices(range(256), k=rng.choice([1, 31, 32, 33, 70]))) for _ in range(count // 4)]
    pairs: list[Pair] = []
    for _ in range(count):
        context = rng.choice(contexts)
        greedy = [*context]
        for _ in range(rng.choice([1, 1, 2, 5, 40])):
            greedy.append(sum(greedy[-2:]) % 256 if rng.random() < 0.8 else rng.randrange(256))
        pairs.append((context, greedy[len(context) :]))
    return pairs


@pytest.mark.parametrize("window", [1, 7, 256])
def test_scores_are_those_of_each_pair_alone(window: int) -> None:
    pairs, e = some_pairs(60), engine()
    scored = list(score(e, pairs, window=window))
    check(pairs, scored)
    assert {each.is_greedy for each in scored} == {True, False}
    assert not e.busy
    assert e.stats.held_blocks == 0


def test_an_engine_that_takes_no_continuations_has_a_request_for_each_pair() -> None:
    pairs, e = some_pairs(30), engine()
    e.scores_continuations = False
    e.add = lambda request: Engine.add(e, replace(request, continuations=()))  # type: ignore[method-assign]
    check(pairs, list(score(e, pairs)))


def test_the_context_and_the_last_token_of_a_continuation_run_once_or_never() -> None:
    """Contexts of 40 tokens and 4 continuations of 9: their other 8 tokens run behind one context."""
    e = engine()
    pairs: list[Pair] = [((context,) * 40, (end,) * 9) for context in (3, 4) for end in range(4)]
    check(pairs, list(score(e, pairs)))
    assert sum(e.runner.steps) == 2 * (40 + 4 * 8)  # type: ignore[attr-defined]
    assert sum(e.runner.rows) == 2 * (1 + 4 * 8)  # type: ignore[attr-defined]


def test_continuations_of_two_tokens_fill_the_step() -> None:
    """The one token that half of them run is not taken for an answer's, beside which chunks are small."""
    e = engine(max_prefill_tokens=1)
    pairs: list[Pair] = [((c, 1, 2), (end, 3, 4)[: 2 + c % 2]) for c in range(20) for end in range(3)]
    check(pairs, list(score(e, pairs)))
    assert e.runner.steps == [20 * 3, 30, 30, 30]  # type: ignore[attr-defined]


def test_answers_of_one_token_share_a_request_and_questions_their_shots() -> None:
    """Four questions of 9 tokens behind 70 tokens of shots, each with the same four letters."""
    shots, e = tuple(range(70)), engine()
    contexts = [shots + (question,) * 9 for question in (9, 3, 7, 5)]
    pairs: list[Pair] = [(context, (letter,)) for context in contexts for letter in b"ABCD"]
    check(pairs, list(score(e, pairs)))
    assert sum(e.runner.steps) == 79 + 3 * (79 - 2 * BLOCK)  # type: ignore[attr-defined]
    assert sum(e.runner.rows) == 4  # type: ignore[attr-defined]


def test_results_come_before_all_have_run_and_closing_cancels_the_rest() -> None:
    pairs, e = some_pairs(200), engine(max_batch_tokens=64)
    results = score(e, pairs)
    first = next(results)
    assert e.busy
    check([pairs[first.pair]], [first._replace(pair=0)])
    results.close()  # type: ignore[attr-defined]
    assert not e.busy
    assert e.stats.held_blocks == 0
    assert list(e.run(Request((1,), 1)))


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (((), (1,)), RequestError, "pair 1: the context is empty; give it at least one token, such as BOS"),
        (((1,), ()), RequestError, "pair 1: the continuation is empty; give it at least one token"),
        (((1,) * 200, (1,) * 57), ContextError, "pair 1: its 257 tokens do not fit the context of 256"),
        (((1,), (VOCABULARY,)), RequestError, r"continuations\[1\]: 257 is not a token"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_refused(pair: Pair, error: type[Exception], message: str) -> None:
    e = engine()
    with pytest.raises(error, match=message):
        list(score(e, [((1,), (2,)), pair]))
    assert not e.busy


def test_logits_that_are_not_numbers_end_it() -> None:
    e = Engine(HistoryRunner(lambda history: np.full(VOCABULARY, np.nan, np.float32)), ByteTokenizer())
    with pytest.raises(EngineError, match="not a number"):
        list(score(e, some_pairs(20)))
    assert not e.busy
