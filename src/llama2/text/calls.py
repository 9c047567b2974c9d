"""How a model writes calls of functions, as its chat template shows it.

A template that knows tools writes what an assistant called earlier in a dialog, and the model was trained to write the
same. So a dialog with a call of our own shows the format, whatever the model's family. It is the text before the
function's name, between name and arguments, behind these, and between two calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llama2.errors import TemplateError
from llama2.text import template as templates
from llama2.text.tokenizer import Tokenizer

#: The placeholder in a CallFormat for the id of a call, which is of so many letters and digits.
ID = "\0"
ID_LENGTH = 9

_IDS = re.compile(r"[0-9]{9}")
_NAMES = ("first_probe", "second_probe")
_ARGUMENTS = tuple({f"{name}_argument": "value"} for name in _NAMES)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Probe.",
            "parameters": {
                "type": "object",
                "properties": {f"{name}_argument": {"type": "string", "description": "Any."}},
                "required": [f"{name}_argument"],
            },
        },
    }
    for name in _NAMES
]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """An answer with calls: opening, name, middle, arguments as JSON, then closing; or joint, and the next name.

    Control tokens are in these texts by their own text, and ID for an id. `joint` is None where a model calls one
    function at a time. `marker` distinguishes a call from text: it is the beginning of `opening` that is not JSON. It
    is empty where a call is an answer that begins as one.
    """

    opening: str
    middle: str
    closing: str
    joint: str | None
    marker: str


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template is given a call: what a message without text says, and whether arguments are JSON text."""

    silence: str | None = ""
    as_text: bool = False

    def message(self, content: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """An assistant's message with `calls`, each of an `id`, a `name` and `arguments`."""
        functions = []
        for call in calls:
            arguments = call["arguments"]
            if self.as_text and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            functions.append({"id": call["id"], "type": "function", "function": function})
        return {"role": "assistant", "content": content or self.silence, "tool_calls": functions}


_FORMS = (CallForm(), CallForm(None), CallForm(as_text=True), CallForm(None, as_text=True))


def generic_format(tokenizer: Tokenizer) -> CallFormat:
    """How calls are written for a model whose template knows none: as text that is not a control token of it."""
    left, right = ("<", ">") if "<tool_call>" not in tokenizer.control else ("[", "]")
    begin, end = f"{left}tool_call{right}", f"{left}/tool_call{right}"
    opening, closing = f'{begin}\n{{"name": "', f"}}\n{end}"
    return CallFormat(opening, '", "arguments": ', closing, f"{closing}\n{opening}", begin)


@lru_cache(maxsize=16)
def native_format(source: str | None, tokenizer: Tokenizer) -> CallFormat | None:
    """How the template `source` writes calls; None where it does not, and `generic_format` takes its place."""
    try:
        return call_format(source or "", tokenizer)
    except TemplateError:
        return None


@lru_cache(maxsize=16)
def call_form(source: str, tokenizer: Tokenizer) -> CallForm:
    """The first form in which the template `source` writes a call; what templates should take if it writes none."""
    written = ((form, _answer(source, tokenizer, 1, form)) for form in _FORMS)
    return next((form for form, text in written if text and _NAMES[0] in text), _FORMS[0])


@lru_cache(maxsize=16)
def call_format(source: str, tokenizer: Tokenizer) -> CallFormat:
    """How the template `source` writes calls. Raises TemplateError when it knows no tools, or writes no such format."""
    if not templates.knows_tools(source):
        raise TemplateError("this model's chat template knows no tools; ask without, or use a model that calls them")
    form = call_form(source, tokenizer)
    one = _answer(source, tokenizer, 1, form)
    parts = one and _split(one, 0)
    if not parts:
        raise TemplateError(
            "this model's chat template knows tools, but does not write calls as a name and then a JSON object"
        )
    opening, middle, closing = (_IDS.sub(ID, part) for part in parts)
    joint = None
    if (two := _answer(source, tokenizer, 2, form)) and (first := _split(two, 0)) and (second := _split(first[2], 1)):
        texts = (first[0], first[1], second[1], second[2])
        if tuple(_IDS.sub(ID, text) for text in texts) == (opening, middle, middle, closing):
            joint = _IDS.sub(ID, second[0])
    return CallFormat(opening, middle, closing, joint, re.split(r"\s|\[?\{", opening.strip(), maxsplit=1)[0])


def _answer(source: str, tokenizer: Tokenizer, count: int, form: CallForm) -> str | None:
    """What the template writes for an answer of `count` calls, up to the token that ends it."""
    calls = [{"id": f"{i:09d}", "name": _NAMES[i], "arguments": _ARGUMENTS[i]} for i in range(count)]
    messages = [{"role": "user", "content": "u"}, form.message("", calls)]
    try:
        asked, whole = templates.written(source, messages, tokenizer, _TOOLS)
    except (TemplateError, ValueError):
        return None
    answer = ""
    for part, token in tokenizer.split(whole.removeprefix(asked)):
        if token in templates.ends(source, tokenizer):
            break
        answer += part
    return answer if whole.startswith(asked) else None


def _split(text: str, which: int) -> tuple[str, str, str] | None:
    """The text before a probe's name, between it and its arguments, and behind these."""
    (name, value), *_ = _ARGUMENTS[which].items()
    place = re.search(rf'^(.*?)\b{_NAMES[which]}\b(.*?)\{{\s*"{name}"\s*:\s*"{value}"\s*\}}(.*)$', text, re.DOTALL)
    return (place[1], place[2], place[3]) if place else None
