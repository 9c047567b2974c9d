"""What a stream of Anthropic's events says when nothing comes, and when an answer fails; errors by their status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fakes import ByteTokenizer
from llama2.engine.request import Event, Request
from llama2.serve.constrain.tools import CallReader
from llama2.serve.errors import Refusal
from llama2.serve.surfaces import anthropic
from serving import events


class Silent:
    """A stream whose answer begins, is silent for a while, and then ends with `last`."""

    prompt_tokens, cached_tokens, completion_tokens = 3, 0, 1

    def __init__(self, last: Event) -> None:
        self._last = last

    async def batches(self, interval: float) -> AsyncIterator[list[tuple[int, Event]]]:
        assert interval > 0
        yield [(0, Event(0, 5, "A"))]
        yield []
        yield [(0, self._last)]


def streamed(last: Event) -> list[dict[str, Any]]:
    body = anthropic.MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}], "stop_sequences": ["B"]}
    )
    reader = CallReader(None, set(), ByteTokenizer())  # type: ignore[arg-type]
    writer = anthropic._MessageWriter(body, Request((1,), 9), reader)
    silent: Any = Silent(last)

    async def read() -> bytes:
        return b"".join([part async for part in writer.events(silent)])

    return events(asyncio.run(read()))


def test_silence_and_the_end() -> None:
    said = streamed(Event(0, 6, "", "stop", stop="B"))
    assert [event["type"] for event in said] == [
        *("message_start", "content_block_start", "content_block_delta", "ping", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert said[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "B"}


def test_a_chat_formats_own_end_is_no_stop_sequence() -> None:
    said = streamed(Event(0, 6, "", "stop", stop="USER:"))
    assert said[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_an_answer_that_fails() -> None:
    *_, ping, last = streamed(Event(0, None, "", "error", error="the grammar is not followed"))
    assert ping == {"type": "ping"}
    assert last == {"type": "error", "error": {"type": "api_error", "message": "the grammar is not followed"}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropics_error_types(status: int, kind: str) -> None:
    error = {"type": "error", "error": {"type": kind, "message": "why"}}
    assert Refusal(status, "why").to_json("/v1/messages/count_tokens") == error
    assert set(Refusal(status, "why").to_json("/v1/chat/completions")) == {"error"}
