"""Who may ask: the key, the Host and Origin headers, and what a body may be. It wraps the whole application.

Pages of other origins are kept out by Origin, and names that only a rebound DNS entry points here by Host.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.serve.address import is_address
from llama2.serve.errors import Refusal
from llama2.serve.settings import Settings
from llama2.serve.streaming import dump


class Guard:
    """Refuses requests before the application sees them, and counts the bytes of those it passes on."""

    def __init__(self, app: ASGIApp, settings: Settings, public: Collection[str]) -> None:
        """`public` are the paths that may be read without a key."""
        self._app = app
        self._settings = settings
        self._public = frozenset(public)
        self._keys = [sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The guarded application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        shared: list[tuple[bytes, bytes]] = []
        try:
            self._check_host(headers)
            shared = self._check_origin(headers)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await _empty(204, [*shared, *_preflight(headers)] if shared else [], send)
                return
            if not (scope["method"] in ("GET", "HEAD") and scope["path"] in self._public):
                self._check_key(headers)
            if scope["method"] == "POST":
                _check_body(headers, self._settings.max_body)
        except Refusal as refusal:
            await answer(refusal, scope["path"], shared, send)
            return
        await self._app(scope, self._counted(receive), _adding(shared, send) if shared else send)

    def _check_host(self, headers: dict[bytes, str]) -> None:
        host = headers.get(b"host", "")
        name = (urlsplit(f"//{host}").hostname or "") if _is_authority(host) else ""
        allowed = {"localhost", self._settings.host.lower(), *(n.lower() for n in self._settings.allow_hosts)}
        if not ("*" in allowed or name in allowed or is_address(name)):
            raise Refusal(
                403,
                f"Host: {host[:100]!r} is not a name of this server; --allow-host adds one",
                code="host_not_allowed",
            )

    def _check_origin(self, headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
        """Headers that let a page of another origin read the answer; none for this server's own page."""
        origin = headers.get(b"origin")
        if origin is None or origin in (f"http://{headers.get(b'host')}", f"https://{headers.get(b'host')}"):
            return []
        if origin in self._settings.allow_origins or "*" in self._settings.allow_origins:
            exposed = b"Retry-After, Warning, WWW-Authenticate"
            return [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-expose-headers", exposed),
                (b"vary", b"Origin"),
            ]
        raise Refusal(
            403, f"Origin: {origin[:100]!r} may not use this server; --allow-origin adds one", code="origin_not_allowed"
        )

    def _check_key(self, headers: dict[bytes, str]) -> None:
        if not self._keys:
            return
        scheme, _, credentials = headers.get(b"authorization", "").partition(" ")
        given = credentials.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")
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

    def _counted(self, receive: Receive) -> Receive:
        limit, count = self._settings.max_body, 0

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
    body = dump(refusal.told(path))
    own = [(name.lower().encode(), value.encode("latin-1")) for name, value in (refusal.headers or {}).items()]
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": [*kind, *own, *headers]})
    await send({"type": "http.response.body", "body": body})


def _check_body(headers: dict[bytes, str], limit: int) -> None:
    if headers.get(b"content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "Content-Encoding: bodies must not be compressed")
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"Content-Type: {kind[:60]!r} must be application/json")
    length = headers.get(b"content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body has more than {limit} bytes, the limit", code="body_too_large")


def _is_authority(host: str) -> bool:
    return bool(host) and not set(host) & set("/\\@?# ")


def _preflight(headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
    wanted = headers.get(b"access-control-request-headers", "")
    return [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
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
