"""The constraints of an answer: JSON, a JSON schema, a regular expression, GBNF, or llguidance's Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from llama2.errors import RequestError
from llama2.serve.constrain import schemas
from llama2.text.tokenizer import one_line

#: One space, or one line end and an indentation, as JSON's white space: a weak model would not stop otherwise.
_OPTIONS = {"whitespace_pattern": r"[ ]|\r?\n[ \t]{0,40}"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar in llguidance's form, and the request's field that it comes from, for errors.

    `parts` are the grammars that it is made of, each with its own field. `schema` is its JSON schema, if it is one, for
    use within another grammar. `notes` list what of the field it cannot enforce.
    """

    grammar: str
    field: str
    parts: tuple[Constraint, ...] = ()
    schema: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes of the parts, and its own."""
        return tuple(note for part in self.parts for note in part.warnings) + self.notes


def json_object(field: str = "response_format") -> Constraint:
    """Any JSON object."""
    return json_schema({"type": "object"}, field)


def json_schema(schema: Mapping[str, Any], field: str, *, strict: bool = True) -> Constraint:
    """JSON that follows a schema, its properties in the schema's order.

    Unless `strict`, keywords that no grammar can enforce are dropped with a note (`schemas.prepare`). Keywords that are
    not in JSON Schema are annotations, as the standard says. Raises RequestError.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(f"{field} must be a JSON schema, an object, not {type(schema).__name__}")
    prepared, dropped = schemas.prepare(schema, field, strict=strict)
    options = _OPTIONS if strict else {**_OPTIONS, "coerce_one_of": True}
    try:
        text = json.dumps({**prepared, "x-guidance": options}, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise RequestError(f"{field}: not a JSON schema ({one_line(error)})") from None
    notes = (f"{field}: no grammar can enforce {', '.join(dropped)}",) if dropped else ()
    return Constraint(f'{{"grammars": [{{"json_schema": {text}}}]}}', field, schema=text, notes=notes)


def regex(pattern: str, field: str) -> Constraint:
    """Text that a regular expression of Rust's syntax matches from beginning to end; there is no look-around."""
    try:
        return Constraint(LLMatcher.grammar_from_regex(pattern), field)
    except UnicodeEncodeError as error:
        raise RequestError(f"{field}: character {error.start} is a lone surrogate; remove it") from None


def lark(source: str, field: str, parts: tuple[Constraint, ...] = ()) -> Constraint:
    """Text of a Lark grammar with llguidance's extensions, from its rule `start`."""
    return Constraint(json.dumps({"grammars": [{"lark_grammar": source}]}), field, parts)


def choice(texts: Sequence[str], field: str) -> Constraint:
    """One of the texts."""
    return lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts), field)


def grammar(source: str, field: str) -> Constraint:
    """Text of a grammar: llama.cpp's notation where rules are defined by `::=`, else llguidance's Lark."""
    return gbnf(source, field) if "::=" in source else lark(source, field)


def gbnf(source: str, field: str) -> Constraint:
    """Text of a grammar in llama.cpp's notation, from its rule `root`. Raises RequestError."""
    try:
        return lark(gbnf_to_lark(source), field)
    except Exception as error:  # the library raises untyped ones
        raise RequestError(f"{field}: not GBNF ({one_line(error)})") from None
