"""Answers collected from events that were written by hand."""

from __future__ import annotations

import pytest

from llama2.engine.answer import Answer, collect
from llama2.engine.request import Event, Logprob, Request
from llama2.errors import EngineError

ONE, TWO = Request((1, 2, 3), logprobs=0), Request((4,))


def test_interleaved_events_become_answers_in_the_order_of_requests() -> None:
    scores = [Logprob(65, -1.0), Logprob(66, -2.0)]
    events = [
        Event(8, 70, "x"),
        Event(7, 65, "", logprob=scores[0]),
        Event(8, 71, "y", "stop", stop="z", cached_tokens=32),
        Event(7, 66, "AB", "length", scores[1], drafted_tokens=3, accepted_tokens=2),
    ]
    assert collect(iter(events), [ONE, TWO]) == [
        Answer("AB", [65, 66], "length", 3, scores, drafted_tokens=3, accepted_tokens=2),
        Answer("xy", [70, 71], "stop", 1, None, cached_tokens=32, stop="z"),
    ]


def test_the_prompts_scores_come_with_the_first_event() -> None:
    score = (Logprob(2, -0.5),)
    events = [Event(3, 5, "a", prompt_logprobs=score), Event(3, 6, "b", "length")]
    assert collect(events, [TWO])[0].prompt_logprobs == score


def test_a_cancelled_request_keeps_what_it_has() -> None:
    (answer,) = collect([Event(1, 5, "a"), Event(1, None, "b", "cancelled")], [TWO])
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("ab", [5], "cancelled")


def test_a_failure_is_raised_with_the_engines_reason() -> None:
    with pytest.raises(EngineError, match=r"^a logit is not a number$"):
        collect([Event(1, 5, "a"), Event(2, None, "", "error", error="a logit is not a number")], [ONE, TWO])
