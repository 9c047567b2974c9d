"""Anthropic's routes: messages, whole and as events, the number of their tokens, and models for its clients."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Query, Response
from fastapi import Request as HttpRequest
from pydantic import Field
from pydantic_core import from_json
from starlette.routing import Match
from starlette.types import Scope

from llama2.engine.request import Event, Request
from llama2.serve.constrain.tools import CallArguments, CallReader, CallStart, Piece, Text
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry
from llama2.serve.moderated import ChoiceEvent
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.choices import check
from llama2.serve.surfaces.context import models_of, warn, warning_header
from llama2.serve.surfaces.encoding import dump, json_response
from llama2.serve.surfaces.generation import Tools, build_requests, submit
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.messages import to_message
from llama2.serve.surfaces.sampling import sampling_of, stop_strings
from llama2.serve.surfaces.streaming import PING_SECONDS, CancelOnDisconnect, StreamingResponse
from llama2.serve.surfaces.wire import ChatMessage, ContentPart, SamplingRequest, StopText, Values, Wire

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

#: OpenAI's names of Anthropic's tool choices.
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class VersionedRoute(JsonRoute):
    """A route for requests with the header `anthropic-version`; others go to OpenAI's route of the same path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether, and with which parameters, a request is for this route."""
        if scope["type"] == "http" and any(name == b"anthropic-version" for name, _ in scope["headers"]):
            return super().matches(scope)
        return Match.NONE, {}


router = APIRouter(route_class=JsonRoute)
versioned = APIRouter(route_class=VersionedRoute)  # before OpenAI's, whose paths these are


class TextBlock(ContentPart):
    """A text. Equal beginnings of prompts are always cached, whatever `cache_control` is."""

    cache_control: dict[str, Any] | None = None


class ContentBlock(TextBlock):
    """A part of a message: text, a call by the assistant, or the result of a function.

    Thinking of earlier answers is left out, as Anthropic's own server does if thinking is disabled.
    """

    HARMLESS: ClassVar[Values] = {"caller": ({"type": "direct"},)}

    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class InputMessage(Wire):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class Tool(Wire):
    """A function that the client runs. Tools of Anthropic's server, or of its models alone, are refused."""

    UNSUPPORTED: ClassVar[Values] = {"allowed_callers": (["direct"],), "defer_loading": (False,)}

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None  # arguments are always sent at once


class ToolChoice(Wire):
    """Which tools the answer may call, or must."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Wire):
    """Whether the model thinks first, which it cannot."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(Wire):
    """The JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    """The format of the answer; an effort is ignored with a warning."""

    format: OutputFormat | None = None


class CountTokensRequest(Wire):
    """`POST /v1/messages/count_tokens`, and the fields that `/v1/messages` has too."""

    UNSUPPORTED: ClassVar[Values] = {
        "container": (),
        "context_management": ({}, {"edits": []}),
        "mcp_servers": ([],),
    }
    HARMLESS: ClassVar[Values] = {"service_tier": ("auto", "standard_only"), "speed": ("standard",)}

    model: str
    messages: list[InputMessage] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # as it was called before `output_config`
    cache_control: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`. `seed` and `watermark` are extras."""

    max_tokens: int = Field(ge=1, lt=1 << 62)
    stop_sequences: Annotated[list[StopText], Field(max_length=64)] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    watermark: bool | None = None
    metadata: dict[str, Any] | None = None  # nothing is stored


@router.post("/v1/messages")
async def messages(body: MessagesRequest, http: HttpRequest) -> Response:
    """The assistant's next message in a conversation."""
    service = await models_of(http).service(body.model)
    sampling = sampling_of(
        SamplingRequest(
            model=body.model, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, seed=body.seed
        ),
        service,
    )
    stop = stop_strings(http, body.stop_sequences, "stop_sequences: empty texts end nothing")
    lookup = models_of(http).settings.lookup
    dialog = _dialog(body, http)
    asked = Request((), body.max_tokens, sampling, stop, lookup=lookup)
    request, reader = await _request(body, http, service, dialog, asked)
    stream = await submit(http, service, [request], dialog=dialog, watermark=body.watermark)
    writer = _MessageWriter(body, stream.requests[0], reader)
    if body.stream:
        return StreamingResponse(writer.events(stream), stream.close, headers=warning_header(body, http))
    async with CancelOnDisconnect(http, stream.close):
        async for batch in stream.batches():
            writer.read(batch)
    return json_response(writer.whole(stream), warning_header(body, http))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, http: HttpRequest) -> Response:
    """The number of tokens of a conversation, with its tools and the start of the answer."""
    service = await models_of(http).service(body.model)
    request, _ = await _request(body, http, service, _dialog(body, http), Request(()))
    return json_response({"input_tokens": len(request.prompt)}, warning_header(body, http))


@versioned.get("/v1/models", include_in_schema=False)
async def models(
    http: HttpRequest,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after_id: str | None = None,
    before_id: str | None = None,
) -> Response:
    """A page of the models that are served."""
    entries = list(models_of(http).entries.values())
    end = len(entries) if before_id is None else entries.index(models_of(http).entry(before_id))
    start = 0 if after_id is None else entries.index(models_of(http).entry(after_id)) + 1
    page = entries[start:end][:limit] if before_id is None else entries[start:end][-limit:]
    return json_response(
        {
            "data": [_card(entry) for entry in page],
            "has_more": len(page) < end - start,
            "first_id": page[0].name if page else None,
            "last_id": page[-1].name if page else None,
        }
    )


@versioned.get("/v1/models/{model:path}", include_in_schema=False)
async def model(model: str, http: HttpRequest) -> Response:
    """One of the models that are served."""
    return json_response(_card(models_of(http).entry(model)))


def _card(entry: Entry) -> dict[str, Any]:
    context = entry.service.model.engine.context if entry.service else None
    return {
        "type": "model",
        "id": entry.name,
        "display_name": entry.name,
        "created_at": datetime.fromtimestamp(entry.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


async def _request(
    body: CountTokensRequest, http: HttpRequest, service: Service, dialog: Sequence[dict[str, Any]], request: Request
) -> tuple[Request, CallReader]:
    """`request` for the answer to a dialog, and its reader."""
    thinking = body.thinking.type if body.thinking else "disabled"
    if thinking == "adaptive":
        warn(http, "thinking: this model does not think before it answers")
    elif thinking != "disabled":
        raise unsupported("thinking.type", f"{thinking!r} is not supported, only 'disabled' and 'adaptive' are")
    (request,), (reader,) = await build_requests(
        http, service, dialog, request, tools=_tools(body), response=_constraint(body)
    )
    return request, reader


def _constraint(body: CountTokensRequest) -> Constraint | None:
    from llama2.serve.constrain import constraints

    if body.output_config and body.output_config.format:
        return constraints.json_schema(body.output_config.format.schema_, "output_config.format.schema")
    if body.output_format:
        return constraints.json_schema(body.output_format.schema_, "output_format.schema")
    return None


def _tools(body: CountTokensRequest) -> Tools:
    """Tools and their choice in the form of Responses."""
    declared = []
    for i, tool in enumerate(body.tools or ()):
        if tool.type not in (None, "custom"):
            raise unsupported(f"tools.{i}.type", f"{tool.type[:60]!r} is not supported, only 'custom' is")
        if tool.input_schema is None:
            field = f"tools.{i}.input_schema"
            raise Refusal(400, f"{field}: is missing", param=field, code="invalid_value")
        function: dict[str, Any] = {"type": "function", "name": tool.name, "parameters": tool.input_schema}
        function |= {} if tool.description is None else {"description": tool.description}
        declared.append(function | ({} if tool.strict is None else {"strict": tool.strict}))
    wanted = body.tool_choice
    if wanted is None:
        return Tools(declared or None, flat=True)
    choice = {"type": "function", "name": wanted.name} if wanted.type == "tool" else _CHOICES[wanted.type]
    return Tools(declared or None, choice, not wanted.disable_parallel_tool_use, flat=True)


def _dialog(body: CountTokensRequest, http: HttpRequest) -> list[dict[str, Any]]:
    """The conversation in the form of chat completions, where results of functions are messages before the text."""
    dialog = []
    if body.system:
        dialog.append(to_message("system", _message("system", body.system)))
    thoughts = False
    for i, message in enumerate(body.messages):
        texts: list[ContentPart] = []
        calls: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        blocks = (
            [ContentBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        )
        for j, block in enumerate(blocks):
            where = f"messages.{i}.content.{j}"
            match message.role, block.type:
                case _, "text":
                    texts.append(block)
                case "assistant", "tool_use":
                    function = {"name": _required(where, block, "name"), "arguments": json.dumps(block.input or {})}
                    calls.append({"id": _required(where, block, "id"), "type": "function", "function": function})
                case "user", "tool_result":
                    results.append(_result(where, block))
                case "assistant", "thinking" | "redacted_thinking":
                    thoughts = True
                case _:
                    kinds = {"assistant": "text and tool_use are", "user": "text and tool_result are"}
                    only = kinds.get(message.role, "text is")
                    raise unsupported(f"{where}.type", f"{block.type[:40]!r} is not supported, only {only}")
        if texts or not results:
            converted = _message(message.role, texts)
            converted.tool_calls = calls or None
            results.append(to_message(f"messages.{i}", converted))
        dialog += results
    if thoughts:
        warn(http, "thinking of earlier answers is left out")
    return dialog


def _message(role: Any, content: str | Sequence[ContentPart]) -> ChatMessage:
    """A message in the form of chat completions. An answer that was empty has no blocks."""
    return ChatMessage(role=role, content=content if isinstance(content, str) else list(content) or "")


def _result(where: str, block: ContentBlock) -> dict[str, Any]:
    """The result of a function; `Error:` before it if it failed, as a chat format has no other place for that."""
    message = _message("tool", block.content or "")
    message.tool_call_id = _required(where, block, "tool_use_id")
    result = to_message(where, message)
    return {**result, "content": f"Error: {result['content']}"} if block.is_error else result


def _required(where: str, block: ContentBlock, name: str) -> str:
    value: str | None = getattr(block, name)
    if value is None:
        raise Refusal(400, f"{where}.{name}: is missing", param=f"{where}.{name}", code="invalid_value")
    return value


class _MessageWriter:
    """Writes one message: its blocks one after another, and their events."""

    def __init__(self, body: MessagesRequest, request: Request, reader: CallReader) -> None:
        self._reader = reader
        self._sequences = frozenset(body.stop_sequences or ())
        self._cut = "max_tokens" if request.max_tokens == body.max_tokens else "model_context_window_exceeded"
        self._content: list[dict[str, Any]] = []
        self._arguments = ""  # of a call that is open
        self._stop: dict[str, str | None] = {"stop_reason": None, "stop_sequence": None}
        self._head: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
        }

    def whole(self, stream: Stream) -> dict[str, Any]:
        """The message so far."""
        return {**self._head, "content": self._content, **self._stop, "usage": _usage(stream)}

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The message as server-sent events."""
        yield _event("message_start", message=self.whole(stream))
        try:
            async for batch in stream.batches(PING_SECONDS):
                yield b"".join(self.read(batch)) if batch else _event("ping")
        except Refusal as failure:
            yield _event(**failure.to_json("/v1/messages"))
            return
        yield _event("message_delta", delta=self._stop, usage=_usage(stream)) + _event("message_stop")

    def read(self, batch: list[ChoiceEvent]) -> list[bytes]:
        """Add events of the engine to the message, and return the events of its blocks. Raises Refusal."""
        events: list[bytes] = []
        for _, event in batch:
            check(event)
            for piece in self._reader.push(event):
                events += self._add(piece)
            if event.finish is not None:
                events += self._close()
                self._stop = self._stop_of(event)
        return events

    def _add(self, piece: Piece) -> list[bytes]:
        events: list[bytes] = []
        match piece:
            case Text(text):
                if not self._content or self._content[-1]["type"] != "text":
                    events += self._open({"type": "text", "text": ""})
                self._content[-1]["text"] += text
                events.append(self._delta(type="text_delta", text=text))
            case CallStart(_, id, name):
                events += self._open({"type": "tool_use", "id": id, "name": name, "input": {}})
            case CallArguments(_, text):
                self._arguments += text
                events.append(self._delta(type="input_json_delta", partial_json=text))
        return events

    def _open(self, block: dict[str, Any]) -> list[bytes]:
        closed = self._close()
        self._content.append(block)
        return [*closed, _event("content_block_start", index=len(self._content) - 1, content_block=block)]

    def _close(self) -> list[bytes]:
        """End the last block, if there is one. A call that was cut short has the input so far."""
        if not self._content:
            return []
        if self._arguments:
            self._content[-1]["input"] = from_json(self._arguments, allow_partial=True)
            self._arguments = ""
        return [_event("content_block_stop", index=len(self._content) - 1)]

    def _delta(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=len(self._content) - 1, delta=delta)

    def _stop_of(self, event: Event) -> dict[str, str | None]:
        """Why the message ended."""
        if event.stop in self._sequences:  # other stop strings belong to the chat format
            return {"stop_reason": "stop_sequence", "stop_sequence": event.stop}
        if event.finish == "content_filter":
            return {"stop_reason": "refusal", "stop_sequence": None}
        if event.finish == "length":
            return {"stop_reason": self._cut, "stop_sequence": None}
        calls = any(block["type"] == "tool_use" for block in self._content)
        return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}


def _event(type: str, **fields: Any) -> bytes:
    return b"event: " + type.encode() + b"\ndata: " + dump({"type": type, **fields}) + b"\n\n"


def _usage(stream: Stream) -> dict[str, int]:
    """Tokens. Cached ones of the prompt are known at the end, and not among `input_tokens`."""
    return {
        "input_tokens": stream.prompt_tokens - stream.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stream.cached_tokens,
        "output_tokens": stream.completion_tokens,
    }
