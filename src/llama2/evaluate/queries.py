"""What a model is asked, and its answers, stored as they come, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.engine.answer import collect
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.scoring import score
from llama2.errors import EvaluationError

#: The most bytes of a stored answer.
_LINE = 1 << 24


@dataclass(frozen=True, slots=True)
class LikelihoodQuery:
    """How likely is a continuation after a context, both in token ids, neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def needed(self) -> int:
        """Tokens of context that an answer needs at least."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True, slots=True)
class GenerationQuery:
    """What follows a prompt; `sample` distinguishes several answers to it."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    raw_completion: bool = True
    scored: bool = False  # whether the answer's log-likelihood is wanted

    @property
    def needed(self) -> int:
        """Tokens of context that an answer needs at least."""
        return len(self.prompt) + 1

    def request(self, context: int) -> Request:
        """The engine's request; the answer has at most the tokens that the context leaves."""
        return Request(
            self.prompt,
            max_tokens=min(self.max_tokens, context - len(self.prompt)),
            sampling=Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed),
            stop=self.stop,
            stop_tokens=frozenset(self.stop_tokens),
            choice=self.sample,
            raw_completion=self.raw_completion,
            logprobs=0 if self.scored else None,
        )


Query = LikelihoodQuery | GenerationQuery


def key(query: Query) -> str:
    """A name for a query, from all that its answer depends on but the model."""
    values = [getattr(query, each.name) for each in fields(query)]
    return sha256(json.dumps([type(query).__name__, *values]).encode()).hexdigest()[:32]


def _order(query: Query) -> tuple[Any, ...]:
    """Likelihoods first, then answers; queries that begin alike are neighbours, so that the prefix cache has it."""
    if isinstance(query, LikelihoodQuery):
        return 0, query.context, query.continuation
    return 1, query.prompt, query.sample


def answers(engine: EngineProtocol, queries: Sequence[Query], in_flight: int) -> Iterator[dict[str, Any]]:
    """The answers to queries, in their order; `in_flight` of them run at once.

    To a LikelihoodQuery: `logprob`, the sum over the continuation in nats, and `greedy`, whether each of its tokens was
    the likeliest. To a GenerationQuery: `text`, `tokens`, `finish`, and `logprob` if it is scored. How many run at once
    changes no bit of them.
    Raises EngineError when the engine fails.
    """
    for kind, some in groupby(queries, type):
        answer = _likelihoods if kind is LikelihoodQuery else _generations
        yield from _in_order(answer(engine, list(some), in_flight))  # type: ignore[arg-type]  # groupby knows no types


def _likelihoods(
    engine: EngineProtocol, queries: Sequence[LikelihoodQuery], in_flight: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    pairs = [(query.context, query.continuation) for query in queries]
    for scored in score(engine, pairs, in_flight=in_flight):
        yield scored.pair, {"logprob": math.fsum(scored.logprobs), "greedy": scored.is_greedy}


def _generations(
    engine: EngineProtocol, queries: Sequence[GenerationQuery], in_flight: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    waiting = enumerate(query.request(engine.context) for query in queries)
    running: dict[int, tuple[int, Request, list[Event]]] = {}  # index, request and events so far, by the engine's id
    try:
        while True:
            while len(running) < in_flight and (each := next(waiting, None)):
                running[engine.add(each[1])] = (*each, [])
            if not running:
                return
            for event in engine.step():
                index, request, events = running[event.request]
                events.append(event)
                if event.finish is not None:
                    del running[event.request]
                    (answer,) = collect(events, [request])
                    tokens = len(answer.token_ids)
                    found = {"text": answer.text, "tokens": tokens, "finish": answer.finish_reason}
                    if answer.logprobs is not None:
                        found["logprob"] = math.fsum(each.logprob for each in answer.logprobs)
                    yield index, found
    finally:
        for id in running:
            engine.cancel(id)
        while engine.busy:
            engine.step()


def _in_order(found: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What comes with its index, as soon as all before it have come."""
    early: dict[int, dict[str, Any]] = {}
    count = 0
    for index, answer in found:
        early[index] = answer
        while count in early:
            yield early.pop(count)
            count += 1


@dataclass
class AnswerStore:
    """Answers of a run in a file, one JSON object a line, each with the `key` of its query."""

    path: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> AnswerStore:
        """The store of a file, which need not be there. A last line that was cut off is removed.

        Raises EvaluationError for a line that is not an answer.
        """
        store = cls(path)
        if not files.exists(path):
            return store
        files.remove_half_line(path, error=EvaluationError)
        with files.open_file(path, error=EvaluationError) as file:
            for number, line in enumerate(files.lines(file, _LINE), 1):
                try:
                    answer = json.loads(line or b"")
                    store.found[answer.pop("key")] = answer
                except (ValueError, KeyError, AttributeError, RecursionError):
                    raise EvaluationError(
                        f"{path}:{number}: is not an answer; remove the run's folder, begin anew"
                    ) from None
        return store

    def fill(
        self,
        engine: EngineProtocol,
        queries: Mapping[str, Query],
        in_flight: int,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Answer the queries, by their keys, that have no answer here; one is on disk before `progress` has its tokens.

        The order does not depend on what was answered before, and neither does the file.
        """
        waiting = sorted((_order(query), name) for name, query in queries.items() if name not in self.found)
        names = [name for _, name in waiting]
        found = answers(engine, [queries[name] for name in names], in_flight)
        for name, answer in zip(names, found, strict=True):
            self.add(name, answer)
            progress(queries[name].needed)

    def add(self, name: str, answer: dict[str, Any]) -> None:
        """Store an answer under its key; it is in the file before this returns."""
        self.found[name] = answer
        files.append(self.path, json.dumps({"key": name, **answer}) + "\n", error=EvaluationError)

    def __getitem__(self, query: Query) -> dict[str, Any]:
        return self.found[key(query)]
