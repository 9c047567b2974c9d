"""Responses that grow: server-sent events and lines of JSON, sent as they come, and cancelled when nobody reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

#: Seconds after which a silent stream sends a comment, so that nobody on the way gives it up.
PING_SECONDS = 15.0


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def quote(value: Any) -> str:
    """Compact JSON."""
    return _ENCODER.encode(value)


def dump(value: Any) -> bytes:
    """Compact JSON as it is sent."""
    return quote(value).encode()


class StreamingResponse(Response):
    """Sends `chunks` one by one. When the client goes, or something fails, `close` is called, once in any case."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        close: Callable[[], None],
        *,
        headers: dict[str, str] | None = None,
        media_type: str = "text/event-stream",
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._chunks = chunks
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this response."""
        watcher = asyncio.create_task(_on_disconnect(receive, self._close))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            self._close()


async def _on_disconnect(receive: Receive, close: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    close()


class CancelOnDisconnect:
    """`async with`: calls `close` when the client goes before the block is done."""

    def __init__(self, request: HttpRequest, close: Callable[[], None]) -> None:
        self._request = request
        self._close = close

    async def __aenter__(self) -> None:
        self._watcher = asyncio.create_task(_on_disconnect(self._request.receive, self._close))

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        self._close()
