"""The refusal of a request, as every surface sends it: a status, one line, and the field of the request."""

from __future__ import annotations

import re
from typing import Any

from fastapi import HTTPException

from llama2.errors import ContextError, DialogError, Llama2Error, RequestError, TemplateError, TokenizerError

#: Fields that constrain an answer, at the beginning of a RequestError about one.
_CONSTRAINING = re.compile(
    r"(?:tools|tool_choice|response_format|text\.format|format|json_schema|grammar|guided_\w+|structured_outputs)\b[\w.\[\]]*"
)

#: Anthropic's error types by status; others from 500 on are its `api_error`.
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(HTTPException):
    """Ends a request with an error. `param` names the field, `code` is for programs; both may be None.

    Clients retry requests that end with 408, 409, 429 or 5xx, so only errors that may pass have those.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code, self.type = message, param, code, type

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form: all four keys, always."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_json(self, path: str) -> dict[str, Any]:
        """The error in the form of this path's clients: Ollama's, Anthropic's, or else OpenAI's."""
        if path.startswith("/api/"):
            return {"error": self.message}
        if path.startswith("/v1/messages"):
            other = "invalid_request_error" if self.status_code < 500 else "api_error"
            kind = _ANTHROPIC.get(self.status_code, other)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return self.body()


def unsupported(field: str, what: str = "") -> Refusal:
    """The refusal of a known field that this server does not support."""
    return Refusal(400, f"{field}: {what or 'not supported'}; leave it out", param=field, code="unsupported_value")


def to_refusal(error: Llama2Error) -> Refusal:
    """The refusal for a mistake of the caller's, or for a failure of the model."""
    if isinstance(error, ContextError):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, DialogError | TemplateError):
        return Refusal(400, str(error), param="messages", code="invalid_messages")
    if isinstance(error, RequestError) and (found := _CONSTRAINING.match(str(error))):
        return Refusal(400, str(error), param=found[0], code="invalid_value")
    if isinstance(error, RequestError | TokenizerError):
        return Refusal(400, str(error), code="invalid_value")
    return Refusal(500, str(error), type="server_error")
