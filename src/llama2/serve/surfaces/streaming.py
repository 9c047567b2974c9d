"""Responses that are sent while they are generated, and requests that are cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.types import Receive, Scope, Send

#: Seconds without an event after which a stream sends a comment, so that no proxy closes it.
PING_SECONDS = 15.0


class StreamingResponse(Response):
    """Sends `chunks` one by one. `close` is called when the client disconnects, at a failure, and at the end."""

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
    """`async with`: calls `close` when the client disconnects before the block is done, and when it is done."""

    def __init__(self, request: HttpRequest, close: Callable[[], None] | None = None) -> None:
        self.close = close
        self.disconnected = False
        self._request = request

    async def __aenter__(self) -> CancelOnDisconnect:
        self._watcher = asyncio.create_task(_on_disconnect(self._request.receive, self._disconnect))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        del self._watcher  # which refers to this object: a circle would keep the model's memory after it is unloaded
        if self.close is not None:
            self.close()

    def _disconnect(self) -> None:
        self.disconnected = True
        if self.close is not None:
            self.close()
