"""HTTP/1.1 on a connection, with limits that uvicorn does not have: on heads, time and connections."""

from __future__ import annotations

import asyncio
import select
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llama2.serve.errors import Refusal
from llama2.serve.settings import ServeSettings
from llama2.serve.surfaces.encoding import dump

#: Bytes of a request besides its body: path, headers, chunk extensions and trailers.
MAX_HEAD = 64 << 10
#: Headers of a request, and pipelined requests of a connection.
MAX_HEADERS, MAX_PIPELINED = 100, 16

#: Bytes of a chunk's frame that are free: a length in hexadecimal digits, and two line ends.
_FRAME = 16
#: Bytes that are parsed at once, so that limits are checked in time.
_SLICE = 16 << 10

#: Seconds between two checks of a client that sends no more, but may still read.
_CHECK = 0.1


class Protocol(HttpToolsProtocol):
    """Closes the connection of a peer who sends too much besides a body, is too slow, or does not read."""

    settings: ServeSettings
    idle: dict[Protocol, None]  # connections without a request, the longest idle ones first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A peer has connected, and must send a request in time. At the limit, an idle connection is closed for it."""
        super().connection_made(transport)
        self._problem: Refusal | None = None
        self._in_head = True
        self._upgrading = False
        self._outside = 0  # bytes of this request besides its body
        self._stalled: asyncio.TimerHandle | None = None
        self._checking: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = self.loop.call_later(self.settings.timeout, self._give_up)
        if len(self.connections) > self.settings.max_connections:
            if not self.idle:
                message = f"{self.settings.max_connections} connections are open, the limit"
                refusal = Refusal(503, message, code="too_many_connections", type="unavailable_error")
                self._refuse(refusal, b"retry-after: 1\r\n")
                return
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest._give_up()
        self.idle[self] = None

    def _give_up(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._unset_keepalive_if_required()
        if self._late is None:
            self._late = self.loop.call_later(self.settings.timeout, self._give_up)
        for at in range(0, len(data), _SLICE):
            part = data[at : at + _SLICE]
            self._outside += len(part)
            self._parse(part)
            self._outside = max(0, self._outside)
            if self._outside > MAX_HEAD and not self.transport.is_closing():
                self._refuse(self._too_much())
            if self.transport.is_closing():
                return

    def _parse(self, data: bytes) -> None:
        """As uvicorn does, but an upgrade is ignored: the request continues without one."""
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:  # here the parser ended the request, without its body
            self._upgrading = False
            headers = [(name, value) for name, value in self.headers if name != b"upgrade"]
            lines = [b"%s %s HTTP/1.1" % (self.parser.get_method(), self.url), *map(b"%s: %s".__mod__, headers)]
            self.parser = HttpRequestParser(self)
            self._parse(b"\r\n".join([*lines, b"", b""]) + data[upgrade.args[0] :])
        except HttpParserError:
            self.send_400_response("")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; one after the body is counted and dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete. An error here becomes a call of `send_400_response`."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD or len(self.headers) > MAX_HEADERS:
            self._problem = self._too_much()
            raise ValueError(size)
        if len(self.pipeline) >= MAX_PIPELINED or self.parser.get_method() == b"CONNECT":
            raise ValueError(MAX_PIPELINED)
        self._upgrading = self.parser.should_upgrade()
        if self._upgrading:
            return
        self.idle.pop(self, None)
        super().on_headers_complete()
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._outside -= len(body)
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        """A chunk of the body is complete."""
        self._outside -= _FRAME

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._upgrading:
            return
        super().on_message_complete()
        self._in_head, self._outside = True, 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        if cycle.scope["http_version"] == "1.0":
            app = _until_closed(app, cycle)
        elif cycle.keep_alive:
            value = f"timeout={self.settings.idle_timeout:.0f}".encode()
            cycle.default_headers = [*cycle.default_headers, (b"keep-alive", value)]
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def on_response_complete(self) -> None:
        """A request is answered."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.idle[self] = None

    def eof_received(self) -> bool:  # type: ignore[override]
        """The peer sends no more. Its complete requests are answered, unless it has closed the connection.

        A closed one answers a write with a reset. So something harmless is sent: an interim response, or a zero
        before the next chunk's length.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        if not self.pipeline and cycle.scope["http_version"] == "1.1":
            if not cycle.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            elif cycle.chunked_encoding and cycle.scope["method"] != "HEAD":
                self.transport.write(b"0")
        self._check_reset()
        return True

    def _check_reset(self) -> None:
        """Close the connection once the peer has reset it; nothing else would notice before the next write."""
        if self.transport.is_closing() or not hasattr(select, "poll"):
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):
            self._give_up()
        else:
            self._checking = self.loop.call_later(_CHECK, self._check_reset)

    @staticmethod
    def _too_much() -> Refusal:
        return Refusal(431, f"the request has more than {MAX_HEAD} bytes besides its body, or {MAX_HEADERS} headers")

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for a request that the parser, or a method above, did not accept."""
        self._refuse(self._problem or Refusal(400, "not a request of HTTP/1.1"))

    def _refuse(self, refusal: Refusal, headers: bytes = b"") -> None:
        """Close the connection; send the reason unless it would end up inside an answer."""
        cycle = self.cycle
        if cycle is not None and not (cycle.response_complete if self._in_head else not cycle.response_started):
            self._give_up()
            return
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        body = dump(refusal.body())
        head = f"HTTP/1.1 {refusal.status_code} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n".encode() + headers + b"\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """The peer reads more slowly than is written."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.settings.timeout, self._give_up)

    def resume_writing(self) -> None:
        """The peer has caught up."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self.idle.pop(self, None)
        for timer in (self._late, self._stalled, self._checking):
            if timer is not None:
                timer.cancel()


def protocol(settings: ServeSettings) -> type[Any]:
    """The protocol with these limits, whose connections share the list of idle ones."""
    return type("Limited", (Protocol,), {"settings": settings, "idle": {}})


def _until_closed(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """An application for HTTP/1.0, which has no chunks: an answer of unknown length ends with the connection."""

    async def framed(scope: Scope, receive: Receive, send: Send) -> None:
        endless = False

        async def send_unchunked(message: Message) -> None:
            nonlocal endless
            if message["type"] == "http.response.start":
                endless = all(name.lower() != b"content-length" for name, _ in message["headers"])
                if endless:
                    cycle.chunked_encoding = False
            elif endless:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_unchunked)

    return framed
