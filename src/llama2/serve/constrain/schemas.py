"""JSON schemas of clients → schemas that the grammar engine can enforce."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama2.errors import RequestError

#: Formats that the grammar engine enforces; others are annotations, as the standard says (draft 2020-12, 7.2.1).
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})

#: Keywords that it does not know, and that restrict what a schema allows.
NARROWING = frozenset(
    {"contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains"}
    | {"not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems"}
)

#: Keywords that hold schemas: one, by name, or a list.
_ONE = frozenset({"additionalProperties", "additionalItems", "items", "contains", "not", "if", "then", "else"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_LISTED = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})

#: Lookaround and backreferences, which Rust's regular expressions do not have.
_LOOKAROUND = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[1-9])")

#: Keywords beside `properties` that allow other properties.
_OPENING = frozenset({"additionalProperties", "patternProperties", "$ref"})

_DEEPEST = 300


def prepare(schema: Mapping[str, Any], field: str, *, strict: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A schema for the grammar engine, and the names of unknown keywords that were dropped.

    `oneOf` is among them: the engine enforces one of the schemas, but not exactly one.

    An object with named properties has no others unless `additionalProperties` or another keyword allows them: small
    models would not come to an end. If `strict`, nothing is dropped, and the engine refuses the keyword by name. A
    keyword that is null is left out. Raises RequestError if the schema is nested too deeply.
    """
    dropped: set[str] = set()
    # An object that several schemas describe must not be closed by one of them.
    closes = not any(_combines(each) for each in _walk(schema, field))

    def fix(value: Any) -> Any:
        if isinstance(value, list):
            return [fix(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        fixed: dict[str, Any] = {}
        for name, given in value.items():
            if given is None and name not in ("const", "default", "example"):
                continue
            if name == "format" and given not in FORMATS:
                continue
            if not strict and name == "oneOf":
                dropped.add(name)  # it becomes anyOf
            if not strict and (name in NARROWING or (name == "pattern" and _has_lookaround(given))):
                dropped.add(name)
                continue
            if name in _ONE or name in _LISTED:
                fixed[name] = fix(given)
            elif name in _NAMED and isinstance(given, Mapping):
                fixed[name] = {key: fix(inner) for key, inner in given.items()}
            else:
                fixed[name] = given
        if closes and "properties" in fixed and not fixed.keys() & _OPENING:
            fixed["additionalProperties"] = False
        return fixed

    return fix(schema), tuple(sorted(dropped))


def _has_lookaround(pattern: Any) -> bool:
    return isinstance(pattern, str) and _LOOKAROUND.search(pattern) is not None


def _combines(schema: Mapping[str, Any]) -> bool:
    """Whether a schema adds properties to those of others."""
    parts = schema.get("allOf")
    if isinstance(parts, list) and (len(parts) > 1 or "properties" in schema):
        return True
    return "properties" in schema and bool(schema.keys() & {"anyOf", "oneOf", "$ref"})


def _walk(schema: Any, field: str) -> list[Mapping[str, Any]]:
    """Every object in a schema."""
    found: list[Mapping[str, Any]] = []
    level: list[Any] = [schema]
    for _ in range(_DEEPEST):
        if not level:
            return found
        found += [value for value in level if isinstance(value, Mapping)]
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(inner, (Mapping, list))
        ]
    raise RequestError(f"{field}: a JSON schema of more than {_DEEPEST} levels; make it flatter")
