"""Ollama's `keep_alive`: how long a model stays loaded after its last use."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

#: Seconds from which on a model counts as loaded forever: a hundred years, which dates can still express.
FOREVER = 100 * 365 * 86400.0

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"([+-]?)((?:{_AMOUNT.pattern})+|\d+\.?\d*|\.\d+)")


def seconds(value: Any) -> Any:
    """Seconds of a `keep_alive`: a number of them, or a duration of Go's such as "1h30m". Negative ones are forever.

    Raises ValueError for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if len(value) > 64 or (found := _DURATION.fullmatch(value)) is None:
            raise ValueError(f'{value[:40]!r} is not a duration; give seconds, or a text such as "5m" or "-1"')
        parts = _AMOUNT.findall(found[2]) or [(found[2], "")]
        amount = sum(float(number) * _UNITS[unit] for number, unit in parts)
        value = -amount if found[1] == "-" else amount
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError('must be seconds, or a text such as "5m" or "-1"')
    return float(value) if 0 <= value < FOREVER else math.inf


KeepAlive = Annotated[
    float | None, BeforeValidator(seconds), WithJsonSchema({"type": ["number", "string", "null"], "default": None})
]
