"""Checks of every request: the key, the Host and Origin headers, and the body's size and type.

Origin keeps out pages of other origins, and Host keeps out names of a rebound DNS entry. The reason of a refusal is
logged with its request.
"""

from __future__ import annotations

import contextlib
import hmac
import re
from collections.abc import Collection
from hashlib import sha256
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.serve.errors import Refusal
from llama2.serve.http.address import is_address, origin_pattern
from llama2.serve.http.refusals import send_refusal
from llama2.serve.settings import ServeSettings

#: Paths without a check of key, Host and Origin: they report whether the server is up, and nothing else.
HEALTH = frozenset({"/health", "/v1/health", "/ping"})

#: A Host header: a name, or an address in brackets, and a port.
_AUTHORITY = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._~-]+))(?::[0-9]{0,5})?", re.ASCII | re.I)

#: Methods that change nothing, so a page of any origin may send them. Whether it may read the answer depends on Origin.
_SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Refuses requests before the application receives them, and counts the bytes of the others' bodies."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, public: Collection[str]) -> None:
        """`public` are paths without a key. Raises Llama2Error for a pattern that is not an origin."""
        self._app = app
        self._max_body = settings.max_body
        self._public = frozenset(public)
        self._keys = [sha256(key.encode()).digest() for key in settings.keys]
        self._hosts = {"localhost", settings.host.lower(), *(name.lower() for name in settings.allow_hosts)}
        self._origins = origin_pattern(settings.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The guarded application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        method, path = scope["method"], scope["path"]
        shared: list[tuple[bytes, bytes]] = []
        try:
            with contextlib.suppress(Refusal) if path in HEALTH and method in _SAFE else contextlib.nullcontext():
                _check_single(scope)
                self._check_host(headers)
                shared = self._check_origin(headers, method)
            if method == "OPTIONS" and b"access-control-request-method" in headers:
                await _empty(204, [*shared, *_preflight(headers)] if shared else [], send)
                return
            if not (method in ("GET", "HEAD") and path in self._public):
                self._check_key(headers)
            if method not in _SAFE:
                self._check_body(headers, foreign=bool(shared))
        except Refusal as refusal:
            scope.setdefault("state", {})["refused"] = refusal.message
            await send_refusal(refusal, path, shared, send)
            return
        await self._app(scope, self._counting(receive), _with_headers(shared, send) if shared else send)

    def _check_host(self, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "")
        found = _AUTHORITY.fullmatch(host)
        name = (found["name"] or found["address"]).lower() if found else ""
        if (host and not found) or not ("*" in self._hosts or name in self._hosts or is_address(name)):
            raise Refusal(
                403,
                f"Host: {host[:100]!r} is not a name of this server; --allow-host adds one",
                code="host_not_allowed",
            )

    def _check_origin(self, headers: dict[bytes, str], method: str) -> list[tuple[bytes, bytes]]:
        """Headers by which a page of another origin may read the answer; none for this server's own page."""
        name, origin, host = "Origin", headers.get(b"origin"), headers.get(b"host")
        site = headers.get(b"sec-fetch-site", "none")  # browsers send it, and pages cannot change it
        if origin in (f"http://{host}", f"https://{host}"):
            return []
        if origin is None:
            if method in _SAFE or site in ("none", "same-origin"):
                return []
            name, origin = "Sec-Fetch-Site", site
        elif self._origins.fullmatch(origin):
            exposed = b"Retry-After, Warning, WWW-Authenticate"
            return [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-expose-headers", exposed),
                (b"vary", b"Origin"),
            ]
        raise Refusal(
            403, f"{name}: {origin[:100]!r} may not use this server; --allow-origin adds one", code="origin_not_allowed"
        )

    def _check_key(self, headers: dict[bytes, str]) -> None:
        if not self._keys:
            return
        scheme, _, credentials = headers.get(b"authorization", "").partition(" ")
        bearer = credentials.strip() if scheme.lower() == "bearer" else ""
        given = bearer or headers.get(b"x-api-key", "") or headers.get(b"api-key", "")
        digest = sha256(given.encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, in constant time
        if not any(matches):
            raise Refusal(
                401,
                "the API key is wrong" if given else "an API key is needed, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                type="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_body(self, headers: dict[bytes, str], *, foreign: bool) -> None:
        """Any type is read as JSON; another origin's page must send the type for which browsers send a preflight."""
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "Content-Encoding: bodies must not be compressed")
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if foreign and kind != "application/json":
            raise Refusal(415, f"Content-Type: {kind[:60]!r} must be application/json")
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_body:
            raise _too_large(self._max_body)

    def _counting(self, receive: Receive) -> Receive:
        limit, count = self._max_body, 0

        async def receive_counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                raise _too_large(limit)
            return message

        return receive_counted


def _check_single(scope: Scope) -> None:
    """Of two such headers, this server and a proxy could use different ones."""
    names = [name for name, _ in scope["headers"]]
    for name in (b"host", b"origin"):
        if names.count(name) > 1:
            raise Refusal(400, f"{name.decode().title()}: appears twice; send it once")


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body has more than {limit} bytes, the limit", code="body_too_large")


def _preflight(headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
    wanted = headers.get(b"access-control-request-headers", "")
    return [
        (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", wanted.encode("latin-1") or b"content-type, authorization"),
        (b"access-control-max-age", b"600"),
    ]


def _with_headers(headers: list[tuple[bytes, bytes]], send: Send) -> Send:
    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return send_with_headers


async def _empty(status: int, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
