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
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import llama2
from llama2.errors import Llama2Error
from llama2.serve import answers, llamacpp, ollama, openai, responses, wire
from llama2.serve.errors import Refusal
from llama2.serve.models import Models
from llama2.serve.observe import Observed
from llama2.serve.security import Guard

PAGE = Path(__file__).with_name("page")

#: Paths that need no key, besides the page's own files.
HEALTH = frozenset({"/health", "/v1/health"})


def application(models: Models) -> ASGIApp:
    """The server over these models. Their engines stop when the application does."""
    settings = models.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(models, settings.keep_alive)) if settings.keep_alive else None
        try:
            yield
        finally:
            if sweeper is not None:
                sweeper.cancel()
            models.close()

    app = FastAPI(
        title="llama2",
        version=llama2.__version__,
        summary="OpenAI's, llama.cpp's and Ollama's routes over Llama-family models.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.models = models
    for surface in (openai, responses, llamacpp, ollama):
        app.include_router(surface.router)
    for kind in (Llama2Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    page = Page(directory=PAGE, html=True)
    files = {"/" + file.relative_to(PAGE).as_posix() for file in PAGE.rglob("*") if file.is_file()}
    files |= {"/", "/docs", "/docs/"}  # whose files are index.html

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["type"] == "http" and scope["path"] in files
        await (page if found else app)(scope, receive, send)

    return Observed(Guard(whole, settings, files | HEALTH), models.metrics)


async def _sweep(models: Models, keep_alive: float) -> None:
    while True:
        await asyncio.sleep(min(keep_alive, 5.0))
        await models.let_go(keep_alive)


async def _failed(http: HttpRequest, error: Exception) -> Response:
    refusal = _refusal(error, http.url.path)
    return openai.reply(refusal.told(http.url.path), refusal.headers, refusal.status_code)


def _refusal(error: Exception, path: str) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return wire.refusal(error)
    if isinstance(error, Llama2Error):
        return answers.refuse(error)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return Refusal(404, f"{path[:100]!r} is not served here; /docs lists what is", code="not_found")
        return Refusal(error.status_code, error.detail)
    return Refusal(500, "an internal error, which the server's log explains", type="server_error")


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

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.HEADERS]
            await send(message)

        await super().__call__(scope, receive, with_headers)
