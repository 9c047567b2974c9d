"""The choices of an answer, gathered from the engine's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llama2.engine.request import Event, FinishReason, Logprob
from llama2.serve.errors import Refusal
from llama2.serve.service import Stream

if TYPE_CHECKING:
    from llama2.serve.constrain.tools import CallReader


@dataclass(slots=True)
class Choice:
    """One choice so far."""

    reader: CallReader | None = None  # of an answer to a chat
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    stop: str | None = None  # the stop string that ended it
    cached_tokens: int = 0  # of the prompt, found in the cache; known at the end
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()

    def add(self, event: Event) -> None:
        """Add an event. Raises Refusal if the answer failed."""
        check(event)
        self.text += event.text
        if event.token is not None:
            self.token_ids.append(event.token)
        if self.reader is not None:
            self.reader.push(event)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.finish, self.stop, self.cached_tokens = event.finish, event.stop, event.cached_tokens


async def gather(stream: Stream, readers: Sequence[CallReader] = ()) -> list[Choice]:
    """Every choice of a stream, whole. Raises Refusal if one failed."""
    choices = [Choice(reader) for reader in readers] or [Choice() for _ in stream.requests]
    async for batch in stream.batches():
        for index, event in batch:
            choices[index].add(event)
    return choices


def check(event: Event) -> None:
    """Raises Refusal for an event that ends an answer for another reason than the model or a limit."""
    if event.finish == "error":
        raise Refusal(500, event.error or "the model failed", type="server_error")
    if event.finish == "cancelled":
        raise Refusal(503, "the answer was cancelled, because the server is stopping", type="unavailable_error")
