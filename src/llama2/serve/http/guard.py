"""Who may ask: the key, the Host and Origin headers, and what a body may be. It wraps the whole application.

Pages of other origins are kept out by Origin, and names that only a rebound DNS entry points here by Host. A refusal's
reason is logged with its request.
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
from llama2.serve.settings import Settings
from llama2.serve.surfaces.streaming import dump

#: Paths that anybody may read, by whatever name they call this server: they say whether it is up, and nothing else.
HEALTH = frozenset({"/health", "/v1/health", "/ping"})

#: A Host header: a name, or an address in brackets, and a port.
_AUTHORITY = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._~-]+))(?::[0-9]{0,5})?", re.ASCII | re.I)

#: Methods that change nothing, so that a page of any origin may send them; whether it may read the answer, Origin says.
_SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Refuses requests before the application sees them, and counts the bytes of those it passes on."""

    def __init__(self, app: ASGIApp, settings: Settings, public: Collection[str]) -> None:
        """`public` are the paths that may be read without a key. Raises Llama2Error for a pattern that is no origin."""
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
            await answer(refusal, path, shared, send)
            return
        await self._app(scope, self._counted(receive), _adding(shared, send) if shared else send)

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
        """Headers that let a page of another origin read the answer; none for this server's own page."""
        name, origin, host = "Origin", headers.get(b"origin"), headers.get(b"host")
        site = headers.get(b"sec-fetch-site", "none")  # which browsers send, and pages cannot change
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
        matches = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        if not any(matches):
            raise Refusal(
                401,
                "the API key is wrong" if given else "an API key is needed, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                type="authentication_error",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_body(self, headers: dict[bytes, str], *, foreign: bool) -> None:
        """Any type is taken as JSON, but of another origin's page only that which browsers ask us about first."""
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "Content-Encoding: bodies must not be compressed")
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if foreign and kind != "application/json":
            raise Refusal(415, f"Content-Type: {kind[:60]!r} must be application/json")
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_body:
            raise _too_large(self._max_body)

    def _counted(self, receive: Receive) -> Receive:
        limit, count = self._max_body, 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                raise _too_large(limit)
            return message

        return counted


async def answer(refusal: Refusal, path: str, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    """Send a refusal in the form that the path's clients read."""
    body = dump(refusal.to_json(path))
    own = [(name.lower().encode(), value.encode("latin-1")) for name, value in (refusal.headers or {}).items()]
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": [*kind, *own, *headers]})
    await send({"type": "http.response.body", "body": body})


def _check_single(scope: Scope) -> None:
    """Of two such headers, this server and a proxy before it could believe different ones."""
    names = [name for name, _ in scope["headers"]]
    for name in (b"host", b"origin"):
        if names.count(name) > 1:
            raise Refusal(400, f"{name.decode().title()}: stands twice; send it once")


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body has more than {limit} bytes, the limit", code="body_too_large")


def _preflight(headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
    wanted = headers.get(b"access-control-request-headers", "")
    return [
        (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", wanted.encode("latin-1") or b"content-type, authorization"),
        (b"access-control-max-age", b"600"),
    ]


def _adding(headers: list[tuple[bytes, bytes]], send: Send) -> Send:
    async def adding(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return adding


async def _empty(status: int, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
