"""Log-likelihoods of continuations of contexts, from an engine that nobody else adds requests to meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2.engine.request import Request
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

    The values do not depend on what else is scored. `window` pairs at a time are ordered by context. Those of one
    context share one request, and others what the prefix cache holds of their contexts' beginnings. The engine has
    `in_flight` requests at a time.
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
    groups = (group for start in range(0, len(pairs), window) for group in _groups(engine, pairs, start, window))
    running: dict[int, list[int]] = {}  # the pairs of each request
    try:
        while True:
            while len(running) < in_flight and (group := next(groups, None)):
                running[engine.add(_request(engine, pairs, group))] = group
            if not running:
                return
            for event in engine.step():
                if event.error is not None:
                    raise EngineError(event.error)
                if event.finish == "cancelled":
                    raise EngineError("a request that scores was cancelled; leave the engine to one caller")
                rows = event.continuation_logprobs or (event.prompt_logprobs or (),)
                for index, row in zip(running.pop(event.request), rows, strict=True):
                    is_greedy = all(each.top[0][0] == each.token for each in row)
                    yield Scored(index, np.array([each.logprob for each in row]), is_greedy)
    finally:
        for id in running:
            engine.cancel(id)
        while engine.busy:
            engine.step()


def _groups(engine: EngineProtocol, pairs: Sequence[Pair], start: int, window: int) -> list[list[int]]:
    """The pairs of a window by what makes a request, ordered so that contexts that begin alike are neighbours."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(pairs[start : start + window], start):
        groups.setdefault(tuple(context), []).append(index)
    ordered = [groups[context] for context in sorted(groups)]
    return ordered if engine.scores_continuations else [[index] for group in ordered for index in group]


def _request(engine: EngineProtocol, pairs: Sequence[Pair], group: Sequence[int]) -> Request:
    context = tuple(pairs[group[0]][0])
    continuations = tuple(tuple(pairs[index][1]) for index in group)
    if engine.scores_continuations:
        return Request(context, 0, logprobs=1, continuations=continuations)
    return Request(context + continuations[0], 0, logprobs=1, score_from=len(context))
