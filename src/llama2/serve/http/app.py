"""The application: the routes of every surface, the page, and what wraps both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import ASGIApp

from llama2.serve.http.access_log import AccessLog
from llama2.serve.http.guard import HEALTH, Guard
from llama2.serve.http.page_files import PageOrRoutes, page_paths
from llama2.serve.http.paths import CanonicalPaths
from llama2.serve.http.refusals import ERRORS, error_response
from llama2.serve.models import Models
from llama2.serve.surfaces import (
    anthropic,
    azure,
    completion,
    embeddings,
    llamacpp,
    moderations,
    ollama,
    openai,
    responses,
    watermark,
)
from llama2.version import package_version

#: Large bodies that are parsed at once: each takes many times its size meanwhile.
_PARSERS = 1


def application(models: Models) -> ASGIApp:
    """The server over these models. Their engines stop when the application does."""

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
        version=package_version(),
        summary="OpenAI's, Anthropic's, llama.cpp's and Ollama's routes over Llama-family models.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.models = models
    app.state.parsers = asyncio.Semaphore(_PARSERS)
    surfaces = (openai, responses, embeddings, moderations, watermark, anthropic, completion, llamacpp, ollama, azure)
    routers = [anthropic.versioned, *(surface.router for surface in surfaces)]
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    for kind in ERRORS:
        app.add_exception_handler(kind, error_response)
    files = page_paths()
    guard = Guard(PageOrRoutes(app, files), models.settings, files | HEALTH)
    return AccessLog(CanonicalPaths(guard, files), models.metrics)
