"""What every engine promises about its events, whoever does the work. A further engine is one more in ENGINES."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import plain
from llama2 import checkpoint
from llama2.checkpoint import hf_folder
from llama2.engine.cluster import ClusterEngine
from llama2.engine.engine import Engine
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import EngineStats, Event, Request, Sampling
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import ContextError, RequestError
from models import tiny_config, write_tiny_gguf

CONTEXT = 128
VOCABULARY = 320
#: Letters of the tiny vocabulary, so that text is what tokens say.
LETTERS = tuple(range(283, 309))
PROMPT = (1, *LETTERS[:12])


def native(path: Path) -> EngineProtocol:
    opened = checkpoint.open(path)
    return Engine(NativeRunner(opened, 8, threads=2), opened.tokenizer, context=CONTEXT)


def numpy(path: Path) -> EngineProtocol:
    opened = checkpoint.open(path)
    return Engine(NumpyRunner(opened, 8), opened.tokenizer, context=CONTEXT)


def vllm(path: Path) -> EngineProtocol:
    pytest.importorskip("vllm", reason="vLLM has an environment of its own; see docs/decisions/0009")
    folder = path.with_name("folder")
    hf_folder.write(checkpoint.open(path), folder)
    return ClusterEngine(checkpoint.open(folder), context=CONTEXT, sequences=8, dtype="float32")


ENGINES: list[Callable[[Path], EngineProtocol]] = [native, numpy, vllm]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda make: make.__name__)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProtocol]:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_tiny_gguf(path, config=tiny_config(head_dim=32))  # vLLM knows no shorter heads
    engine = request.param(path)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _ends_idle(engine: EngineProtocol) -> object:
    yield
    assert not engine.busy
    assert engine.step() == []
    load = engine.stats
    assert (load.running, load.waiting, load.prefill_tokens, load.held_blocks) == (0, 0, 0, 0)


def letters(seed: int, **settings: object) -> Request:
    """A request whose answer is letters until something ends it."""
    bias = dict.fromkeys(LETTERS, 100.0)
    sampling = Sampling(temperature=1, top_p=1, seed=seed, logit_bias=bias)
    return Request(PROMPT, **{"max_tokens": 20, "sampling": sampling, **settings})  # type: ignore[arg-type]


def drain(engine: EngineProtocol) -> dict[int, list[Event]]:
    told: dict[int, list[Event]] = defaultdict(list)
    while engine.busy:
        for event in engine.step():
            told[event.request].append(event)
    for events in told.values():
        assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
    return told


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def test_each_token_is_an_event_and_the_texts_are_what_the_tokens_say(engine: EngineProtocol) -> None:
    ids = [engine.add(letters(seed)) for seed in range(5)]
    assert len(set(ids)) == 5
    told = drain(engine)
    assert set(told) == set(ids)
    for events in told.values():
        assert len(events) == len(tokens(events)) == 20
        assert events[-1].finish == "length"
        assert text(events) == engine.tokenizer.decode([*PROMPT, *tokens(events)])[len(PROMPT) - 1 :]
    assert len({text(events) for events in told.values()}) == 5


def test_the_same_request_is_answered_the_same_and_another_choice_is_not(engine: EngineProtocol) -> None:
    first, second, other = [plain(list(engine.run(letters(1, choice=choice)))) for choice in (0, 0, 1)]
    assert first == second != other


def test_what_ends_an_answer(engine: EngineProtocol) -> None:
    whole = list(engine.run(letters(2)))
    stop = text(whole)[5:8]
    at = text(whole).index(stop)
    assert at <= 5
    cut = list(engine.run(letters(2, stop=(stop,))))
    assert (text(cut), cut[-1].finish, cut[-1].stop) == (text(whole)[:at], "stop", stop)
    token = tokens(whole)[5]
    by_token = list(engine.run(letters(2, stop_tokens=frozenset({token}))))
    first = tokens(whole).index(token)
    assert (tokens(by_token), by_token[-1].finish) == (tokens(whole)[: first + 1], "stop")
    assert len(text(by_token)) == first
    end = next(iter(engine.tokenizer.stop_ids))
    ended = list(engine.run(letters(2, sampling=Sampling(temperature=0, logit_bias={end: 1e9}))))
    assert (tokens(ended), text(ended), ended[-1].finish, ended[-1].stop) == ([end], "", "stop", None)


def test_an_answer_fills_the_context_and_no_request_is_cut_to_it(engine: EngineProtocol) -> None:
    assert engine.context == CONTEXT
    events = list(engine.run(letters(3, max_tokens=None)))
    assert (len(events), events[-1].finish) == (CONTEXT - len(PROMPT), "length")
    for prompt, settings in [(PROMPT * 10, {"max_tokens": 1}), (PROMPT, {"max_tokens": CONTEXT})]:
        for ask in (engine.add, engine.run):
            with pytest.raises(ContextError, match=f"context of {CONTEXT}"):
                ask(Request(prompt, **settings))  # type: ignore[operator]
    for prompt in ((), (VOCABULARY,), (-1,)):
        with pytest.raises(RequestError, match="prompt"):
            engine.add(Request(prompt))


def test_log_probabilities(engine: EngineProtocol) -> None:
    asked = Request(PROMPT, 4, Sampling(temperature=0), logprobs=3, score_from=1)
    events = list(engine.run(asked))
    scores = events[0].prompt_logprobs
    assert scores is not None
    assert [score.token for score in scores] == list(PROMPT[1:])
    assert [event.prompt_logprobs for event in events[1:]] == [None] * (len(events) - 1)
    for event in events:
        assert event.logprob is not None
        assert (event.logprob.token, event.logprob.logprob) == event.logprob.top[0]  # greedy
        assert [p for _, p in event.logprob.top] == sorted((p for _, p in event.logprob.top), reverse=True)
        assert len(event.logprob.top) == 3
    (event,) = engine.run(Request((*PROMPT, *tokens(events)[:1]), 0, score_from=1))
    assert (event.token, event.text, event.finish) == (None, "", "length")
    assert event.prompt_logprobs is not None
    assert [score.logprob for score in event.prompt_logprobs] == pytest.approx(
        [*(score.logprob for score in scores), events[0].logprob.logprob], abs=1e-5
    )


def test_cancelled_requests_end_and_the_others_do_not_notice(engine: EngineProtocol) -> None:
    expected = plain(list(engine.run(letters(4))))
    early, mine, late = (engine.add(letters(seed)) for seed in (5, 4, 6))
    engine.cancel(early)
    told: dict[int, list[Event]] = defaultdict(list)
    while len(told[late]) < 3:
        for event in engine.step():
            told[event.request].append(event)
    engine.cancel(late)
    engine.cancel(late)
    for id, events in drain(engine).items():
        told[id] += events
    assert [(event.token, event.finish) for event in told[early]] == [(None, "cancelled")]
    assert told[late][-1].finish == "cancelled"
    assert plain(told[mine]) == expected
    engine.cancel(mine)
    engine.cancel(10**9)


def test_a_closed_iterator_cancels_and_one_that_was_never_begun_costs_nothing(engine: EngineProtocol) -> None:
    engine.run(letters(7))
    assert not engine.busy
    events = engine.run(letters(7))
    next(events)
    events.close()  # type: ignore[attr-defined]


def test_followed_and_added_requests_do_not_lose_each_others_events(engine: EngineProtocol) -> None:
    expected = {seed: plain(list(engine.run(letters(seed)))) for seed in range(4)}
    added = engine.add(letters(0))
    found: dict[int, list[Event]] = {}

    def follow(seed: int) -> None:
        found[seed] = list(engine.run(letters(seed)))

    threads = [threading.Thread(target=follow, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found[0] = drain(engine)[added]
    assert {seed: plain(events) for seed, events in found.items()} == expected


def test_what_there_is_to_do_can_be_seen(engine: EngineProtocol) -> None:
    ids = [engine.add(letters(seed)) for seed in range(3)]
    load: EngineStats = engine.stats
    assert load.running + load.waiting == 3
    assert load.prefill_tokens == 3 * len(PROMPT)
    told = [event for _ in range(5) for event in engine.step()]
    assert {event.request for event in told} <= set(ids)
    load = engine.stats
    assert load.running + load.waiting == 3
    assert 0 < load.held_blocks <= load.blocks
    drain(engine)
