"""The files of the chat page, which answer before any route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from llama2.serve.http.refusals import not_allowed, send_refusal

PAGE = Path(__file__).parents[1] / "page"


def page_paths() -> frozenset[str]:
    """The paths of the page's files."""
    files = {"/" + file.relative_to(PAGE).as_posix() for file in PAGE.rglob("*") if file.is_file()}
    return frozenset(files | {"/", "/docs", "/docs/"})  # whose files are index.html


class PageOrRoutes:
    """Answers with a file of the page, or else by the routes of `app`. HEAD has the route of GET."""

    def __init__(self, app: ASGIApp, files: frozenset[str]) -> None:
        self._app = app
        self._files = files
        self._page = Page(directory=PAGE, html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in self._files:
            await self._page(scope, receive, send)
        else:  # the protocol leaves out the body of an answer to HEAD
            routed = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            try:
                await self._app(routed, receive, send)
            finally:
                scope["route"] = routed.get("route")  # for the log


class Page(StaticFiles):
    """The files. They may load nothing from other servers, and no other page may frame them."""

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
            await send_refusal(not_allowed(scope, {"GET"}), scope["path"], [], send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.HEADERS]
            await send(message)

        await super().__call__(scope, receive, send_with_headers)
