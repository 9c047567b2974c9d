"""JSON as it is sent: compact text, server-sent events, responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def quote(value: Any) -> str:
    """Compact JSON."""
    return _ENCODER.encode(value)


def dump(value: Any) -> bytes:
    """Compact JSON as it is sent."""
    return quote(value).encode()


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def json_response(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A JSON object."""
    return Response(dump(value), status, headers, "application/json")
