"""From an engine's events to whole answers: what every surface needs, whatever it calls the parts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastapi import Request as HttpRequest

from llama2.engine.request import Event, FinishReason, Logprob, Request
from llama2.errors import ContextError, DialogError, Llama2Error, RequestError, TemplateError, TokenizerError
from llama2.serve.errors import Refusal
from llama2.serve.service import Service, Stream

#: Choices that one request may ask for, over all its prompts.
MAX_CHOICES = 128


@dataclass(slots=True)
class Choice:
    """One answer so far."""

    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()

    def add(self, event: Event) -> None:
        """What an event says. Raises Refusal when the answer failed."""
        check(event)
        self.text += event.text
        self.tokens += event.token is not None
        self.finish = event.finish
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs


async def start(http: HttpRequest, service: Service, requests: list[Request]) -> Stream:
    """Start answers for an HTTP request, which is then logged with their figures. Raises as `Service.submit` does."""
    if len(requests) > MAX_CHOICES:
        raise Refusal(400, f"{len(requests)} answers are asked for, and the limit is {MAX_CHOICES}", param="n")
    stream = await service.submit(requests)
    http.scope["state"]["stream"] = stream
    return stream


async def collect(stream: Stream) -> list[Choice]:
    """Every choice of a stream, whole. Raises Refusal when one failed."""
    choices = [Choice() for _ in stream.requests]
    async for batch in stream.batches():
        for index, event in batch:
            choices[index].add(event)
    return choices


def check(event: Event) -> None:
    """Raises Refusal for an event that ends an answer otherwise than the model or a limit does."""
    if event.finish == "error":
        raise Refusal(500, event.error or "the model failed", type="server_error")
    if event.finish == "cancelled":
        raise Refusal(503, "the answer was cancelled, because the server is stopping", type="unavailable_error")


def several(request: Request, n: int) -> list[Request]:
    """`n` answers to one prompt, each with random numbers of its own."""
    return [replace(request, choice=choice) for choice in range(n)]


def refuse(error: Llama2Error) -> Refusal:
    """How a mistake of the caller's, or a failure of the model's, is told."""
    if isinstance(error, ContextError):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, DialogError | TemplateError):
        return Refusal(400, str(error), param="messages", code="invalid_messages")
    if isinstance(error, RequestError | TokenizerError):
        return Refusal(400, str(error), code="invalid_value")
    return Refusal(500, str(error), type="server_error")
