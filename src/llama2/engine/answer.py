"""Whole answers, collected from an engine's events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama2.engine.request import Event, FinishReason, Logprob, Request
from llama2.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer. `token_ids` are all that were drawn, also the end token and those of a stop string.

    Of the prompt, `cached_tokens` were found in the cache. Of `drafted_tokens`, which `lookup` proposed,
    `accepted_tokens` were drawn. The other fields are an Event's.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[Logprob] | None  # one a token, if requested
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[Logprob, ...] | None = None
    stop: str | None = None
    embedding: NDArray[np.float32] | None = None  # (D,)
    continuation_logprobs: tuple[tuple[Logprob, ...], ...] | None = None


def collect(events: Iterable[Event], requests: Sequence[Request]) -> list[Answer]:
    """The answers to `requests`, in their order, from all events that `Engine.run(*requests)` yields.

    Raises EngineError with the engine's reason when one of them failed.
    """
    by_request: dict[int, list[Event]] = {}
    for event in events:
        if event.error is not None:
            raise EngineError(event.error)
        by_request.setdefault(event.request, []).append(event)
    return [_join(found, request) for (_, found), request in zip(sorted(by_request.items()), requests, strict=True)]


def _join(events: list[Event], request: Request) -> Answer:
    last = events[-1]
    return Answer(
        text="".join(event.text for event in events),
        token_ids=[event.token for event in events if event.token is not None],
        finish_reason=last.finish or "cancelled",
        prompt_tokens=len(request.prompt),
        logprobs=None if request.logprobs is None else [e.logprob for e in events if e.logprob is not None],
        drafted_tokens=last.drafted_tokens,
        accepted_tokens=last.accepted_tokens,
        cached_tokens=last.cached_tokens,
        prompt_logprobs=events[0].prompt_logprobs,
        stop=last.stop,
        embedding=last.embedding,
        continuation_logprobs=last.continuation_logprobs,
    )
