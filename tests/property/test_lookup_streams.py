"""Drafts change nothing that is told: event streams with and without prompt lookup, over random requests in company."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fakes import plain
from llama2 import checkpoint
from llama2.engine.engine import Engine
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.runner import Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.scheduler import blocks_for
from llama2.text.tokenizer import Tokenizer
from models import tiny_config, write_tiny_gguf

BLOCKS = 12
END = 2
#: The tiny SentencePiece vocabulary's single characters `▁etao`, and its end. Few tokens, so that n-grams come again.
LETTERS = (282, 283, 284, 285, 286)


class OneByOne:
    """A runner that gives another one its tokens singly: NumPy's sums depend on how many rows a product has."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.config, self.n_blocks = runner, runner.config, runner.n_blocks
        self.arithmetic = runner.arithmetic

    def forward(self, batch: Batch, hidden: None = None) -> NDArray[np.float32]:
        rows = []
        for i in range(len(batch.tokens)):
            at, s = slice(i, i + 1), int(batch.sequences[i])
            row = self.runner.forward(
                Batch(
                    tokens=batch.tokens[at],
                    positions=batch.positions[at],
                    sequences=np.zeros(1, np.int32),
                    blocks=batch.blocks[s : s + 1],
                    outputs=np.zeros(1, np.int32),
                )
            )
            rows.append(row[0])
        return np.array(rows)[batch.outputs]


@dataclass
class Checked:
    """A runner beside an engine whose promises it checks in every step."""

    runner: Runner
    engine: Engine | None = None

    def __post_init__(self) -> None:
        self.config, self.n_blocks, self.steps = self.runner.config, self.runner.n_blocks, 0
        self.arithmetic = self.runner.arithmetic

    def forward(self, batch: Batch, hidden: None = None) -> NDArray[np.float32]:
        assert self.engine
        scheduler = self.engine.scheduler
        assert len(batch.tokens) <= scheduler.max_batch_tokens
        held = {block for g in scheduler.running for block in g.blocks}
        assert len(held) == self.n_blocks - scheduler.cache.available
        plan = scheduler.schedule()  # asked again, it says the same
        counts = np.bincount(batch.sequences, minlength=len(plan))
        for i, (g, known) in enumerate(plan):
            assert 0 <= g.cached < g.length <= g.limit
            assert blocks_for(g.cached + known) <= len(g.blocks) <= blocks_for(g.limit)
            mine = batch.sequences == i
            assert counts[i] >= known  # everybody's own tokens run, whoever drafts
            assert batch.positions[mine][0] == g.cached
            assert batch.positions[mine][-1] <= max(g.limit - 2, g.length - 1)
            assert counts[i] - known <= (g.request.lookup if g.cached + known == g.length else 0)
        self.steps += 1
        return self.runner.forward(batch)


@pytest.fixture(scope="module", params=["native", "native Q4_1", "numpy"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Tokenizer]:
    """A tiny model, whose cache keeps what earlier examples left there."""
    kind, format = (*request.param.split(), "F32")[:2]
    path: Path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_tiny_gguf(path, config=tiny_config(format), format=format)
    opened = checkpoint.open(path)
    runner: Runner
    runner = NativeRunner(opened, BLOCKS, threads=2) if kind == "native" else OneByOne(NumpyRunner(opened, BLOCKS))
    return runner, opened.tokenizer


def no_repeat(logits: NDArray[np.float32], history: NDArray[np.int32], prompt_length: int) -> None:
    """A processor that forbids the last token of an answer to come again."""
    if len(history) > prompt_length:
        logits[history[-1]] = -math.inf


def samplings() -> st.SearchStrategy[Sampling]:
    bias = dict.fromkeys(LETTERS, 100.0)
    return st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        top_p=st.sampled_from([0.5, 0.9, 1.0]),
        top_k=st.sampled_from([0, 2, 3]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.2]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.05]),
        logit_bias=st.sampled_from([{}, bias, bias, bias | {END: 99.8}]),
        seed=st.integers(0, 99),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    pattern = draw(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=8), "pattern")
    prompt = (pattern * 90)[: draw(st.integers(1, 90), "length of the prompt")]
    scored = draw(st.sampled_from([None, 1, len(prompt)]), "score_from")
    return Request(
        tuple(prompt),
        max_tokens=draw(st.one_of(st.integers(1 if scored is None else 0, 5), st.integers(30, 90)), "max_tokens"),
        sampling=draw(samplings(), "sampling"),
        stop=draw(st.sampled_from([(), (), ("tata",), ("ee", "o a"), ("aaaaaaa",)]), "stop"),
        stop_tokens=draw(st.sampled_from([frozenset(), frozenset(), frozenset({LETTERS[3]})]), "stop_tokens"),
        logprobs=draw(st.sampled_from([None, 0, 2]), "logprobs"),
        score_from=scored,
        choice=draw(st.integers(0, 2), "choice"),
        raw_completion=draw(st.booleans(), "raw completion"),
        processors=draw(st.sampled_from([(), (), (no_repeat,)]), "processors"),
        lookup=draw(st.sampled_from([0, 1, 3, 8, 40]), "lookup"),
    )


def answers(
    model: tuple[Runner, Tokenizer], arrivals: list[tuple[int, Request]], budget: int, sequences: int
) -> tuple[list[list[Event]], int]:
    """The events of each request, which comes so many steps after the one before it; and how many steps there were."""
    runner = Checked(model[0])
    engine = runner.engine = Engine(runner, model[1], max_batch_tokens=budget, max_sequences=sequences)
    told: dict[int, list[Event]] = defaultdict(list)
    for delay, request in arrivals:
        for _ in range(delay):
            for event in engine.step():
                told[event.request].append(event)
        engine.add(request)
    while engine.busy:
        for event in engine.step():
            told[event.request].append(event)
    assert engine.stats.held_blocks == 0
    return [told[id] for id in range(len(arrivals))], runner.steps


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 20), requests()), min_size=1, max_size=4),
    budget=st.one_of(st.integers(1, 12), st.sampled_from([40, 512])),
    sequences=st.integers(1, 4),
)
def test_streams_are_the_same_with_and_without_lookup(
    model: tuple[Runner, Tokenizer], arrivals: list[tuple[int, Request]], budget: int, sequences: int
) -> None:
    sequences = min(sequences, budget)
    drafted, steps = answers(model, arrivals, budget, sequences)
    expected, most = answers(model, [(d, replace(request, lookup=0)) for d, request in arrivals], budget, sequences)
    for (_, request), events, same in zip(arrivals, drafted, expected, strict=True):
        assert plain(events) == plain(same)
        assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
        assert events[-1].error is None
        assert 0 <= events[-1].accepted_tokens <= events[-1].drafted_tokens
        assert request.lookup or not events[-1].drafted_tokens
    if len(arrivals) == 1:
        # A step for each token that was not a draft, and one more when the last token was a draft.
        assert steps + drafted[0][-1].accepted_tokens in (most, most + 1)


def test_such_requests_draft_both_right_and_wrong(model: tuple[Runner, Tokenizer]) -> None:
    """So that the test above tests something: greedy and sampled, many drafts are accepted, and many are not."""
    for temperature in (0.0, 0.4):
        bias = dict.fromkeys(LETTERS, 100.0)
        arrivals = [
            (3, Request(LETTERS[:2] * n, 90, Sampling(temperature, logit_bias=bias, seed=n), logprobs=1, lookup=8))
            for n in range(1, 7)
        ]
        drafted, steps = answers(model, arrivals, 64, 4)
        expected, most = answers(model, [(d, replace(request, lookup=0)) for d, request in arrivals], 64, 4)
        assert list(map(plain, drafted)) == list(map(plain, expected))
        accepted = sum(events[-1].accepted_tokens for events in drafted)
        wrong = sum(events[-1].drafted_tokens for events in drafted) - accepted
        assert min(accepted, wrong) > 20
        assert temperature > 0 or steps < 0.6 * most
