"""The JSON body of a request: read strictly, and given to the endpoint of its route as a checked model."""

from __future__ import annotations

import asyncio
import json
import json.scanner
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from llama2.serve.errors import Refusal
from llama2.serve.surfaces.context import models_of
from llama2.serve.surfaces.wire import Wire


class JsonRoute(APIRoute):
    """A route whose endpoint takes `http`, and before it the JSON body if it has one.

    The body is read here, because FastAPI's resolution of dependencies takes a tenth of a request, and there are no
    others. A large body is read in a thread.
    """

    def get_route_handler(self) -> Callable[[HttpRequest], Any]:
        model = get_type_hints(self.endpoint).get("body")
        if model is None:
            return super().get_route_handler()

        async def handler(request: HttpRequest) -> Response:
            try:
                given = await request.body()
            except ClientDisconnect:
                raise Refusal(400, "body: the client disconnected before its end") from None
            models, named = models_of(request), request.scope["state"].get("model")
            options: tuple[Any, ...] = (model, models.settings.max_values, named, next(iter(models.entries)))
            if len(given) <= _SMALL:
                body = read(given, *options)
            else:
                async with request.app.state.parsers:
                    body = await asyncio.to_thread(read, given, *options)
            response: Response = await self.endpoint(body, request)
            return response

        return handler


W = TypeVar("W", bound=Wire)


def read(body: bytes, model: type[W], max_values: int, named: str | None = None, default: str = "") -> W:
    """A request as `model`. Its `model` field is what its path `named`, or else the `default`. Raises Refusal."""
    value = parse(body, max_values)
    if isinstance(value, dict) and (field := model.model_fields.get("model")):
        if named is not None:
            value["model"] = named
        elif field.is_required() and value.get("model") is None:
            value["model"] = default
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise to_refusal(errors, value) from None


def parse(body: bytes, max_values: int = 1 << 62) -> Any:
    """The value of a JSON text.

    Raises Refusal: 400 for text that is not JSON or is ambiguous, 413 for more than `max_values` values.
    """
    counted = len(body) > _SMALL and sum(body.count(mark) for mark in _MARKS) > _QUICK
    decoder = _CountingDecoder(max_values) if counted else _Decoder()
    try:
        text = body.decode("utf-8-sig")
        if any(found["lone"] for found in _ESCAPES.finditer(text)):
            raise ValueError("half of a surrogate pair is not a character")
        return decoder.decode(text)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise Refusal(400, f"body: not JSON that can be read: {reason}", code="invalid_json")


#: Bytes of a body that is read in the event loop.
_SMALL = 32 << 10

#: A text has one of these bytes for each value but the first, or for each escape. Up to so many of them, a text is
#: decoded by the C decoder, which lets no other thread run.
_MARKS, _QUICK = (b",", b"[", b"{", b":", b"\\"), 100_000

#: Escapes of JSON: of a surrogate pair, of half of one, of anything else.
_ESCAPES = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


#: The standard library's decoder in Python.
_PYTHON: Any = json.decoder
_SCANNER: Any = json.scanner


class _Decoder(json.JSONDecoder):
    """Reads JSON strictly: no NaN, no infinite numbers, no name twice in an object."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_no_constant, object_pairs_hook=_object, parse_float=_finite)


class _CountingDecoder(_Decoder):
    """Decodes value by value in Python, so that other threads can run. Raises Refusal 413 for too many values."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = self._left = limit
        self.parse_string = _PYTHON.py_scanstring
        self.parse_array = self._array
        self.parse_object = self._object
        self.scan_once = _SCANNER.py_make_scanner(self)

    def _array(self, place: Any, scan: Any) -> Any:
        return _PYTHON.JSONArray(place, self._counting(scan))

    def _object(self, place: Any, strict: bool, scan: Any, *hooks: Any) -> Any:
        return _PYTHON.JSONObject(place, strict, self._counting(scan), *hooks)

    def _counting(self, scan: Any) -> Any:
        def counted(text: str, index: int) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Refusal(
                    413, f"body: has more than {self._limit} values, the limit; --max-values", code="too_many_values"
                )
            return scan(text, index)

        return counted


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1])[0]
        raise ValueError(f"{twice[:100]!r} appears twice in one object")
    return value


def to_refusal(errors: Sequence[Any], value: Any) -> Refusal:
    """The first error of a request, as one line that names the field."""
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])  # the most specific one
    where = []
    for step in first["loc"][1:] if first["loc"][0] == "body" else first["loc"]:
        if isinstance(value, dict) and (step in value or first["type"] == "missing"):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            break  # the rest names one of several types, not a place
        where.append(str(step)[:60])
    field = ".".join(where)
    message = " ".join(str(first["msg"]).split())[:400]
    return Refusal(400, f"{field or 'body'}: {message}", param=field or None, code="invalid_value")
