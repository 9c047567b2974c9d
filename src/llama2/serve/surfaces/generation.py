"""From messages and prompts to the engine's requests, and their submission to a model's service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest

from llama2.engine.processors import forbid_ends
from llama2.engine.request import Processor, Request
from llama2.errors import RequestError
from llama2.safety.moderation import Moderator, Verdict
from llama2.safety.policy import Side
from llama2.serve.errors import Refusal
from llama2.serve.moderated import AnswerModeration
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.context import models_of, warn
from llama2.serve.surfaces.encoding import quote

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint
    from llama2.serve.constrain.tools import CallReader

log = logging.getLogger("llama2.serve")

#: Choices that one request may have, over all its prompts.
MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions that the answer may call, in OpenAI's form; `flat`: in that of Responses."""

    declared: Any = None
    choice: Any = None
    parallel: bool | None = None
    flat: bool = False


async def build_requests(
    http: HttpRequest,
    service: Service,
    messages: Sequence[dict[str, Any]],
    request: Request,
    n: int = 1,
    *,
    tools: Tools = Tools(),  # it is frozen
    response: Constraint | None = None,
    min_tokens: int | None = 0,
) -> tuple[list[Request], list[CallReader]]:
    """`n` requests like `request` for the answer to a chat, and a reader for each answer.

    An answer that calls no function follows `response`, and has at least `min_tokens` tokens; None: as many as fit.
    What the chat format cannot write is changed, with a warning in the response. Raises DialogError, TemplateError,
    RequestError.
    """
    settings = models_of(http).settings

    def build() -> tuple[list[Request], list[CallReader], tuple[str, ...]]:
        from llama2.serve.constrain.tools import Toolset
        from llama2.text.calls import native_format

        check_size(service, messages, tools)
        model, given = service.model, tools
        declares = bool(tools.declared) and tools.choice != "none"
        template = model.checkpoint.template_for(tools=declares)
        notes: tuple[str, ...] = ()
        if declares and settings.tools == "ignore" and native_format(template, model.tokenizer) is None:
            given, notes = Tools(), ("the chat template knows no tools: they are ignored",)
        toolset = Toolset(
            *(given.declared, given.choice, given.parallel, template, model.tokenizer, response),
            flat=given.flat,
            generic=settings.tools == "generic",
        )
        prompt = model.prompt(
            messages, neutralise=settings.neutralise, tools=toolset.declared, strict=settings.turns == "strict"
        )
        answering = model.answering(request, prompt)
        readers = [toolset.reader() for _ in range(n)]
        notes += prompt.notes + tuple(note for constraint in toolset.constraints for note in constraint.warnings)
        return expand_choices(service, answering, n, toolset.constraints, min_tokens), readers, notes

    requests, readers, notes = await asyncio.to_thread(build)
    warn(http, *notes)
    return requests, readers


def check_size(service: Service, messages: Sequence[dict[str, Any]], tools: Tools) -> None:
    """Raises ContextError for a chat that cannot fit the context, before its prompt is rendered."""
    service.limit.check_count(len(messages), "messages")
    texts = [text for message in messages if isinstance(text := message.get("content"), str)]
    service.limit.check(*texts, quote(tools.declared or []))


def check_choices(count: int) -> None:
    """Raises Refusal for more answers than one request may have."""
    if count > MAX_CHOICES:
        raise Refusal(400, f"n: {count} answers are requested, and the limit is {MAX_CHOICES}", param="n")


def expand_choices(
    service: Service,
    request: Request,
    n: int,
    constraints: Sequence[Constraint] = (),
    min_tokens: int | None = 0,
) -> list[Request]:
    """`n` answers to one prompt, each with random numbers of its own, that follow constraints. Raises RequestError.

    Each has at least `min_tokens` tokens; None: as many as it may have. A new constraint may take seconds.
    """
    engine = service.model.engine
    if constraints and not engine.runs_processors:
        raise RequestError(f"{constraints[0].field}: this engine cannot follow a grammar; leave it out")
    if min_tokens != 0:
        field = "ignore_eos" if min_tokens is None else "min_tokens"
        if constraints:
            other = constraints[0].field
            raise RequestError(f"{field}: an answer that follows {other} ends with it; leave one of them out")
        if not engine.runs_processors:
            raise RequestError(f"{field}: this engine does not support it; leave it out")
        ends = service.model.tokenizer.stop_ids | request.stop_tokens
        request = replace(request, processors=(*request.processors, forbid_ends(ends, before=min_tokens)))

    def processors() -> tuple[Processor, ...]:
        return tuple(service.constrainer.processor(each, raw_completion=request.raw_completion) for each in constraints)

    return [replace(request, choice=choice, processors=(*processors(), *request.processors)) for choice in range(n)]


def constraints_of(http: HttpRequest, constraint: Constraint | None) -> list[Constraint]:
    """The constraint of an answer as a list, once the response has its warnings."""
    if constraint is None:
        return []
    warn(http, *constraint.warnings)
    return [constraint]


async def submit(
    http: HttpRequest,
    service: Service,
    requests: Sequence[Request],
    *,
    dialog: Sequence[dict[str, Any]] | None = None,
    watermark: bool | None = None,
    refuse: bool = True,
) -> Stream:
    """Start answers for an HTTP request; its log line then has their numbers. Raises as `Service.submit` does.

    Where the server has a policy, the prompt is moderated here, and the answers on their way. `dialog` has the messages
    of a chat; without, the texts of the prompts are what a user said. `watermark` is what the request asks for.
    """
    check_choices(len(requests))
    requests = _marked(http, service, [_within_context(http, service, request) for request in requests], watermark)
    moderator = models_of(http).moderator
    if moderator is None or all(request.max_tokens == 0 for request in requests):
        stream = await service.submit(requests, refuse=refuse)
    else:
        stream = await _moderated(http, service, requests, dialog, moderator)
    http.scope["state"].setdefault("streams", []).append(stream)
    return stream


def _marked(http: HttpRequest, service: Service, requests: list[Request], wanted: bool | None) -> list[Request]:
    """The requests with the model's watermark. Raises Refusal for what the operator does not allow."""
    settings = models_of(http).settings
    watermark = settings.watermarks.get(service.name)
    if watermark is None and wanted:
        raise Refusal(400, "watermark: this server has no key for the model; leave it out", param="watermark")
    if watermark is not None and wanted is False and not settings.watermark_on_request:
        raise Refusal(400, "watermark: every answer of this model is marked; leave it out", param="watermark")
    if watermark is None or (settings.watermark_on_request and not wanted):
        return requests
    if any(request.sampling.temperature == 0 and request.max_tokens != 0 for request in requests):
        warn(http, "watermark: at temperature 0 nothing is drawn, so nothing is marked")
    return [replace(request, watermark=watermark) for request in requests]


async def _moderated(
    http: HttpRequest,
    service: Service,
    requests: Sequence[Request],
    dialog: Sequence[dict[str, Any]] | None,
    moderator: Moderator,
) -> Stream:
    """Answers under a policy. Raises Refusal where it stops the prompt."""

    def report(side: Side, verdict: Verdict) -> None:
        action, category = str(verdict.action), verdict.category or "not judged"
        service.metrics.moderated.labels(service.name, side, action).inc()
        facts = {"model": service.name, "side": side, "action": action, "category": category}
        log.info("moderated", extra={"facts": facts})
        if verdict.action == "warn":
            warn(http, f"moderation: the {side} is of the category {category}")

    def judge() -> tuple[list[Sequence[dict[str, Any]]], list[Verdict]]:
        said: dict[tuple[int, ...], Sequence[dict[str, Any]]] = {}  # each prompt once, whatever its choices are
        for prompt in dict.fromkeys(request.prompt for request in requests):
            said[prompt] = dialog or [{"role": "user", "content": service.model.tokenizer.decode(prompt)}]
        verdicts = [
            moderator.moderate(messages[:end], "input")
            for messages in said.values()
            for end, message in enumerate(messages, 1)
            if message["role"] in ("user", "tool") and message["content"]
        ]
        return [said[request.prompt] for request in requests], verdicts

    dialogs, verdicts = await asyncio.to_thread(judge)
    for verdict in verdicts:
        if verdict.action is not None:
            report("input", verdict)
    actions = {verdict.action for verdict in verdicts}
    if "stop" in actions:
        category = next(v.category for v in verdicts if v.action == "stop") or "which cannot be judged"
        raise Refusal(400, f"the prompt is stopped by the policy: {category}", code="content_filter")
    if "refuse" in actions:
        return service.answered(requests, moderator.policy.refusal)
    stream = await service.submit(requests)
    stream.moderation = AnswerModeration(moderator, dialogs, partial(report, "output"))
    return stream


def _within_context(http: HttpRequest, service: Service, request: Request) -> Request:
    """A request whose answer fits into the rest of the context, with a warning if it had to be shortened."""
    room = service.model.engine.context - len(request.prompt)
    if request.max_tokens is None or not 0 < room < request.max_tokens:
        return request
    warn(http, f"the answer has at most {room} tokens: the prompt leaves no more of the context")
    return replace(request, max_tokens=room)
