"""Embeddings in the engine, over a network whose hidden state of a token is (token, position): worked by hand."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from fakes import ByteTokenizer, HistoryRunner, one, saying
from llama2.engine.embedding import PIECE_INPUTS, PIECE_TOKENS, normalised, pieces
from llama2.engine.engine import Engine
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.runner import BLOCK
from llama2.errors import RequestError

PROMPTS = [tuple(range(length)) for length in (1, 2, 31, 32, 33, 100)]


def engine(n_blocks: int = 8, **settings: Any) -> Engine:
    return Engine(HistoryRunner(saying("ab"), n_blocks=n_blocks), ByteTokenizer(), **settings)


def embed(e: Engine, prompts: list[tuple[int, ...]], pooling: Any) -> list[Event]:
    """The one event of each."""
    events = sorted(e.run(*(Request(p, 0, pooling=pooling) for p in prompts)), key=lambda event: event.request)
    assert [event.finish for event in events] == ["length"] * len(prompts)
    return events


@pytest.mark.parametrize("size", [64, 7])
def test_last_and_mean_in_chunks_of_any_size(size: int) -> None:
    e = engine(max_batch_tokens=size, max_sequences=4)
    for prompt, event in zip(PROMPTS, embed(e, PROMPTS, "last"), strict=True):
        assert event.embedding is not None
        assert event.embedding.dtype == np.float32
        assert event.embedding.tolist() == [prompt[-1], len(prompt) - 1]
    for prompt, event in zip(PROMPTS, embed(e, PROMPTS, "mean"), strict=True):
        assert event.embedding is not None
        assert event.embedding.tolist() == [(len(prompt) - 1) / 2] * 2  # of 0 … T − 1
    assert not e.busy
    assert e.stats.held_blocks == 0


def test_a_cached_beginning_serves_the_last_state_but_not_a_mean() -> None:
    e, prompt = engine(), tuple(range(3 * BLOCK))
    assert [event.cached_tokens for event in embed(e, [prompt], "last")] == [0]
    assert [event.cached_tokens for event in embed(e, [prompt], "last")] == [2 * BLOCK]  # its last token runs again
    (event,) = embed(e, [prompt], "mean")
    assert event.cached_tokens == 0
    assert event.embedding is not None
    assert event.embedding.tolist() == [(len(prompt) - 1) / 2] * 2


def test_beside_answers_and_after_preemption() -> None:
    """Two answers take the whole cache in the end, and preempt an input that runs a token a step."""
    runner = HistoryRunner(lambda history: one(65), n_blocks=6)
    e = Engine(runner, ByteTokenizer(), max_batch_tokens=3, max_sequences=3)
    answers = [e.add(Request((token,) * 20, 70, Sampling(temperature=0))) for token in (1, 2)]
    asked = {e.add(Request(p, 0, pooling="mean")): p for p in (tuple(range(64)), tuple(range(5)))}
    events: list[Event] = []
    while e.busy:
        events += e.step()
    assert e.stats.preemptions > 0
    found = {event.request: event.embedding for event in events if event.embedding is not None}
    assert {id: vector.tolist() for id, vector in found.items()} == {
        id: [(len(p) - 1) / 2] * 2 for id, p in asked.items()
    }
    for id in answers:
        assert [event.token for event in events if event.request == id] == [65] * 70


def test_a_state_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    forward = e.runner.forward

    def poisoned(batch: Any, hidden: Any) -> Any:
        logits = forward(batch, hidden)
        if hidden is not None:
            hidden[batch.tokens == 9] = np.inf
            hidden[batch.tokens == 10] = -np.inf
        return logits

    monkeypatch.setattr(e.runner, "forward", poisoned)
    bad, good = sorted(e.run(Request((9, 10), 0, pooling="mean"), Request((1, 8), 0, pooling="mean")))
    assert (bad.finish, bad.error) == ("error", "a hidden state is not a finite number; check the model file")
    assert good.embedding is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max", "max_tokens": 0}, "pooling='max' must be last or mean"),
        ({"pooling": "mean"}, "pooling: an embedding has no answer; set max_tokens=0"),
        ({"pooling": "mean", "max_tokens": 1}, "pooling: an embedding has no answer"),
        ({"pooling": "mean", "max_tokens": 0, "score_from": 1}, "no score_from"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number between 1"),
    ],
)
def test_what_a_request_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request((1,), **fields)


def test_several_requests_that_one_iterator_follows() -> None:
    """Closing it cancels those that have not ended."""
    e = engine()
    events = e.run(*(Request((1,), 50, Sampling(temperature=0)) for _ in range(3)))
    next(events)
    assert e.stats.running == 3
    events.close()  # type: ignore[attr-defined]
    assert not e.busy
    assert e.stats.held_blocks == 0


def test_normalised() -> None:
    assert normalised(np.array([3, -4], np.float32)).tolist() == pytest.approx([0.6, -0.8])
    assert normalised(np.zeros(2, np.float32)).tolist() == [0, 0]
    assert normalised(np.array([3e30, 4e30], np.float32)).tolist() == pytest.approx([0.6, 0.8])  # squares are 1e61


def test_pieces_are_bounded_and_in_order() -> None:
    rng = random.Random(1)
    lengths = [rng.choice([1, 20, 400, 2 * PIECE_TOKENS]) for _ in range(300)] + [1] * 100
    requests = [Request((0,) * length, 0, pooling="last") for length in lengths]
    divided = list(pieces(requests))
    assert [request for piece in divided for request in piece] == requests
    for piece in divided:
        assert 1 <= len(piece) <= PIECE_INPUTS
        assert len(piece) == 1 or sum(len(request.prompt) for request in piece) <= PIECE_TOKENS
    assert len(divided[-1]) > 1
    assert list(pieces([])) == []
