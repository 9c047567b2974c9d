"""The seam between callers who want answers and an engine: our own, or one that a cluster runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from llama2.engine.request import EngineStats, Event, Request
from llama2.text.tokenizer import Tokenizer


class EngineProtocol(Protocol):
    """Answers requests; safe to call from several threads.

    A server adds requests and takes all events from `step`; a caller with a few follows `run`. Both may be mixed.
    A request has events until one has `finish`, and none after that. What the engine itself causes never raises from
    `step`: it ends the requests that it hits, with `finish="error"`.
    """

    context: int  # tokens that prompt and answer may have together
    tokenizer: Tokenizer
    runs_processors: bool  # whether it takes requests that have some
    scores_continuations: bool  # likewise
    arithmetic: str  # what the bits of an answer depend on, beside weights and request

    @property
    def busy(self) -> bool:
        """Whether `step` has work to do or events to return."""
        ...

    @property
    def stats(self) -> EngineStats:
        """What there is to do, and how full the cache is. Does not wait for a step."""
        ...

    def add(self, request: Request) -> int:
        """Queue a request and return the id of its events.

        Raises ContextError when prompt and answer do not fit the context. Raises RequestError when the prompt is empty,
        a token is not in the vocabulary, or this engine cannot do something that is requested.
        """
        ...

    def cancel(self, id: int) -> None:
        """End a request and free its cache at once; its last event comes from `step`. Too late does nothing."""
        ...

    def step(self) -> list[Event]:
        """Work for a moment, and return the new events of the added requests, each one's in order."""
        ...

    def run(self, *requests: Request) -> Iterator[Event]:
        """The events of requests that run together; closing the iterator cancels them.

        Their ids increase in the order of `requests`. Raises like `add`, before the first event.
        """
        ...

    def close(self) -> None:
        """End what it started outside of this process. What was asked is answered or cancelled before."""
        ...
