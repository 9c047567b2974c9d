"""From messages to an engine's requests, and from its events to answers: what every surface needs, whatever it calls
the parts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest
from fastapi import Response

from llama2.engine.processors import forbid_ends
from llama2.engine.request import Event, FinishReason, Logprob, Processor, Request, Sampling
from llama2.errors import ContextError, DialogError, Llama2Error, RequestError, TemplateError, TokenizerError
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Models
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.streaming import dump, quote
from llama2.serve.surfaces.wire import Message, Sampled, Wire
from llama2.serve.token_text import Texts, finite

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint
    from llama2.serve.constrain.tools import CallReader

log = logging.getLogger("llama2.serve")

#: Fields that constrain an answer, as a RequestError about one begins.
_CONSTRAINING = re.compile(
    r"(?:tools|tool_choice|response_format|text\.format|format|json_schema|grammar|guided_\w+|structured_outputs)\b[\w.\[\]]*"
)

#: Choices that one request may ask for, over all its prompts.
MAX_CHOICES = 128


@dataclass(slots=True)
class Choice:
    """One answer so far."""

    reader: CallReader | None = None  # of an answer to a chat
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] = ()

    def add(self, event: Event) -> None:
        """What an event says. Raises Refusal when the answer failed."""
        check(event)
        self.text += event.text
        if event.token is not None:
            self.token_ids.append(event.token)
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


async def build_requests(
    http: HttpRequest,
    service: Service,
    messages: Sequence[dict[str, Any]],
    request: Request,
    n: int = 1,
    *,
    tools: Tools = Tools(),  # it is frozen
    response: Constraint | None = None,
    least: int | None = 0,
) -> tuple[list[Request], list[CallReader]]:
    """`n` requests like `request` for the answer to a chat, and who reads each answer.

    `response` is what an answer must follow that calls no function. An answer has at least `least` tokens; None: as
    many as fit. What was changed, because the chat format cannot write it, becomes a warning of the response. Raises
    DialogError, TemplateError, RequestError.
    """
    settings = served(http).settings

    def make() -> tuple[list[Request], list[CallReader], tuple[str, ...]]:
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
        asked = model.answering(request, prompt)
        readers = [toolset.reader() for _ in range(n)]
        notes += prompt.notes + tuple(note for rule in toolset.constraints for note in rule.warnings)
        return expand_choices(service, asked, n, toolset.constraints, least), readers, notes

    requests, readers, notes = await asyncio.to_thread(make)
    warn(http, *notes)
    return requests, readers


def check_size(service: Service, messages: Sequence[dict[str, Any]], tools: Tools) -> None:
    """Raises ContextError for a chat that cannot fit the context, before it is written."""
    service.limit.check_count(len(messages), "messages")
    texts = [text for message in messages if isinstance(text := message.get("content"), str)]
    service.limit.check(*texts, quote(tools.declared or []))


def check_choices(count: int) -> None:
    """Raises Refusal for more answers than one request may have."""
    if count > MAX_CHOICES:
        raise Refusal(400, f"n: {count} answers are asked for, and the limit is {MAX_CHOICES}", param="n")


async def submit(http: HttpRequest, service: Service, requests: Sequence[Request], *, refuse: bool = True) -> Stream:
    """Start answers for an HTTP request, which is then logged with their figures. Raises as `Service.submit` does."""
    check_choices(len(requests))
    requests = [_within_context(http, service, request) for request in requests]
    stream = await service.submit(requests, refuse=refuse)
    http.scope["state"].setdefault("streams", []).append(stream)
    return stream


def _within_context(http: HttpRequest, service: Service, request: Request) -> Request:
    """A request whose answer is no longer than what its prompt leaves of the context, with a warning."""
    room = service.model.engine.context - len(request.prompt)
    if request.max_tokens is None or not 0 < room < request.max_tokens:
        return request
    warn(http, f"the answer has at most {room} tokens, which the prompt leaves of the context")
    return replace(request, max_tokens=room)


async def gather(stream: Stream, readers: Sequence[CallReader] = ()) -> list[Choice]:
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


def expand_choices(
    service: Service,
    request: Request,
    n: int,
    constraints: Sequence[Constraint | None] = (),
    least: int | None = 0,
) -> list[Request]:
    """`n` answers to one prompt, each with random numbers of its own, that follow constraints. Raises RequestError.

    Each has at least `least` tokens; None: as many as it may have. A constraint that is new may take seconds.
    """
    rules = [rule for rule in constraints if rule is not None]
    if rules and not service.model.engine.runs_processors:
        raise RequestError(f"{rules[0].field}: the engine that answers here follows no grammar; leave it out")
    if least != 0:
        field = "ignore_eos" if least is None else "min_tokens"
        if rules:
            raise RequestError(f"{field}: an answer that follows {rules[0].field} ends with it; leave one of them out")
        if not service.model.engine.runs_processors:
            raise RequestError(f"{field}: the engine that answers here cannot; leave it out")
        ends = service.model.tokenizer.stop_ids | request.stop_tokens
        request = replace(request, processors=(*request.processors, forbid_ends(ends, before=least)))

    def processors() -> tuple[Processor, ...]:
        return tuple(service.constrainer.processor(rule, continues=request.continues) for rule in rules)

    return [replace(request, choice=choice, processors=(*processors(), *request.processors)) for choice in range(n)]


def to_refusal(error: Llama2Error) -> Refusal:
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


def to_message(where: str, message: Message, content: str = "content") -> dict[str, Any]:
    """A message with one text as its content, as Dialog takes it. Raises Refusal for parts that are no text.

    `where` is the message's place in the request, and `content` the name of that field there.
    """
    role = "system" if message.role == "developer" else message.role
    if role == "function":
        raise unsupported(f"{where}.role", f"{role!r} is not supported, 'tool' is")
    plain: dict[str, Any] = {"role": role, "content": _text(f"{where}.{content}", message)}
    if message.tool_calls:
        plain["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _text(field: str, message: Message) -> str:
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise Refusal(400, f"{field}: is missing", param=field)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for at, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise unsupported(f"{field}.{at}", f"{part.type[:40]!r} is not supported, only text is")
        texts.append(part.text)
    return "\n".join(texts)


def sampling(body: Sampled, service: Service) -> Sampling:
    """How tokens are drawn; where nothing is said, as the server does by default."""
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise Refusal(400, "logit_bias: names must be token ids", param="logit_bias", code="invalid_value") from None
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    seed = secrets.randbits(32) if body.seed is None else body.seed % (1 << 64)
    return replace(service.sampling, **given, seed=seed, logit_bias=bias)


def base_request(
    body: Sampled, service: Service, http: HttpRequest, max_tokens: int | None, logprobs: int | None
) -> Request:
    """What a request says of its answer, whatever its prompt is."""
    return Request(
        (),
        max_tokens,
        sampling(body, service),
        stops(http, body.stop, "an empty stop ends nothing"),
        frozenset(body.stop_token_ids or ()),
        logprobs,
        prompt_logprobs=max_tokens == 0,  # nothing is drawn
        lookup=served(http).settings.lookup if body.lookup is None else body.lookup,
    )


def stops(http: HttpRequest, given: str | Sequence[str] | None, note: str) -> tuple[str, ...]:
    """Texts that end an answer. Empty ones end nothing, of which `note` warns."""
    texts = [given] if isinstance(given, str) else given or []
    if "" in texts:
        warn(http, note)
    return tuple(filter(None, texts))


def least_tokens(body: Sampled) -> int | None:
    """How many tokens an answer has at least; None: as many as it may have."""
    return None if body.ignore_eos else body.min_tokens or 0


def usage(stream: Stream) -> dict[str, Any]:
    """Tokens of prompts and answers."""
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": stream.completion_tokens,
        "total_tokens": stream.prompt_tokens + stream.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stream.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def chat_logprobs(logprobs: Sequence[Logprob], texts: Texts) -> dict[str, Any]:
    """Log-probabilities as chat completions show them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": texts(token), "logprob": finite(value), "bytes": texts.bytes(token)}

    rows = [
        {**entry(place.token, place.logprob), "top_logprobs": [entry(*other) for other in place.top]}
        for place in logprobs
    ]
    return {"content": rows, "refusal": None}


def warn(http: HttpRequest, *texts: str) -> None:
    """Add warnings to the response of a request: what was changed or ignored, that did no harm."""
    http.scope["state"].setdefault("warnings", []).extend(texts)


def warning_header(body: Wire, http: HttpRequest) -> dict[str, str]:
    """A header with the request's warnings, and the fields that were ignored; it is also logged."""
    warnings: list[str] = [*http.scope["state"].get("warnings", ())]
    names = sorted({name[:60] for name in body.ignored()})
    if names:
        warnings.append(f"ignored fields: {', '.join(names[:20])}")
    if not warnings:
        return {}
    text = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "?" for c in "; ".join(warnings))
    log.warning("request taken with changes", extra={"facts": {"changes": text}})
    return {"Warning": f'299 llama2 "{text}"'}


def json_response(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A JSON object."""
    return Response(dump(value), status, headers, "application/json")


def served(http: HttpRequest) -> Models:
    """The models that this application serves."""
    models: Models = http.app.state.models
    return models
