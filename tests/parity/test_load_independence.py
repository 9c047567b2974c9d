"""Same bytes under load: a request's events do not depend on company, chunks, prefix hits, preemption or drafts.

The promise is the native runner's; `bench/same_bytes.py` checks it with a real model.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import plain
from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.engine.answer import collect
from llama2.engine.engine import Engine
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.runner_native import NativeRunner
from llama2.engine.watermark import Kgw, SynthId
from models import tiny_config, write_tiny_gguf

CONTEXT = 256  # eight blocks
#: Few tokens, so that n-grams come again and drafts are right now and then.
LETTERS = tuple(range(282, 290))
SYNTHID, KGW = SynthId((7, 11, 13, 17), ngram=3), Kgw(42)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_tiny_gguf(path, config=tiny_config("Q4_1"), format="Q4_1")
    return checkpoint.open(path)


def requests(rng: random.Random, count: int) -> list[Request]:
    """Prompts that begin alike or not, answers short and long, or continuations in their place."""
    heads = [[rng.choice(LETTERS) for _ in range(96)] for _ in range(2)]
    made = []
    for _ in range(count):
        head = rng.choice(heads)[: rng.choice([0, 32, 50, 96])]
        prompt = head + [rng.choice(LETTERS) for _ in range(rng.choice([1, 1, 7, 33]))]
        if rng.random() < 0.2:
            ends = [tuple(rng.choices(LETTERS, k=rng.choice([1, 2, 9, 40]))) for _ in range(rng.choice([1, 2, 4]))]
            made.append(Request(tuple(prompt), 0, logprobs=rng.choice([None, 2]), continuations=tuple(ends)))
            continue
        scored = rng.random() < 0.3
        made.append(
            Request(
                tuple(prompt),
                rng.choice([1, 5, 90, CONTEXT - len(prompt)]),
                Sampling(rng.choice([0, 0.7]), logit_bias=dict.fromkeys(LETTERS, 50.0), seed=rng.randrange(3)),
                logprobs=rng.choice([None, 0, 2]),
                score_from=rng.choice([1, len(prompt), rng.randint(1, len(prompt))]) if scored else None,
                choice=rng.randrange(2),
                lookup=rng.choice([0, 0, 1, 8]),
                watermark=rng.choice([None, None, SYNTHID, KGW]),
            )
        )
    return made


def together(engine: Engine, asked: list[Request], rng: random.Random) -> list[list[Event]]:
    """The events of each; they come at random times, some are followed, and others are cancelled beside them."""
    told: dict[int, list[Event]] = defaultdict(list)

    def take(events: list[Event]) -> None:
        for event in events:
            told[event.request].append(event)

    ids, noise = [], []
    for request in asked:
        for _ in range(rng.choice([0, 0, 0, 1, 5])):
            take(engine.step())
        if rng.random() < 0.1:
            events = list(engine.run(request))
            told[events[0].request] = events
            ids.append(events[0].request)
        else:
            ids.append(engine.add(request))
        if rng.random() < 0.2:
            noise.append(engine.add(rng.choice(asked)))
        elif noise and rng.random() < 0.5:
            engine.cancel(noise.pop())
    while engine.busy:
        take(engine.step())
    assert engine.stats.held_blocks == 0
    return [told[id] for id in ids]


def alone(runner: NativeRunner, model: Checkpoint, request: Request) -> list[Event]:
    """The events of a request whose whole prompt is scored, if any of it is, cut to what was asked for."""
    engine, start = Engine(runner, model.tokenizer, context=CONTEXT), request.score_from
    if ends := request.continuations:
        whole = [replace(request, prompt=request.prompt + end, score_from=1, continuations=()) for end in ends]
        scores = [answer.prompt_logprobs or () for answer in collect(engine.run(*whole), whole)]
        rows = tuple(row[len(request.prompt) - 1 :] for row in scores)
        return [Event(0, None, "", "length", continuation_logprobs=rows)]
    first, *rest = plain(list(engine.run(replace(request, lookup=0, score_from=start and 1))))
    if start is not None and first.prompt_logprobs is not None:
        first = first._replace(prompt_logprobs=first.prompt_logprobs[start - 1 :])
    return [first, *rest]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    count=st.integers(1, 32),
    blocks=st.integers(8, 30),
    budget=st.sampled_from([1, 7, 33, 100, 512]),
    prefill=st.sampled_from([1, 16, 128]),
    sequences=st.sampled_from([1, 5, 32]),
)
def test_events_under_any_load(
    model: Checkpoint, seed: int, count: int, blocks: int, budget: int, prefill: int, sequences: int
) -> None:
    rng, runner = random.Random(seed), NativeRunner(model, blocks, threads=2)
    asked = requests(rng, count)
    engine = Engine(
        runner,
        model.tokenizer,
        context=CONTEXT,
        max_batch_tokens=budget,
        max_prefill_tokens=prefill,
        max_sequences=min(sequences, budget),
    )
    told = together(engine, asked, rng)
    for request, events in zip(asked, told, strict=True):
        assert plain(events) == alone(runner, model, request)


def test_such_a_load_preempts_shares_and_drafts(model: Checkpoint) -> None:
    """So that the test above tests something."""
    rng = random.Random(2)
    engine = Engine(NativeRunner(model, 12, threads=2), model.tokenizer, context=CONTEXT)
    asked = requests(rng, 32)
    told = together(engine, asked, rng)
    assert engine.stats.preemptions > 2
    scored = [events for request, events in zip(asked, told, strict=True) if request.score_from is not None]
    assert sum(events[-1].cached_tokens > 0 for events in scored) > 1
    assert sum(events[-1].cached_tokens > 0 for events in told) > 5
    assert sum(events[-1].accepted_tokens for events in told) > 5
