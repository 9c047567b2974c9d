"""From messages to an engine's requests, and from its events to answers: what every surface needs, whatever it calls
the parts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest

from llama2.engine.request import Event, FinishReason, Logprob, Processor, Request
from llama2.errors import ContextError, DialogError, Llama2Error, RequestError, TemplateError, TokenizerError
from llama2.serve.errors import Refusal
from llama2.serve.service import Service, Stream

if TYPE_CHECKING:
    from llama2.serve.constrain import Constraint
    from llama2.serve.tools import CallReader

#: Fields that constrain an answer, as a RequestError about one begins.
_CONSTRAINING = re.compile(r"(?:tools|tool_choice|response_format|text\.format|format)\b[\w.\[\]]*")

#: Choices that one request may ask for, over all its prompts.
MAX_CHOICES = 128


@dataclass(slots=True)
class Choice:
    """One answer so far."""

    reader: CallReader | None = None  # of an answer to a chat
    text: str = ""
    finish: FinishReason | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()

    def add(self, event: Event) -> None:
        """What an event says. Raises Refusal when the answer failed."""
        check(event)
        self.text += event.text
        if self.reader is not None:
            self.reader.push(event)
        self.finish = event.finish
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of functions that the answer may call, in OpenAI's form; `flat`, in that of Responses."""

    declared: Any = None
    choice: Any = None
    parallel: bool | None = None
    flat: bool = False


async def ask(
    service: Service,
    messages: Sequence[dict[str, Any]],
    request: Request,
    n: int = 1,
    *,
    neutralise: bool,
    tools: Tools = Tools(),  # it is frozen
    response: Constraint | None = None,
) -> tuple[list[Request], list[CallReader]]:
    """`n` requests like `request` for the answer to a chat, and who reads each answer.

    `response` is what an answer must follow that calls no function. Raises DialogError, TemplateError, RequestError.
    """

    def make() -> tuple[list[Request], list[CallReader]]:
        from llama2.serve.tools import Toolset

        model = service.model
        toolset = Toolset(
            *(tools.declared, tools.choice, tools.parallel, model.checkpoint.template, model.tokenizer, response),
            flat=tools.flat,
        )
        prompt = model.render(messages, neutralise=neutralise, tools=toolset.declared)
        asked = replace(request, prompt=tuple(prompt))
        return several(service, asked, n, toolset.constraints), [toolset.reader() for _ in range(n)]

    return await asyncio.to_thread(make)


async def start(http: HttpRequest, service: Service, requests: list[Request]) -> Stream:
    """Start answers for an HTTP request, which is then logged with their figures. Raises as `Service.submit` does."""
    if len(requests) > MAX_CHOICES:
        raise Refusal(400, f"{len(requests)} answers are asked for, and the limit is {MAX_CHOICES}", param="n")
    stream = await service.submit(requests)
    http.scope["state"]["stream"] = stream
    return stream


async def collect(stream: Stream, readers: Sequence[CallReader] = ()) -> list[Choice]:
    """Every choice of a stream, whole. Raises Refusal when one failed."""
    choices = [Choice(reader) for reader in readers] or [Choice() for _ in stream.requests]
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


def several(service: Service, request: Request, n: int, constraints: Sequence[Constraint | None] = ()) -> list[Request]:
    """`n` answers to one prompt, each with random numbers of its own, that follow constraints. Raises RequestError.

    A constraint that is new may take seconds.
    """
    rules = [rule for rule in constraints if rule is not None]
    if rules and not service.model.engine.runs_processors:
        raise RequestError(f"{rules[0].field}: the engine that answers here follows no grammar; leave it out")

    def processors() -> tuple[Processor, ...]:
        return tuple(service.constrainer.processor(rule, continues=request.continues) for rule in rules)

    return [replace(request, choice=choice, processors=processors()) for choice in range(n)]


def refuse(error: Llama2Error) -> Refusal:
    """How a mistake of the caller's, or a failure of the model's, is told."""
    if isinstance(error, ContextError):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, DialogError | TemplateError):
        return Refusal(400, str(error), param="messages", code="invalid_messages")
    if isinstance(error, RequestError) and (found := _CONSTRAINING.match(str(error))):
        return Refusal(400, str(error), param=found[0], code="invalid_value")
    if isinstance(error, RequestError | TokenizerError):
        return Refusal(400, str(error), code="invalid_value")
    return Refusal(500, str(error), type="server_error")
