"""OpenAI's Responses, without memory: nothing is stored, and each request brings its whole conversation."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

from llama2.engine.request import Request
from llama2.serve import answers
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.openai import drafts, plain, reply, sampling, served, stops, warning
from llama2.serve.service import Stream
from llama2.serve.streaming import PING, PING_SECONDS, Growing, Watched, dump
from llama2.serve.wire import Message, Sampled, StrictRoute, Values

router = APIRouter(route_class=StrictRoute)


class Item(Message):
    """A message of the conversation."""

    UNSUPPORTED: ClassVar[Values] = Message.UNSUPPORTED

    type: str = "message"
    id: str | None = None
    status: str | None = None


class ResponsesRequest(Sampled):
    """`POST /v1/responses`."""

    UNSUPPORTED: ClassVar[Values] = {
        "background": (False,),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
    }

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=1 << 62)
    truncation: Literal["disabled"] | None = None  # nothing is ever cut silently
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, http: HttpRequest) -> Response:
    """The assistant's answer to a conversation."""
    if (body.n or 1) > 1:
        raise unsupported("n")
    service = await served(http).service(body.model)
    prompt = await asyncio.to_thread(service.model.render, _messages(body), neutralise=served(http).settings.neutralise)
    request = Request(tuple(prompt), body.max_output_tokens, sampling(body), stops(body), lookup=drafts(body, http))
    stream = await answers.start(http, service, [request])
    answer = _Answer(body, request)
    if body.stream:
        return Growing(answer.events(stream), stream.close, headers=warning(body))
    async with Watched(http, stream.close):
        (choice,) = await answers.collect(stream)
    return reply(answer.whole(stream, choice.text), warning(body))


class _Answer:
    """One response in wire form."""

    def __init__(self, body: ResponsesRequest, request: Request) -> None:
        self._item = f"msg_{secrets.token_hex(12)}"
        self._count = 0
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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def whole(self, stream: Stream, text: str) -> dict[str, Any]:
        """The response, ended."""
        cut = stream.finishes[0] == "length"
        return {
            **self._body,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message(text, "incomplete" if cut else "completed")],
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
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=self._body) + self._event(
            "response.in_progress", response=self._body
        )
        item = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **place, part=_part("")
        )
        text = ""
        try:
            async for batch in stream.batches(PING_SECONDS):
                new = ""
                for _, event in batch:
                    answers.check(event)
                    new += event.text
                text += new
                if new:
                    yield self._event("response.output_text.delta", **place, delta=new, logprobs=[])
                elif not batch:
                    yield PING
        except Refusal as failure:
            error = {"code": "server_error", "message": failure.message}
            yield self._event("response.failed", response={**self._body, "status": "failed", "error": error})
            return
        whole = self.whole(stream, text)
        yield b"".join(
            [
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
                self._event(f"response.{whole['status']}", response=whole),
            ]
        )

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": [_part(text)]}

    def _event(self, type: str, **facts: Any) -> bytes:
        value = {"type": type, "sequence_number": self._count, **facts}
        self._count += 1
        return b"event: " + type.encode() + b"\ndata: " + dump(value) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _messages(body: ResponsesRequest) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        if item.type != "message":
            raise unsupported(f"input.{i}.type", f"{item.type[:40]!r} is not supported, only messages are")
        messages.append(plain(i, item))
    return messages
