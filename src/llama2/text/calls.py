"""How a model writes calls of functions, as its chat template shows it.

A template that knows tools writes what an assistant called earlier in a dialog, and the model was trained to write the
same. So a dialog with a call of our own tells the format, whatever the model's family: what stands before the
function's name, between name and arguments, after these, and between one call and the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llama2.errors import TemplateError
from llama2.text import template as templates
from llama2.text.tokenizer import Tokenizer

#: Stands in a CallFormat for the id of a call, which is of so many letters and digits.
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

    Control tokens stand in these texts by their own text, and ID for an id. `joint` is None where a model calls one
    function at a time. `marker` is what distinguishes a call from text: the beginning of `opening` that is not JSON;
    empty where a call is an answer that begins as one.
    """

    opening: str
    middle: str
    closing: str
    joint: str | None
    marker: str


@lru_cache(maxsize=16)
def call_format(source: str, tokenizer: Tokenizer) -> CallFormat:
    """How the template `source` writes calls. Raises TemplateError when it knows no tools, or writes no such format."""
    if not templates.knows_tools(source):
        raise TemplateError("this model's chat template knows no tools; ask without, or use a model that calls them")
    one = _answer(source, tokenizer, 1)
    parts = one and _split(one, 0)
    if not parts:
        raise TemplateError(
            "this model's chat template knows tools, but does not write calls as a name and then a JSON object"
        )
    opening, middle, closing = (_IDS.sub(ID, part) for part in parts)
    joint = None
    if (two := _answer(source, tokenizer, 2)) and (first := _split(two, 0)) and (second := _split(first[2], 1)):
        texts = (first[0], first[1], second[1], second[2])
        if tuple(_IDS.sub(ID, text) for text in texts) == (opening, middle, middle, closing):
            joint = _IDS.sub(ID, second[0])
    return CallFormat(opening, middle, closing, joint, re.split(r"\s|\[?\{", opening.strip(), maxsplit=1)[0])


def _answer(source: str, tokenizer: Tokenizer, count: int) -> str | None:
    """What the template writes for an answer of `count` calls, up to the token that ends it."""
    calls = [
        {"id": f"{i:09d}", "type": "function", "function": {"name": _NAMES[i], "arguments": _ARGUMENTS[i]}}
        for i in range(count)
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    try:
        asked, whole = templates.written(source, messages, tokenizer, _TOOLS)
    except (TemplateError, ValueError):
        return None
    answer = ""
    for part, token in tokenizer.split(whole.removeprefix(asked)):
        if token in tokenizer.stop_ids:
            break
        answer += part
    return answer if whole.startswith(asked) else None


def _split(text: str, which: int) -> tuple[str, str, str] | None:
    """What stands before a probe's name, between it and its arguments, and after these."""
    (name, value), *_ = _ARGUMENTS[which].items()
    place = re.search(rf'^(.*?)\b{_NAMES[which]}\b(.*?)\{{\s*"{name}"\s*:\s*"{value}"\s*\}}(.*)$', text, re.DOTALL)
    return (place[1], place[2], place[3]) if place else None
