"""Log-likelihoods of continuations of contexts, from an engine that nobody else adds requests to meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2.engine.request import Logprob, Request, Sampling
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.errors import ContextError, EngineError, RequestError

if TYPE_CHECKING:
    from llama2.engine.protocol import EngineProtocol

#: A context and what continues it, in token ids.
Pair = tuple[Sequence[int], Sequence[int]]


class Scored(NamedTuple):
    """A pair's continuation under the model. A tie of logits is greedy for the lowest token id alone."""

    pair: int  # its index
    logprobs: NDArray[np.float64]  # (T,) natural, one a token of the continuation
    is_greedy: bool  # whether greedy decoding of the context gives the continuation


def score(
    engine: EngineProtocol, pairs: Sequence[Pair], *, window: int = 256, in_flight: int = 2 * MAX_SEQUENCES
) -> Iterator[Scored]:
    """Score each pair's continuation, in the order in which they finish; closing the iterator cancels the rest.

    The values do not depend on what else is scored. `window` pairs at a time are ordered by context. Those that differ
    in the last token alone share one request, and others share what the prefix cache holds of their contexts. The
    engine has `in_flight` requests at a time.
    Raises RequestError for a pair with an empty side, ContextError for one longer than the engine's context.
    """
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise RequestError(
                f"pair {index}: the {'continuation' if context else 'context'} is empty; "
                f"give it at least one token{'' if context else ', such as BOS'}"
            )
        if (length := len(context) + len(continuation)) > engine.context:
            raise ContextError(f"pair {index}: its {length} tokens do not fit the context of {engine.context}")
    return _run(engine, pairs, window, in_flight)


def _run(engine: EngineProtocol, pairs: Sequence[Pair], window: int, in_flight: int) -> Iterator[Scored]:
    groups = (group for start in range(0, len(pairs), window) for group in _groups(pairs, start, start + window))
    running: dict[int, list[int]] = {}  # the pairs of each request
    try:
        while True:
            while len(running) < in_flight and (group := next(groups, None)):
                running[engine.add(_request(pairs, group))] = group
            if not running:
                return
            for event in engine.step():
                if event.error is not None:
                    raise EngineError(event.error)
                group = running.pop(event.request)
                if event.logprob is None:
                    raise EngineError("a request that was scored has been cancelled")
                for index in group:
                    yield _scored(index, pairs[index][1], event.prompt_logprobs or (), event.logprob)
    finally:
        for id in running:
            engine.cancel(id)
        while engine.busy:
            engine.step()


def _groups(pairs: Sequence[Pair], start: int, end: int) -> list[list[int]]:
    """The pairs from `start` to `end` by what a request of theirs computes, ordered so that what begins alike meets."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs[start:end], start):
        groups.setdefault((tuple(context), tuple(continuation[:-1])), []).append(index)
    return [groups[key] for key in sorted(groups)]


def _request(pairs: Sequence[Pair], group: Sequence[int]) -> Request:
    """A request for pairs that differ in their last token: it does not run, as the row before it scores it."""
    context, continuation = pairs[group[0]]
    return Request(
        (*context, *continuation[:-1]),
        max_tokens=1,
        sampling=Sampling(temperature=0),
        logprobs=1,
        score_from=len(context),
        logprob_tokens=tuple(dict.fromkeys(pairs[index][1][-1] for index in group)),
    )


def _scored(index: int, continuation: Sequence[int], before: Sequence[Logprob], last: Logprob) -> Scored:
    logprobs = [*(each.logprob for each in before), dict(last.top)[continuation[-1]]]
    best = [each.top[0][0] for each in (*before, last)]
    return Scored(index, np.array(logprobs), best == list(continuation))
