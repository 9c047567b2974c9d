"""OpenAI's Responses, without memory: nothing is stored, and each request brings its whole conversation."""

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
from llama2.serve.service import ChoiceEvent, Stream
from llama2.serve.surfaces import common
from llama2.serve.surfaces.common import (
    Tools,
    base_request,
    chat_logprobs,
    json_response,
    least_tokens,
    served,
    to_message,
    warn,
    warning_header,
)
from llama2.serve.surfaces.streaming import PING, PING_SECONDS, CancelOnDisconnect, StreamingResponse, dump
from llama2.serve.surfaces.wire import Count, JsonRoute, Message, Part, Sampled, Values, Wire
from llama2.serve.token_text import Texts

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

#: What a request includes to have the log-probabilities of its answer's text.
LOGPROBS = "message.output_text.logprobs"

router = APIRouter(route_class=JsonRoute)


class Item(Wire):
    """A part of the conversation: a message, a call that the assistant made, or what a function answered."""

    UNSUPPORTED: ClassVar[Values] = Message.UNSUPPORTED

    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["developer", "system", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class TextFormat(Wire):
    """Free text, any JSON object, or what a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # whether a keyword that no grammar can follow is refused

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to it. Raises Refusal, RequestError."""
        from llama2.serve.constrain import constraints

        if self.type == "json_object":
            return constraints.json_object("text.format")
        if self.type == "text":
            return None
        if self.schema_ is None:
            raise Refusal(400, "text.format.schema: is missing", param="text.format.schema", code="invalid_value")
        return constraints.json_schema(self.schema_, "text.format.schema", strict=self.strict is True)


class TextOptions(Wire):
    """How an answer's text looks."""

    HARMLESS: ClassVar[Values] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ResponsesRequest(Sampled):
    """`POST /v1/responses`."""

    UNSUPPORTED: ClassVar[Values] = {
        **Sampled.UNSUPPORTED,
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
    #: Nothing is stored, cut or reasoned about, so these have no effect.
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
        warn(http, f"there is nothing to include of {', '.join(what[:60] for what in others[:8])}")
    scored = LOGPROBS in (body.include or ())
    if body.top_logprobs and not scored:
        raise Refusal(400, f"top_logprobs: needs {LOGPROBS!r} in include", param="top_logprobs", code="invalid_value")
    service = await served(http).service(body.model)
    format = body.text.format if body.text else None
    (request,), (reader,) = await common.build_requests(
        http,
        service,
        _messages(body),
        base_request(body, service, http, body.max_output_tokens, (body.top_logprobs or 0) if scored else None),
        tools=Tools(body.tools, body.tool_choice, body.parallel_tool_calls, flat=True),
        response=format.constraint if format else None,
        least=least_tokens(body),
    )
    stream = await common.submit(http, service, [request])
    answer = _Answer(body, request, reader, service.texts)
    if body.stream:
        return StreamingResponse(answer.events(stream), stream.close, headers=warning_header(body, http))
    async with CancelOnDisconnect(http, stream.close):
        async for batch in stream.batches():
            answer.read(batch)
    return json_response(answer.whole(stream), warning_header(body, http))


class _Answer:
    """One response in wire form: the items of its output one after another, and the events that tell of them."""

    def __init__(self, body: ResponsesRequest, request: Request, reader: CallReader, texts: Texts) -> None:
        self._reader = reader
        self._texts = texts
        self._scores: list[Logprob] = []  # of tokens whose text was not told yet
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
        cut = stream.finishes[0] == "length"
        return {
            **self._body,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
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
        """Take what a step says into the output, and return the events that tell of it. Raises Refusal."""
        told: list[bytes] = []
        for _, event in batch:
            common.check(event)
            self._scores += [] if event.logprob is None else [event.logprob]
            for piece in self._reader.push(event):
                told += self._add(piece)
            if event.finish is not None:
                told += [] if self._items else self._open_message()
                told += self._close("incomplete" if event.finish == "length" else "completed")
        return told

    def _add(self, piece: Piece) -> list[bytes]:
        told: list[bytes] = []
        match piece:
            case Text(text):
                if not self._items or self._items[-1]["type"] != "message":
                    told += self._close("completed") + self._open_message()
                logprobs = chat_logprobs(self._scores, self._texts)["content"]
                self._scores = []
                part = self._items[-1]["content"][0]
                part["text"] += text
                part["logprobs"] += logprobs
                told.append(self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs))
            case CallStart(_, id, name):
                told += self._close("completed")
                call = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress"}
                told.append(self._open({**call, "call_id": id, "name": name, "arguments": ""}))
            case CallArguments(_, text):
                self._scores = []  # only text has them
                self._items[-1]["arguments"] += text
                told.append(self._of_item("response.function_call_arguments.delta", delta=text))
        return told

    def _open_message(self) -> list[bytes]:
        message = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "status": "in_progress"}
        told = [self._open({**message, "role": "assistant", "content": []})]
        self._items[-1]["content"].append(_part(""))
        return [*told, self._of_item("response.content_part.added", content_index=0, part=_part(""))]

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
            said = {name: part[name] for name in ("text", "logprobs")}
            told = [
                self._of_item("response.output_text.done", content_index=0, **said),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        else:
            facts = {"name": item["name"], "arguments": item["arguments"]}
            told = [self._of_item("response.function_call_arguments.done", **facts)]
        return [*told, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _of_item(self, type: str, **facts: Any) -> bytes:
        return self._event(type, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **facts)

    def _event(self, type: str, **facts: Any) -> bytes:
        value = {"type": type, "sequence_number": self._count, **facts}
        self._count += 1
        return b"event: " + type.encode() + b"\ndata: " + dump(value) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation as chat completions have it: an assistant's text and calls that follow one another are one."""
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
                messages.append(to_message(f"input.{i}", Message(role=item.role, content=item.content)))
            case "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                calls = messages[-1].setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            case "function_call_output":
                answer = Message(role="tool", content=item.output, tool_call_id=item.call_id)
                messages.append(to_message(f"input.{i}", answer, content="output"))
            case "reasoning":  # of another model, or a client's own; ours gets no thoughts back
                continue
            case _:
                kinds = "only messages, function calls and their outputs are"
                raise unsupported(f"input.{i}.type", f"{item.type[:40]!r} is not supported, {kinds}")
    return messages
