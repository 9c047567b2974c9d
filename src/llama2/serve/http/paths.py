"""Addresses by which clients of other servers call the routes that are here."""

from __future__ import annotations

import re

#: OpenAI's routes, which clients also ask for without the version in front, or behind Azure's name of a model.
_ROUTES = r"/(?:chat/completions|completions|embeddings|responses|models)"
_AZURE = re.compile(rf"/openai/deployments/(?P<model>.+?)(?P<route>{_ROUTES})", re.DOTALL)
_UNVERSIONED = re.compile(rf"(?:/openai)?(?:/v1)?(?P<route>{_ROUTES}(?:/.*)?)", re.DOTALL)


def canonical(path: str) -> tuple[str, str | None]:
    """The route that a path stands for, and the model that it names, as Azure's do.

    A slash at the end means nothing.
    """
    path = path.rstrip("/") or "/"
    model = None
    if azure := _AZURE.fullmatch(path):
        path, model = azure["route"], azure["model"]
    if found := _UNVERSIONED.fullmatch(path):
        path = "/v1" + found["route"]
    return path, model
