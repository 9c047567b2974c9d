"""OpenAI's Responses. Nothing is stored: each request has its whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

from llama2.engine.request import Logprob, Request
from llama2.serve.constrain.tools import CallArguments, CallReader, CallStart, Piece, Text
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.moderated import ChoiceEvent
from llama2.serve.service import Stream
from llama2.serve.surfaces.choices import check
from llama2.serve.surfaces.context import models_of, warn, warning_header
from llama2.serve.surfaces.encoding import PING, dump, json_response
from llama2.serve.surfaces.generation import Tools, build_requests, submit
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.messages import to_message
from llama2.serve.surfaces.sampling import base_request, min_tokens_of
from llama2.serve.surfaces.streaming import PING_SECONDS, CancelOnDisconnect, StreamingResponse
from llama2.serve.surfaces.wire import ChatMessage, ContentPart, Count, SamplingRequest, Values, Wire
from llama2.serve.token_text import TokenTexts, chat_logprobs

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

#: The entry of `include` that requests the log-probabilities of the answer's text.
LOGPROBS = "message.output_text.logprobs"

router = APIRouter(route_class=JsonRoute)


class Item(Wire):
    """A part of the conversation: a message, a call by the assistant, or the output of a function."""

    UNSUPPORTED: ClassVar[Values] = ChatMessage.UNSUPPORTED

    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class TextFormat(Wire):
    """Free text, any JSON object, or one that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # whether a keyword that no grammar can follow is refused

    @property
    def constraint(self) -> Constraint | None:
        """The constraint of the answer; None for free text. Raises Refusal, RequestError."""
        from llama2.serve.constrain import constraints

        if self.type == "json_object":
            return constraints.json_object("text.format")
        if self.type == "text":
            return None
        if self.schema_ is None:
            raise Refusal(400, "text.format.schema: is missing", param="text.format.schema", code="invalid_value")
        return constraints.json_schema(self.schema_, "text.format.schema", strict=self.strict is True)


class TextOptions(Wire):
    """The format of an answer's text."""

    HARMLESS: ClassVar[Values] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponsesRequest(SamplingRequest):
    """`POST /v1/responses`."""

    UNSUPPORTED: ClassVar[Values] = {
        **SamplingRequest.UNSUPPORTED,
        "background": (False,),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        # Other routes' names for `max_output_tokens` and `text.format`.
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), ()),
        **dict.fromkeys(("grammar", "json_schema", "structured_outputs"), ()),
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
        "response_format": ({"type": "text"},),
    }
    #: Nothing is stored, truncated or reasoned about, so these have no effect.
    HARMLESS: ClassVar[Values] = {
        **{"reasoning": ({}, {"effort": "none"}), "service_tier": ("auto", "default"), "store": (False,)},
        "truncation": ("disabled",),
    }

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Count = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, http: HttpRequest) -> Response:
    """The assistant's answer to a conversation."""
    if (body.n or 1) > 1:
        raise unsupported("n")
    if others := [what for what in body.include or () if what != LOGPROBS]:
        warn(http, f"include: there is none of {', '.join(what[:60] for what in others[:8])}")
    scored = LOGPROBS in (body.include or ())
    if body.top_logprobs and not scored:
        raise Refusal(400, f"top_logprobs: needs {LOGPROBS!r} in include", param="top_logprobs", code="invalid_value")
    service = await models_of(http).service(body.model)
    format = body.text.format if body.text else None
    messages = _messages(body)
    (request,), (reader,) = await build_requests(
        http,
        service,
        messages,
        base_request(body, service, http, body.max_output_tokens, (body.top_logprobs or 0) if scored else None),
        tools=Tools(body.tools, body.tool_choice, body.parallel_tool_calls, flat=True),
        response=format.constraint if format else None,
        min_tokens=min_tokens_of(body),
    )
    stream = await submit(http, service, [request], dialog=messages, watermark=body.watermark)
    writer = _ResponsesWriter(body, request, reader, service.texts)
    if body.stream:
        return StreamingResponse(writer.events(stream), stream.close, headers=warning_header(body, http))
    async with CancelOnDisconnect(http, stream.close):
        async for batch in stream.batches():
            writer.read(batch)
    return json_response(writer.whole(stream), warning_header(body, http))


class _ResponsesWriter:
    """Writes one response: the items of its output one after another, and their events."""

    def __init__(self, body: ResponsesRequest, request: Request, reader: CallReader, texts: TokenTexts) -> None:
        self._reader = reader
        self._texts = texts
        self._scores: list[Logprob] = []  # of tokens whose text was not sent yet
        self._count = 0
        self._items: list[dict[str, Any]] = []
        format = body.text.format if body.text else None
        self._body: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.sampling.temperature,
            "text": {"format": format.model_dump(by_alias=True, exclude_none=True) if format else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": request.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def whole(self, stream: Stream) -> dict[str, Any]:
        """The response, ended."""
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(stream.ends[0])
        return {
            **self._body,
            "status": "incomplete" if reason else "completed",
            "incomplete_details": {"reason": reason} if reason else None,
            "output": self._items,
            "usage": {
                "input_tokens": stream.prompt_tokens,
                "input_tokens_details": {"cached_tokens": stream.cached_tokens},
                "output_tokens": stream.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": stream.prompt_tokens + stream.completion_tokens,
            },
        }

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        yield self._event("response.created", response=self._body) + self._event(
            "response.in_progress", response=self._body
        )
        try:
            async for batch in stream.batches(PING_SECONDS):
                yield b"".join(self.read(batch)) if batch else PING
        except Refusal as failure:
            error = {"code": "server_error", "message": failure.message}
            yield self._event("response.failed", response={**self._body, "status": "failed", "error": error})
            return
        whole = self.whole(stream)
        yield self._event(f"response.{whole['status']}", response=whole)

    def read(self, batch: list[ChoiceEvent]) -> list[bytes]:
        """Add events of the engine to the output, and return the events to send. Raises Refusal."""
        sent: list[bytes] = []
        for _, event in batch:
            check(event)
            self._scores += [] if event.logprob is None else [event.logprob]
            for piece in self._reader.push(event):
                sent += self._add(piece)
            if event.finish is not None:
                sent += [] if self._items else self._open_message()
                sent += self._close("completed" if event.finish == "stop" else "incomplete")
        return sent

    def _add(self, piece: Piece) -> list[bytes]:
        sent: list[bytes] = []
        match piece:
            case Text(text):
                if not self._items or self._items[-1]["type"] != "message":
                    sent += self._close("completed") + self._open_message()
                logprobs = chat_logprobs(self._scores, self._texts)["content"]
                self._scores = []
                part = self._items[-1]["content"][0]
                part["text"] += text
                part["logprobs"] += logprobs
                sent.append(self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs))
            case CallStart(_, id, name):
                sent += self._close("completed")
                call = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
                sent.append(self._open({**call, "call_id": id, "name": name, "arguments": ""}))
            case CallArguments(_, text):
                self._scores = []  # only text has them
                self._items[-1]["arguments"] += text
                sent.append(self._of_item("response.function_call_arguments.delta", delta=text))
        return sent

    def _open_message(self) -> list[bytes]:
        message = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "status": "in_progress"}
        sent = [self._open({**message, "role": "assistant", "content": []})]
        self._items[-1]["content"].append(_part(""))
        return [*sent, self._of_item("response.content_part.added", content_index=0, part=_part(""))]

    def _open(self, item: dict[str, Any]) -> bytes:
        self._items.append(item)
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self, status: str) -> list[bytes]:
        """End the last item, if there is one."""
        if not self._items:
            return []
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            fields = {name: part[name] for name in ("text", "logprobs")}
            sent = [
                self._of_item("response.output_text.done", content_index=0, **fields),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        else:
            fields = {"name": item["name"], "arguments": item["arguments"]}
            sent = [self._of_item("response.function_call_arguments.done", **fields)]
        return [*sent, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _of_item(self, type: str, **fields: Any) -> bytes:
        return self._event(type, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, type: str, **fields: Any) -> bytes:
        value = {"type": type, "sequence_number": self._count, **fields}
        self._count += 1
        return b"event: " + type.encode() + b"\ndata: " + dump(value) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation in the form of chat completions, where an assistant's text and calls are one message."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        match item.type:
            case "message":
                if item.role is None:
                    raise Refusal(400, f"input.{i}.role: is missing", param=f"input.{i}.role")
                messages.append(to_message(f"input.{i}", ChatMessage(role=item.role, content=item.content)))
            case "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                calls = messages[-1].setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            case "function_call_output":
                output = ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id)
                messages.append(to_message(f"input.{i}", output, content="output"))
            case "reasoning":  # of another model, or of the client; ours has none
                continue
            case _:
                kinds = "only messages, function calls and their outputs are"
                raise unsupported(f"input.{i}.type", f"{item.type[:40]!r} is not supported, {kinds}")
    return messages
