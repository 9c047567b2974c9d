"""What belongs to one HTTP request beside its body: the models of its server, and the warnings of its response."""

from __future__ import annotations

import logging

from fastapi import Request as HttpRequest

from llama2.serve.models import Models
from llama2.serve.surfaces.wire import Wire

log = logging.getLogger("llama2.serve")


def models_of(http: HttpRequest) -> Models:
    """The models that this application serves."""
    models: Models = http.app.state.models
    return models


def warn(http: HttpRequest, *texts: str) -> None:
    """Add warnings to the response of a request: harmless things that were changed or ignored."""
    http.scope["state"].setdefault("warnings", []).extend(texts)


def warning_header(body: Wire, http: HttpRequest) -> dict[str, str]:
    """A header with the request's warnings, and the fields that were ignored; it is also logged."""
    warnings: list[str] = [*http.scope["state"].get("warnings", ())]
    names = sorted({name[:60] for name in body.ignored()})
    if names:
        warnings.append(f"ignored fields: {', '.join(names[:20])}")
    if not warnings:
        return {}
    text = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "?" for c in "; ".join(warnings))
    log.warning("request accepted with changes", extra={"facts": {"changes": text}})
    return {"Warning": f'299 llama2 "{text}"'}
