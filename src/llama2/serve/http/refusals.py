"""Errors → responses, in the form of each path's clients."""

from __future__ import annotations

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope, Send

from llama2.errors import Llama2Error
from llama2.serve.errors import Refusal, to_refusal
from llama2.serve.surfaces import json_body
from llama2.serve.surfaces.encoding import dump, json_response

#: The errors that `error_response` answers.
ERRORS = (Llama2Error, RequestValidationError, HTTPException, Exception)


async def error_response(http: HttpRequest, error: Exception) -> Response:
    """The response for an error that a route raised."""
    refusal = _refusal(error, http)
    return json_response(refusal.to_json(http.scope["path"]), refusal.headers, refusal.status_code)


async def send_refusal(refusal: Refusal, path: str, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    """Send a refusal in the form of the path's clients, without a route."""
    body = dump(refusal.to_json(path))
    own = [(name.lower().encode(), value.encode("latin-1")) for name, value in (refusal.headers or {}).items()]
    kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": [*kind, *own, *headers]})
    await send({"type": "http.response.body", "body": body})


def not_allowed(scope: Scope, methods: set[str]) -> Refusal:
    """The refusal of a method that a path does not have."""
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    message = f"{scope['method'][:20]}: {scope['path'][:100]!r} takes {allowed}"
    return Refusal(405, message, code="method_not_allowed", headers={"Allow": allowed})


def _refusal(error: Exception, http: HttpRequest) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return json_body.to_refusal(error.errors(), error.body)
    if isinstance(error, Llama2Error):
        return to_refusal(error)
    if isinstance(error, HTTPException):
        path = http.scope["path"]
        if error.status_code == 404:
            return Refusal(404, f"{path[:100]!r} is not served here; /docs lists what is", code="not_found")
        if error.status_code == 405:
            fitting = (route for route in http.app.state.routes if route.matches(http.scope)[0] is not Match.NONE)
            return not_allowed(http.scope, {method for route in fitting for method in route.methods})
        return Refusal(error.status_code, error.detail)
    return Refusal(500, "an internal error; the server's log has its cause", type="server_error")
