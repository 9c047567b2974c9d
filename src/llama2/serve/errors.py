"""A refusal as every surface tells it: a status, one line, and which field of the request is meant."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

#: Anthropic's error types by status; of the others, those from 500 on are its `api_error`.
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

    Clients repeat requests that end with 408, 409, 429 or 5xx, so only what may go well the next time has those.
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
        """The error as OpenAI's specification has it: all four keys, always."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def to_json(self, path: str) -> dict[str, Any]:
        """The error as clients of this path read it: Ollama's line, Anthropic's object, or else OpenAI's."""
        if path.startswith("/api/"):
            return {"error": self.message}
        if path.startswith("/v1/messages"):
            other = "invalid_request_error" if self.status_code < 500 else "api_error"
            kind = _ANTHROPIC.get(self.status_code, other)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return self.body()


def unsupported(field: str, what: str = "") -> Refusal:
    """Refuses a field that is known, but means something that this server does not do."""
    return Refusal(400, f"{field}: {what or 'not supported'}; leave it out", param=field, code="unsupported_value")
