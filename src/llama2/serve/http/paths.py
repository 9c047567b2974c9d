"""Paths by which clients of other servers call the routes of this one."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

#: OpenAI's routes, which clients also call without the version, or behind Azure's name of a model.
_ROUTES = r"/(?:chat/completions|completions|embeddings|responses|models)"
_AZURE = re.compile(rf"/openai/deployments/(?P<model>.+?)(?P<route>{_ROUTES})", re.DOTALL)
_UNVERSIONED = re.compile(rf"(?:/openai)?(?:/v1)?(?P<route>{_ROUTES}(?:/.*)?)", re.DOTALL)


class CanonicalPaths:
    """Wraps the application: gives each request the path of its route, and the model that its path names."""

    def __init__(self, app: ASGIApp, files: Collection[str]) -> None:
        """`files` are paths that stay as they are."""
        self._app = app
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http" and scope["path"] not in self._files:
            scope["path"], scope["state"]["model"] = canonical(scope["path"])
        await self._app(scope, receive, send)


def canonical(path: str) -> tuple[str, str | None]:
    """The route of a path, and the model that it names, as Azure's paths do. A slash at the end is ignored."""
    path = path.rstrip("/") or "/"
    model = None
    if azure := _AZURE.fullmatch(path):
        path, model = azure["route"], azure["model"]
    if found := _UNVERSIONED.fullmatch(path):
        path = "/v1" + found["route"]
    return path, model
