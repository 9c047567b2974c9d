"""HTTP/1.1 on a connection, with the limits that uvicorn leaves to others: heads of bounded size, and time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llama2.serve.errors import Refusal
from llama2.serve.streaming import dump

#: Bytes of an address and its headers, and how many headers.
MAX_HEAD, MAX_HEADERS = 64 << 10, 100


class Protocol(HttpToolsProtocol):
    """Gives up a peer who sends too much before a body, too slowly, or who does not read."""

    timeout: float  # seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A peer has connected, and has to send something in time."""
        super().connection_made(transport)
        self._problem: Refusal | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._expect_head()
        self._late: asyncio.TimerHandle | None = self.loop.call_later(self.timeout, self._give_up)

    def _expect_head(self) -> None:
        self._in_head = True
        self._head = 0

    def _give_up(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._late is None:
            self._late = self.loop.call_later(self.timeout, self._give_up)
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > MAX_HEAD and not self.transport.is_closing():
            self._refuse(self._too_much())

    def on_headers_complete(self) -> None:
        """The head is whole. What is raised here comes back as `send_400_response`."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            self._problem = self._too_much()
            raise ValueError(size)
        super().on_headers_complete()
        self._in_head = False

    def on_message_complete(self) -> None:
        """The request is whole."""
        super().on_message_complete()
        self._expect_head()
        if self._late is not None:
            self._late.cancel()
            self._late = None

    @staticmethod
    def _too_much() -> Refusal:
        return Refusal(431, f"the request's head has more than {MAX_HEAD} bytes or {MAX_HEADERS} headers")

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that the parser, or a method above, did not take."""
        self._refuse(self._problem or Refusal(400, "not a request of HTTP/1.1"))

    def _refuse(self, refusal: Refusal) -> None:
        body = dump(refusal.body())
        head = f"HTTP/1.1 {refusal.status_code} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """The peer reads more slowly than is written."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.timeout, self._give_up)

    def resume_writing(self) -> None:
        """The peer has caught up."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()


def protocol(timeout: float) -> type[Any]:
    """The protocol that gives a peer so many seconds: to send a whole request, and to go on reading."""
    return type("Limited", (Protocol,), {"timeout": timeout})
