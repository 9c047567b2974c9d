"""The application: routes, the page, and how failures are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import llama2
from llama2.errors import Llama2Error
from llama2.serve.errors import Refusal
from llama2.serve.http.access_log import AccessLog
from llama2.serve.http.guard import HEALTH, Guard, answer
from llama2.serve.http.paths import canonical
from llama2.serve.models import Models
from llama2.serve.surfaces import (
    anthropic,
    azure,
    common,
    completion,
    embeddings,
    llamacpp,
    ollama,
    openai,
    responses,
    wire,
)

PAGE = Path(__file__).parents[1] / "page"

#: Large bodies that are parsed at once: each takes many times its size meanwhile.
_PARSERS = 1


def application(models: Models) -> ASGIApp:
    """The server over these models. Their engines stop when the application does."""
    settings = models.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(models.sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            models.close()

    app = FastAPI(
        title="llama2",
        version=llama2.__version__,
        summary="OpenAI's, Anthropic's, llama.cpp's and Ollama's routes over Llama-family models.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.models = models
    app.state.parsers = asyncio.Semaphore(_PARSERS)
    surfaces = (openai, responses, embeddings, anthropic, completion, llamacpp, ollama, azure)
    routers = [anthropic.versioned, *(surface.router for surface in surfaces)]
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    for kind in (Llama2Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    page = Page(directory=PAGE, html=True)
    files = {"/" + file.relative_to(PAGE).as_posix() for file in PAGE.rglob("*") if file.is_file()}
    files |= {"/", "/docs", "/docs/"}  # whose files are index.html

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
        elif scope["path"] in files:
            await page(scope, receive, send)
        else:  # HEAD wherever GET is: the server below leaves the body out
            routed = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            try:
                await app(routed, receive, send)
            finally:
                scope["route"] = routed.get("route")  # for the log

    guard = Guard(whole, settings, files | HEALTH)

    async def renamed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in files:
            scope["path"], scope["state"]["model"] = canonical(scope["path"])
        await guard(scope, receive, send)

    return AccessLog(renamed, models.metrics)


async def _failed(http: HttpRequest, error: Exception) -> Response:
    path = http.scope["path"]
    refusal = _refusal(error, http)
    return common.json_response(refusal.to_json(path), refusal.headers, refusal.status_code)


def _refusal(error: Exception, http: HttpRequest) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return wire.refusal(error.errors(), error.body)
    if isinstance(error, Llama2Error):
        return common.to_refusal(error)
    if isinstance(error, HTTPException):
        path = http.scope["path"]
        if error.status_code == 404:
            return Refusal(404, f"{path[:100]!r} is not served here; /docs lists what is", code="not_found")
        if error.status_code == 405:
            fitting = (route for route in http.app.state.routes if route.matches(http.scope)[0] is not Match.NONE)
            return _not_allowed(http.scope, {method for route in fitting for method in route.methods})
        return Refusal(error.status_code, error.detail)
    return Refusal(500, "an internal error, which the server's log explains", type="server_error")


def _not_allowed(scope: Scope, methods: set[str]) -> Refusal:
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    message = f"{scope['method'][:20]}: {scope['path'][:100]!r} takes {allowed}"
    return Refusal(405, message, code="method_not_allowed", headers={"Allow": allowed})


class Page(StaticFiles):
    """The chat page's files, which may load nothing but what this server has, and stand in no other page."""

    HEADERS = (
        (
            b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
            b"connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-cache"),
    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of the page's files."""
        if scope["method"] not in ("GET", "HEAD"):
            await answer(_not_allowed(scope, {"GET"}), scope["path"], [], send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.HEADERS]
            await send(message)

        await super().__call__(scope, receive, with_headers)
