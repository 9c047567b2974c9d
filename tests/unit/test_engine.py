"""The engine over a network that is a dictionary: what it tells, when it stops, what it refuses, whom an error hits."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import END, VOCABULARY, ByteTokenizer, HistoryRunner, one, plain, saying
from llama2.engine.engine import Engine
from llama2.engine.request import EngineStats, Event, Logprob, Request, Sampling
from llama2.engine.runner import BLOCK
from llama2.errors import ContextError, RequestError

GREEDY = Sampling(temperature=0)
CONTEXT = 256  # of HistoryRunner


def engine(logits: Callable[[list[int]], NDArray[np.float32]], **settings: Any) -> Engine:
    return Engine(HistoryRunner(logits), ByteTokenizer(), **settings)


def ask(prompt: str = "?", **settings: Any) -> Request:
    return Request(tuple(prompt.encode()), **{"sampling": GREEDY, **settings})


def drain(engine: Engine) -> list[Event]:
    events = []
    while engine.busy:
        events += engine.step()
    return events


def text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def idle(engine: Engine) -> bool:
    return not engine.busy and engine.stats.held_blocks == 0


def test_an_answer_is_told_token_by_token_and_ends_with_its_reason() -> None:
    e = engine(saying("Grüße"))
    events = list(e.run(ask()))
    assert [event.token for event in events] == [*"Grüße".encode(), END]
    assert [event.text for event in events] == ["G", "r", "", "ü", "", "ß", "e", ""]  # never half a character
    assert [event.finish for event in events] == [None] * 7 + ["stop"]
    assert idle(e)


@pytest.mark.parametrize(
    ("answer", "settings", "told", "finish", "stop"),
    [
        ("abc", {"max_tokens": 3}, "abc", "length", None),
        ("abc", {"max_tokens": 4}, "abc", "stop", None),
        ("abc", {"stop_tokens": frozenset(b"c")}, "ab", "stop", None),
        ("ab", {"stop": ("b",), "max_tokens": 2}, "a", "stop", "b"),
        ("one END two", {"stop": ("END",)}, "one ", "stop", "END"),
        ("one EN", {"stop": ("END",)}, "one EN", "stop", None),  # held back, and told after all
        ("one EN", {"stop": ("END",), "max_tokens": 5}, "one E", "length", None),
        ("aaab", {"stop": ("aab",)}, "a", "stop", "aab"),  # the second a begins the match
        ("xabcd", {"stop": ("abcd", "bc")}, "xa", "stop", "bc"),  # the first to be complete
        ("xabc", {"stop": ("bc", "abc")}, "x", "stop", "abc"),  # complete together: the longest
        ("naïve", {"stop": ("ï",)}, "na", "stop", "ï"),
        ("a\x01", {"stop": ("!",)}, "a", "stop", "!"),  # half a character behind the stop string is no text
        ("a\x01", {"max_tokens": 2}, "a!\ufffd", "length", None),
        ("😀", {"max_tokens": 3}, "\ufffd", "length", None),
    ],
)
def test_where_an_answer_stops(answer: str, settings: dict[str, Any], told: str, finish: str, stop: str | None) -> None:
    events = list(engine(saying(answer)).run(ask(**settings)))
    assert (text(events), events[-1].finish, events[-1].stop) == (told, finish, stop)


def test_text_is_held_back_while_a_stop_string_may_be_forming() -> None:
    events = list(engine(saying("a<b</s>")).run(ask(stop=("</s>",))))
    assert [event.text for event in events] == ["a", "", "<b", "", "", "", ""]


def test_an_answer_may_fill_the_context_and_not_more() -> None:
    e = engine(lambda history: one(ord("a")))
    events = list(e.run(ask("p" * 100)))
    assert (len(events), events[-1].finish) == (CONTEXT - 100, "length")
    assert e.runner.steps[0] == 100  # type: ignore[attr-defined]
    with pytest.raises(ContextError, match=r"prompt of 256 tokens and answer of 1 do not fit the context of 256"):
        e.add(ask("p" * 256))
    with pytest.raises(ContextError, match="answer of 157"):
        e.add(ask("p" * 100, max_tokens=157))
    with pytest.raises(ContextError, match="context of 64"):
        engine(saying(""), context=64).add(ask("p" * 64))


@pytest.mark.parametrize(
    ("prompt", "settings", "reason"),
    [
        ((), {}, "prompt is empty"),
        ((1, VOCABULARY), {}, "prompt: 257 is not a token"),
        ((-1,), {}, "prompt: -1 is not"),
        (("a",), {}, "prompt: 'a' is not"),
        ((1.5,), {}, "prompt: 1.5 is not"),
        ((1,), {"stop_tokens": frozenset({999})}, "stop_tokens: 999 is not"),
        ((1,), {"sampling": Sampling(logit_bias={300: 1.0})}, "logit_bias: 300 is not"),
        ((1,), {"logprobs": 258}, "logprobs=258"),
    ],
)
def test_what_the_model_has_not_is_refused(prompt: tuple[int, ...], settings: dict[str, Any], reason: str) -> None:
    e = engine(saying(""))
    with pytest.raises(RequestError, match=reason):
        e.add(Request(prompt, **settings))
    assert idle(e)


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": True}, {"max_tokens": 10**30},
     {"logprobs": -1}, {"logprobs": True}, {"choice": -1}, {"choice": None}, {"choice": 2**64},
     {"stop": ("",)}, {"stop": (b"x",)},
     {"lookup": -1}, {"lookup": 1025}, {"lookup": True}, {"lookup": 2.0}, {"lookup": None}],
)  # fmt: skip
def test_values_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(settings))):
        Request((1,), **settings)


def count(history: list[int]) -> NDArray[np.float32]:
    """A network whose next token tells the length and the content of what it has seen."""
    return one((sum(history) + 7 * len(history)) % 256)


def counted(prompt: Sequence[int], n: int) -> list[int]:
    history = list(prompt)
    for _ in range(n):
        history.append((sum(history) + 7 * len(history)) % 256)
    return history[len(prompt) :]


@pytest.mark.parametrize("budget", [1, 7, 64, 512])
@pytest.mark.parametrize("sequences", [1, 3, 64])
def test_an_answer_is_the_same_in_any_batch_and_chunk(budget: int, sequences: int) -> None:
    e = engine(count, max_batch_tokens=budget, max_sequences=min(budget, sequences))
    prompts = [list(range(i, i + n)) for i, n in enumerate([1, 40, 32, 5, 100, 33])]
    lengths = [40, 1, 33, 100, 20, 31]
    ids = [e.add(Request(tuple(p), n, GREEDY)) for p, n in zip(prompts, lengths, strict=True)]
    answers: dict[int, list[int | None]] = {id: [] for id in ids}
    for event in drain(e):
        answers[event.request].append(event.token)
    assert list(answers.values()) == [counted(p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert max(e.runner.steps) <= budget  # type: ignore[attr-defined]
    assert idle(e)


def test_a_cancelled_request_frees_its_cache_at_once_and_says_so() -> None:
    e = engine(saying("abc" * 50))
    first = e.add(ask(stop=("abca!",)))
    other = e.add(ask())
    e.step()
    assert e.stats.held_blocks == 2
    e.cancel(first)
    assert e.stats.held_blocks == 1
    e.cancel(first)
    events = e.step()
    assert [(event.request, event.finish, event.text) for event in events[:1]] == [(first, "cancelled", "a")]
    assert events[1].request == other
    e.cancel(other)
    assert [event.finish for event in drain(e)] == ["cancelled"]
    e.cancel(12345)
    assert idle(e)


def test_closing_the_iterator_cancels() -> None:
    e = engine(saying("abc" * 50))
    events = e.run(ask())
    assert idle(e)  # nothing happens before the first event is wanted
    assert next(events).text == "a"
    events.close()  # type: ignore[attr-defined]
    assert idle(e)
    assert e.step() == []


def test_followed_and_added_requests_share_steps_and_lose_no_event() -> None:
    e = engine(count)
    added = e.add(Request((9,), 20, GREEDY))
    followed = [event.token for event in e.run(Request((5,), 10, GREEDY))]
    rest = drain(e)
    assert followed == counted([5], 10)
    assert [event.token for event in rest] == counted([9], 20)
    assert {event.request for event in rest} == {added}


def test_a_cancellation_right_after_a_step_is_not_lost() -> None:
    class Hasty(Engine):
        def step(self) -> list[Event]:
            events = super().step()
            self.cancel(added)
            return events

    e = Hasty(HistoryRunner(count), ByteTokenizer())
    added = e.add(Request((9,), 20, GREEDY))
    next(e.run(Request((5,), 1, GREEDY)))
    told = [(event.token, event.finish) for event in Engine.step(e)]
    assert told == [(counted([9], 1)[0], None), (None, "cancelled")]


def test_threads_may_follow_requests_of_one_engine() -> None:
    e = engine(count)
    answers: dict[int, list[int | None]] = {}

    def follow(start: int) -> None:
        answers[start] = [event.token for event in e.run(Request((start,), 60, GREEDY))]

    threads = [threading.Thread(target=follow, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {start: counted([start], 60) for start in range(6)}
    assert idle(e)


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    row = np.full(VOCABULARY, -np.inf, np.float32)
    row[[65, 66, 67]] = np.log([0.5, 0.25, 0.25])
    e = engine(lambda history: row.copy())

    def ban(logits: NDArray[np.float32], history: NDArray[np.int32], prompt_length: int) -> None:
        logits[65] = -np.inf

    request = Request((65, 67, 66), 2, GREEDY, logprobs=2, score_from=1, processors=(ban,))
    events = list(e.run(request))
    half, quarter = math.log(0.5), math.log(0.25)
    top = ((65, half), (66, quarter))

    def same(a: Logprob | None, token: int, logprob: float) -> None:
        assert a is not None
        assert (a.token, a.logprob) == (token, pytest.approx(logprob))
        assert [id for id, _ in a.top] == [id for id, _ in top]
        assert [value for _, value in a.top] == pytest.approx([value for _, value in top])

    assert [event.token for event in events] == [66, 66]
    for event in events:
        same(event.logprob, 66, quarter)
    assert events[0].prompt_logprobs is not None
    for logprob, token in zip(events[0].prompt_logprobs, (67, 66), strict=True):
        same(logprob, token, quarter)
    assert events[1].prompt_logprobs is None


@pytest.mark.parametrize("budget", [1, 3, 512])
def test_a_prompt_can_be_scored_without_an_answer_and_fill_the_context(budget: int) -> None:
    prompt = tuple(counted([1], 99))
    e = engine(count, context=99, max_batch_tokens=budget, max_sequences=1)
    (event,) = e.run(Request(prompt, 0, GREEDY, score_from=1))
    assert (event.token, event.finish) == (None, "length")
    assert event.prompt_logprobs is not None
    assert [x.token for x in event.prompt_logprobs] == list(prompt[1:])
    expected = [float(count(list(prompt[:i]))[prompt[i]]) for i in range(1, 99)]
    assert [x.logprob for x in event.prompt_logprobs] == pytest.approx(expected)
    assert idle(e)


def test_processors_see_the_history_and_may_choose() -> None:
    seen = []

    def process(logits: NDArray[np.float32], history: NDArray[np.int32], prompt_length: int) -> None:
        seen.append((history.tolist(), prompt_length))
        logits[ord("z")] = 1

    events = list(engine(saying("ab")).run(ask("??", max_tokens=2, processors=(process,))))
    assert text(events) == "zz"
    assert seen == [([63, 63], 2), ([63, 63, ord("z")], 2)]


def broken(history: list[int]) -> NDArray[np.float32]:
    """Not a number from the fourth token on, if the prompt was `!`."""
    row = one(ord("a"))
    if history[0] == ord("!") and len(history) == 4:
        row[5] = np.nan
    return row


def fail(logits: NDArray[np.float32], history: NDArray[np.int32], prompt_length: int) -> None:
    raise ZeroDivisionError("by zero")


def forbid(logits: NDArray[np.float32], history: NDArray[np.int32], prompt_length: int) -> None:
    logits[:] = -np.inf


@pytest.mark.parametrize(
    ("request_", "told", "reason"),
    [
        (ask("!"), "aaa", "number"),
        (ask("!aaaa", max_tokens=0, score_from=1), "", "number"),
        (ask(processors=(fail,)), "", "ZeroDivisionError: by zero"),
        (ask(processors=(forbid,)), "", "number"),
        (ask(sampling=Sampling(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf))), "", "number"),
    ],
)
def test_an_error_ends_the_request_that_caused_it_alone(request_: Request, told: str, reason: str) -> None:
    e = engine(broken)
    well, ill = e.add(ask(max_tokens=20)), e.add(Request(request_.prompt, **settings_of(request_)))
    events = drain(e)
    assert text([event for event in events if event.request == well]) == "a" * 20
    events = [event for event in events if event.request == ill]
    assert text(events) == told
    assert events[-1].finish == "error"
    assert events[-1].error is not None
    assert reason in events[-1].error
    assert idle(e)


def settings_of(request: Request) -> dict[str, Any]:
    names = ("max_tokens", "sampling", "score_from", "processors")
    return {name: getattr(request, name) for name in names} | {
        "max_tokens": request.max_tokens if request.max_tokens == 0 else 20
    }


def test_a_failed_forward_pass_ends_those_in_it_and_the_engine_goes_on() -> None:
    def logits(history: list[int]) -> NDArray[np.float32]:
        if history[0] == ord("!"):
            raise MemoryError("no room")
        return one(END)

    e = engine(logits, max_sequences=1)
    first, second = e.add(ask("!")), e.add(ask("?"))
    events = drain(e)
    assert [(event.request, event.finish, event.error) for event in events] == [
        (first, "error", "MemoryError: no room"),
        (second, "stop", None),
    ]
    assert idle(e)


LOOP = "row, row, row your boat; " * 6


def test_a_repetitive_answer_comes_in_fewer_steps_by_lookup_and_is_the_same() -> None:
    without, with_ = engine(saying(LOOP)), engine(saying(LOOP))
    expected = list(without.run(ask(logprobs=1)))
    events = list(with_.run(ask(logprobs=1, lookup=8)))
    assert text(events) == LOOP
    assert plain(events) == plain(expected)
    assert [(event.drafted_tokens, event.accepted_tokens) for event in events[:-1]] == [(0, 0)] * len(LOOP)
    last, steps = events[-1], with_.runner.steps  # type: ignore[attr-defined]
    assert without.runner.steps == [1] * 151  # type: ignore[attr-defined]
    assert len(steps) < 50  # up to 9 characters in a step, once the first 25 are there
    assert (max(steps), sum(steps) - len(steps)) == (9, last.drafted_tokens)
    assert len(steps) + last.accepted_tokens == 151
    assert idle(with_)


def test_the_prompt_is_looked_up_from_the_first_token_on() -> None:
    e = engine(lambda history: one(history[len(history) % 6]))
    events = list(e.run(ask("abcdefabc", max_tokens=20, lookup=8)))
    assert text(events) == "defabcdefabcdefabcde"
    assert e.runner.steps[0] == 9 + 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_drafts_end_with_the_answer_and_its_blocks(max_tokens: int) -> None:
    """A draft past them would be refused by the runner, whose blocks here end with the longest answer."""
    prompt = BLOCK * 2 - max_tokens
    e = Engine(HistoryRunner(lambda history: one(ord("a")), n_blocks=2), ByteTokenizer())
    events = list(e.run(ask("a" * prompt, max_tokens=max_tokens, lookup=100)))
    assert (text(events), events[-1].finish) == ("a" * max_tokens, "length")
    assert events[-1].accepted_tokens == events[-1].drafted_tokens
    assert sum(e.runner.steps) == prompt + max_tokens - 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", range(2, 14))
def test_drafts_take_only_the_room_that_is_left(budget: int) -> None:
    """A prompt beside a drafting answer is read in as many steps as beside one that does not draft."""
    told = []
    for lookup in (0, 8):
        e = engine(lambda history: one(ord("a")), max_batch_tokens=budget, max_sequences=2, context=128)
        first = e.add(ask("a" * 20, max_tokens=100, lookup=lookup))
        events: list[Event] = []
        while len(events) < 10:
            events += e.step()
        second = e.add(ask("b" * 90, max_tokens=1, score_from=1))
        before = len(e.runner.steps)  # type: ignore[attr-defined]
        while not any(event.request == second for event in events):
            events += e.step()
        steps = e.runner.steps[before:]  # type: ignore[attr-defined]
        told.append(len(steps))
        assert max(steps) <= budget
        assert text([event for event in events + drain(e) if event.request == first]) == "a" * 100
    assert told[0] == told[1] == -(-90 // (budget - 1))


def test_drafts_in_a_full_batch_are_fewer_than_wanted() -> None:
    e = engine(lambda history: one(ord("a")), max_batch_tokens=7, max_sequences=3, context=64)
    ids = [e.add(ask("a", max_tokens=60, lookup=8)) for _ in range(3)]
    answers: dict[int, list[Event]] = {id: [] for id in ids}
    for event in drain(e):
        answers[event.request].append(event)
    assert [text(events) for events in answers.values()] == ["a" * 60] * 3
    assert max(e.runner.steps) == 7  # type: ignore[attr-defined]
    assert idle(e)


@pytest.mark.parametrize(
    ("settings", "told", "finish", "drafted"),
    [
        ({"stop": ("t; row, row",)}, "row, row, row your boa", "stop", True),
        ({"stop": ("boat; row, row, row your bo",)}, "row, row, row your ", "stop", True),
        ({"stop_tokens": frozenset(b"b")}, "row, row, row your ", "stop", True),
        ({"max_tokens": 77}, LOOP[:77], "length", False),
    ],
)
def test_an_answer_stops_in_the_middle_of_a_draft(
    settings: dict[str, Any], told: str, finish: str, drafted: bool
) -> None:
    """`drafted`: whether its last token was a draft. Otherwise a step draws one token more than it accepts."""
    prompt = "row your boat;"
    expected = list(engine(saying(LOOP, len(prompt))).run(ask(prompt, **settings)))
    e = engine(saying(LOOP, len(prompt)))
    events = list(e.run(ask(prompt, **settings, lookup=8)))
    assert (text(events), events[-1].finish) == (told, finish)
    assert plain(events) == plain(expected)
    assert len(events) == len(e.runner.steps) + events[-1].accepted_tokens - drafted  # type: ignore[attr-defined]
    assert idle(e)


def test_processors_and_errors_see_only_what_was_drawn() -> None:
    """Each is asked once for each token, with the history that an answer without drafts has; then one fails."""
    seen: dict[int, list[list[int]]] = {0: [], 8: []}
    told: dict[int, list[Event]] = {}
    for lookup, histories in seen.items():

        def process(
            logits: NDArray[np.float32], history: NDArray[np.int32], prompt_length: int, histories: Any = histories
        ) -> None:
            histories.append(history.tolist())
            if len(history) % 31 == 0:
                logits[ord("!")] = 1
            if len(history) == 100:
                raise ZeroDivisionError("by zero")

        e = engine(saying(LOOP))
        told[lookup] = list(e.run(ask(processors=(process,), lookup=lookup)))
        assert idle(e)
    assert seen[8] == seen[0]
    assert plain(told[8]) == plain(told[0])
    assert (len(told[8]), told[8][-1].error) == (100, "ZeroDivisionError: by zero")
    assert told[8][-1].accepted_tokens > 20


def test_a_prompt_is_scored_in_the_step_that_drafts() -> None:
    for budget in (8, 512):
        e = [engine(count, max_batch_tokens=budget, max_sequences=1) for _ in range(2)]
        prompt = (*counted([1], 20), 5, 6, 7, 8, 9, 5, 6, 7)
        request = Request(prompt, 10, GREEDY, logprobs=1, score_from=1)
        expected = list(e[0].run(request))
        assert [event.token for event in expected] == counted(prompt, 10)
        assert plain(list(e[1].run(replace(request, lookup=8)))) == plain(expected)
        assert sum(e[1].runner.steps) > sum(e[0].runner.steps)  # type: ignore[attr-defined]


def test_what_a_step_drew_is_told_before_the_cancellation_that_follows_it() -> None:
    e = engine(saying(LOOP))
    events = e.run(ask(lookup=8))
    told = [next(events) for _ in range(60)]
    e.cancel(told[0].request)
    told += events
    assert told[-1].finish == "cancelled"
    assert 60 < len(told) <= 60 + 8 + 1
    assert text(told) == LOOP[: len(told) - 1]
    assert idle(e)


def streams(engine: Engine, ids: Sequence[int]) -> list[list[Event]]:
    """The events of each request, once all have ended."""
    told: dict[int, list[Event]] = {id: [] for id in ids}
    for event in drain(engine):
        told[event.request].append(event)
    return list(told.values())


def test_prompts_that_begin_alike_are_computed_once() -> None:
    """Eight questions behind one text of 100 tokens, of which 96 fill blocks; then the first of them again."""
    e = Engine(HistoryRunner(count, n_blocks=64), ByteTokenizer())
    prompts = [(*range(100), i) for i in range(8)]
    told = streams(e, [e.add(Request(prompt, 20, GREEDY)) for prompt in prompts])
    assert [[event.token for event in events] for events in told] == [counted(prompt, 20) for prompt in prompts]
    assert sum(e.runner.steps) == 101 + 7 * 5 + 8 * 19  # type: ignore[attr-defined]
    assert [events[-1].cached_tokens for events in told] == [0] + [96] * 7
    assert not any(event.cached_tokens for events in told for event in events[:-1])
    again = list(e.run(Request(prompts[0], 20, GREEDY)))
    assert plain(again) == plain(told[0])
    assert again[-1].cached_tokens == 96
    assert idle(e)


def test_choices_share_their_prompt() -> None:
    row = np.zeros(VOCABULARY, np.float32)
    runner = HistoryRunner(lambda history: row.copy(), n_blocks=64)
    e = Engine(runner, ByteTokenizer(), max_prefill_tokens=96)
    prompt, sampling = tuple(range(64)), Sampling(temperature=1, seed=1)
    told = streams(e, [e.add(Request(prompt, 4, sampling, choice=choice)) for choice in range(4)])
    assert runner.steps[:2] == [64, 1 + 3 * 32]
    assert len({tuple(event.token for event in events) for events in told}) == 4


def test_what_must_be_scored_or_may_not_be_cached_is_computed() -> None:
    e = Engine(HistoryRunner(count, n_blocks=64), ByteTokenizer())
    prompt = tuple(counted([1], 70))
    expected = list(e.run(Request(prompt, 3, GREEDY, logprobs=0, score_from=1)))
    for settings in ({"score_from": 1}, {"cache_prompt": False}):
        before = sum(e.runner.steps)  # type: ignore[attr-defined]
        events = list(e.run(Request(prompt, 3, GREEDY, logprobs=0, **settings)))
        assert sum(e.runner.steps) - before == 72  # type: ignore[attr-defined]
        assert events[0].prompt_logprobs == (expected[0].prompt_logprobs if "score_from" in settings else None)
        assert events[-1].cached_tokens == 0
    assert len(list(e.run(Request(prompt, 3, GREEDY)))) == 3
    assert e.runner.steps[-3:] == [6, 1, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", [1, 32, 33, 65, 69, 70])
def test_what_stands_before_the_scored_tokens_is_found_in_the_cache(start: int) -> None:
    """The row that scores the token at `start` is that of the token before it, which runs, as do all after it."""
    e = Engine(HistoryRunner(count, n_blocks=64), ByteTokenizer())
    prompt = tuple(counted([1], 70))
    (expected,) = e.run(Request(prompt, 0, GREEDY, score_from=1))
    (event,) = e.run(Request(prompt, 0, GREEDY, score_from=start))
    assert (event.prompt_logprobs or ()) == (expected.prompt_logprobs or ())[start - 1 :]
    assert len(event.prompt_logprobs or ()) == 70 - start
    assert event.cached_tokens == (start - 1) // BLOCK * BLOCK
    assert e.runner.steps == [70, 70 - event.cached_tokens]  # type: ignore[attr-defined]
    assert e.runner.rows == [70, 71 - start]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"score_from": 0}, "score_from=0 must be a whole number between 1"),
        ({"score_from": True}, "score_from=True must be"),
        ({"score_from": 3}, "score_from=3 is after the prompt, which has 2 tokens"),
        ({"max_tokens": 0, "continuations": ((5,), ())}, r"continuations\[1\] is empty; give it at least one token"),
        ({"max_tokens": 0, "continuations": (5,)}, r"continuations\[0\]=5 must be a list of token ids"),
        ({"max_tokens": 0, "continuations": 5}, "continuations=5 must be a list of lists of token ids"),
        ({"max_tokens": 0, "continuations": ((5,), (6, 257))}, r"continuations\[1\]: 257 is not a token"),
        ({"max_tokens": 1, "continuations": ((5,),)}, "continuations: they have no answer; set max_tokens=0"),
        ({"max_tokens": 0, "score_from": 1, "continuations": ((5,),)}, "no score_from"),
    ],
)
def test_what_cannot_be_scored_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        engine(count).add(Request((65, 66), **settings))


@pytest.mark.parametrize("lookup", [0, 8])
@pytest.mark.parametrize("scored", [False, True])
def test_a_preempted_request_goes_on_where_it_was(lookup: int, scored: bool) -> None:
    def requests() -> list[Request]:
        rest = {"logprobs": 1, "lookup": lookup, "score_from": 1 if scored else None}
        return [Request(tuple(range(i, i + 30 + i)), 120 - i, GREEDY, **rest) for i in range(5)]

    alone = [list(Engine(HistoryRunner(count), ByteTokenizer()).run(request)) for request in requests()]
    e = Engine(HistoryRunner(count, n_blocks=7), ByteTokenizer(), max_batch_tokens=24, max_sequences=8)
    told = streams(e, [e.add(request) for request in requests()])
    assert list(map(plain, told)) == list(map(plain, alone))
    assert e.stats.preemptions >= 2
    assert idle(e)


def test_a_prompt_is_scored_once_though_it_was_preempted_before_its_end() -> None:
    first, second = Request((5,) * 30, 60, GREEDY), Request(tuple(counted([1], 64)), 1, GREEDY, score_from=1)
    expected = list(engine(count).run(second))
    e = Engine(HistoryRunner(count, n_blocks=4), ByteTokenizer(), max_prefill_tokens=1)
    e.add(first)
    e.step()
    id = e.add(second)
    while not e.stats.preemptions:
        assert e.step()[0].request != id
    told = [event for event in drain(e) if event.request == id]
    assert plain(told) == plain(expected)


def test_others_need_not_wait_for_a_forward_pass() -> None:
    """During it, requests are added and cancelled, and cancelled ones give their blocks back at once."""
    e = engine(count)
    inside, go_on = threading.Event(), threading.Event()
    forward = e.runner.forward

    def slow(batch: Any, hidden: None) -> NDArray[np.float32]:
        inside.set()
        assert go_on.wait(60)
        return forward(batch)

    first, second = e.add(Request((1,), 3, GREEDY)), e.add(Request((2,), 3, GREEDY))
    e.runner.forward = slow  # type: ignore[method-assign]
    told: list[Event] = []
    thread = threading.Thread(target=lambda: told.extend(e.step()))
    thread.start()
    assert inside.wait(60)
    third = e.add(Request((3,), 3, GREEDY))
    e.cancel(first)
    assert (e.stats.running, e.stats.waiting, e.stats.held_blocks) == (1, 1, 1)
    go_on.set()
    thread.join()
    assert [(event.request, event.token, event.finish) for event in told] == [
        (first, None, "cancelled"),
        (second, *counted([2], 1), None),
    ]
    rest = drain(e)
    assert [event.token for event in rest if event.request == third] == counted([3], 3)
    assert first not in {event.request for event in rest}
    assert idle(e)


def test_what_an_engine_has_to_do() -> None:
    e = engine(count, max_batch_tokens=40, max_sequences=2)
    assert replace(e.stats, blocks=0) == EngineStats(0, 0, 0, 0, 0, 0, 0)
    for i in range(3):
        e.add(Request((i,) * 60, 3, GREEDY))
    assert e.stats == EngineStats(
        running=0, waiting=3, prefill_tokens=180, blocks=8, held_blocks=0, evictable_blocks=0, preemptions=0
    )
    e.step()
    assert e.stats == EngineStats(
        running=2, waiting=1, prefill_tokens=140, blocks=8, held_blocks=2, evictable_blocks=0, preemptions=0
    )
    drain(e)
    assert e.stats == EngineStats(
        running=0, waiting=0, prefill_tokens=0, blocks=8, held_blocks=0, evictable_blocks=3, preemptions=0
    )
