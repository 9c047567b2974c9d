"""Tools: a request's declarations, the constraint of its answer, and the answer's text → calls, piece by piece.

    toolset = Toolset(body.tools, body.tool_choice, body.parallel_tool_calls, template, tokenizer)
    prompt, _ = Dialog(messages).render(tokenizer, template, tools=toolset.declared)
    request = Request(tuple(prompt), processors=tuple(map(constrainer.processor, toolset.constraints)))
    reader = toolset.reader()
    for event in engine.run(request):
        for piece in reader.push(event):  # Text, CallStart, CallArguments
            send(piece.delta())
    reader.message(), reader.finish_reason(event.finish)

Processors and readers belong to one answer: make new ones for each choice.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama2.engine.request import Event
from llama2.errors import RequestError, TemplateError
from llama2.serve.constrain import constraints
from llama2.serve.constrain.constraints import Constraint
from llama2.text.calls import ID, ID_LENGTH, CallFormat, call_format, generic_format, native_format
from llama2.text.tokenizer import Tokenizer

MAX_FUNCTIONS = 128  # of a request, OpenAI's limit
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_LETTERS = re.compile(r"[a-zA-Z0-9_-]*")
_MARKS = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Function:
    """A function that an answer may call; `parameters` is the JSON schema of its arguments, in the field `field`."""

    name: str
    parameters: Mapping[str, Any]
    field: str
    strict: bool = False  # whether a keyword that no grammar can enforce is refused


class Toolset:
    """The tools of one request: declarations for the template, constraints of the answer, and its reader.

    `declared` is for Dialog.render; `constraints`, none or one, for Constrainer.processor; each answer has its own
    `reader`. With `tool_choice="none"`, or without tools, nothing is declared and the answer is text. With `auto`, an
    answer that begins as a call becomes a complete call of a declared function. `required` or a function's name forces
    a call. Several calls may follow one another if the model's format has that and `parallel` allows it. An answer
    without calls follows `response`; with `auto` that must be the constraint of a JSON schema. `flat`: tools and a
    choice have their function's fields beside their type, as in Responses, not in an object `function`.

    If the template has no tools, calls have the `generic` format, if that is true.

    Raises RequestError that names the malformed field, or reports that the model has no tools.
    """

    def __init__(
        self,
        tools: Any,
        tool_choice: Any,
        parallel: bool | None,
        template: str | None,
        tokenizer: Tokenizer,
        response: Constraint | None = None,
        *,
        flat: bool = False,
        generic: bool = False,
    ) -> None:
        functions = _functions(tools, flat)
        choice = _choice(tool_choice, functions, flat)
        self.declared: Sequence[Mapping[str, Any]] | None = None
        self.constraints = () if response is None else (response,)
        self._functions: tuple[Function, ...] = ()
        self._format: CallFormat | None = None
        self._tokenizer = tokenizer
        if choice == "none":
            return
        if generic:
            self._format = native_format(template, tokenizer) or generic_format(tokenizer)
        else:
            try:
                self._format = call_format(template or "", tokenizer)
            except TemplateError as error:
                raise RequestError(f"tools: {error}") from None
        self.declared = [_nested(tool) for tool in tools] if flat else tools
        self._functions = tuple(f for f in functions if choice in ("auto", "required", f.name))
        parts = tuple(constraints.json_schema(f.parameters, f.field, strict=f.strict) for f in self._functions)
        rules = _calls(
            self._format, self._functions, parts, tokenizer, parallel is not False and choice in ("auto", "required")
        )
        if choice != "auto":
            start = f"start: {_terms(self._format.opening, tokenizer)} calls"
        elif response is not None:
            if response.schema is None:
                raise RequestError(
                    f"{response.field}: an answer that may be a call cannot follow it too; leave out the tools, say "
                    'tool_choice="none", or ask for a JSON schema'
                )
            start = f"start: {_terms(self._format.opening, tokenizer)} calls | %json {response.schema}"
            parts = (response, *parts)
        else:
            start = _text_or_calls(self._format, tokenizer)
        self.constraints = (constraints.lark(f"{start}\n{rules}", "tools", parts),)

    def reader(self) -> CallReader:
        """A reader for one answer."""
        return CallReader(self._format, {function.name for function in self._functions}, self._tokenizer)


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function's declaration in the form of chat completions."""
    return {"type": tool["type"], "function": {name: value for name, value in tool.items() if name != "type"}}


def _functions(tools: Any, flat: bool) -> tuple[Function, ...]:
    """The functions that a request's `tools` declare. Raises RequestError."""
    if tools is None:
        return ()
    if not isinstance(tools, list) or len(tools) > MAX_FUNCTIONS:
        raise RequestError(f"tools must be a list of at most {MAX_FUNCTIONS} tools")
    functions: list[Function] = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise RequestError(f"{where}.type must be 'function'; other tools are not supported")
        function = tool if flat else tool.get("function")
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}.function must be an object with a name")
        where = where if flat else f"{where}.function"
        name, description = function.get("name"), function.get("description")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(f"{where}.name must be 1 to 64 letters, digits, _ or -, not {name!r:.80}")
        if any(name == other.name for other in functions):
            raise RequestError(f"{where}.name: {name!r} is declared twice")
        if description is not None and not isinstance(description, str):
            raise RequestError(f"{where}.description must be text")
        parameters = function.get("parameters")
        parameters = {"type": "object", "properties": {}} if parameters is None else parameters
        place = f"{where}.parameters"
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise RequestError(f"{place} must be a JSON schema of type 'object'")
        functions.append(Function(name, {**parameters, "type": "object"}, place, function.get("strict") is True))
    return tuple(functions)


def _choice(choice: Any, functions: Sequence[Function], flat: bool) -> str:
    """`none`, `auto`, `required`, or the name of the one function to call. Raises RequestError."""
    if choice is None:
        return "auto" if functions else "none"
    if choice in ("none", "auto", "required"):
        if choice == "required" and not functions:
            raise RequestError("tool_choice is 'required', but there are no tools")
        return str(choice) if functions else "none"
    function = choice if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if function is not None and not flat:
        function = function.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        named = "'name': …" if flat else "'function': {'name': …}"
        raise RequestError(f"tool_choice must be 'none', 'auto', 'required' or {{'type': 'function', {named}}}")
    if all(name != function.name for function in functions):
        where = "tool_choice.name" if flat else "tool_choice.function.name"
        raise RequestError(f"{where}: {name!r:.80} is not one of the tools")
    return name


def _calls(
    format: CallFormat,
    functions: Sequence[Function],
    schemas: Sequence[Constraint],
    tokenizer: Tokenizer,
    several: bool,
) -> str:
    """Lark rules: `calls` is the text after the opening, one call or `several`, to the end of the last."""
    rules = [
        f"call_{i}: {json.dumps(function.name)} {_terms(format.middle, tokenizer)} %json {schema.schema}"
        for i, (function, schema) in enumerate(zip(functions, schemas, strict=True))
    ]
    more = f"({_terms(format.joint, tokenizer)} call)*" if several and format.joint is not None else ""
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    rules.append(f"calls: call {more} {_terms(format.closing, tokenizer)}")
    return "\n".join(rules)


def _text_or_calls(format: CallFormat, tokenizer: Tokenizer) -> str:
    """Lark rules: an answer is text, but after the marker of a call, calls follow."""
    marker = format.marker
    if not marker:  # a call is an answer that begins as one, with any white space
        opening = r"\s*".join(map(_quoted, re.findall(r"\w+|[^\w\s]", format.opening)))
        rules = f"start: text | head calls\nhead[lazy]: /\\s*{opening}/"
    else:
        rest = _terms(format.opening.lstrip()[len(marker) :], tokenizer)
        if next(tokenizer.split(marker))[1] is not None:
            rules = f"start: text | text? {_terms(marker, tokenizer)} {rest} calls"
        else:
            rules = f"start: text | head {rest} calls\nhead[lazy]: /(?s:.*){_quoted(marker)}/"
    return f"{rules}\ntext: /(?s:.*)/"


def _terms(text: str, tokenizer: Tokenizer) -> str:
    """Control tokens, literal text, and ids in it, as Lark terms."""
    return " ".join(_term(part, token) for part, token in tokenizer.split(text))


def _term(text: str, token: int | None) -> str:
    """A control token, or literal text with ids in it, as Lark terms."""
    if token is not None:
        return f"<[{token}]>"
    letters = f"/[a-zA-Z0-9]{{{ID_LENGTH}}}/"
    return f" {letters} ".join(json.dumps(part, ensure_ascii=False) if part else "" for part in text.split(ID))


def _quoted(text: str) -> str:
    """`text` as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer's text."""

    text: str

    def delta(self) -> dict[str, Any]:
        return {"content": self.text}


@dataclass(frozen=True, slots=True)
class CallStart:
    """The call number `index` begins."""

    index: int
    id: str
    name: str

    def delta(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": ""}
        return {"tool_calls": [{"index": self.index, "id": self.id, "type": "function", "function": function}]}


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str

    def delta(self) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.index, "function": {"arguments": self.text}}]}


Piece = Text | CallStart | CallArguments


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class _Json:
    """Finds the end of a JSON object that comes in pieces."""

    depth: int = 0
    in_text: bool = False
    escaped: bool = False

    def end(self, text: str) -> int | None:
        """How much of `text` belongs to the object, if it ends there."""
        for i, letter in enumerate(text):
            if self.in_text:
                self.in_text = self.escaped or letter != '"'
                self.escaped = letter == "\\" and not self.escaped
            elif letter == '"':
                self.in_text = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return i + 1
        return None


_MORE = -1


def _match(pattern: str, text: str, at: int) -> int | None:
    """Where `pattern` ends that begins at `text[at]`, white space aside; _MORE if the text ends before; else None."""
    for letter in pattern:
        while at < len(text) and text[at].isspace():
            at += 1
        start = at
        while letter == ID and at < len(text) and text[at].isalnum():
            at += 1
        if at == len(text):
            return _MORE
        if letter == ID:
            if at == start:
                return None
        elif text[at] != letter:
            return None
        else:
            at += 1
    return at


class CallReader:
    """The events of one answer → pieces of text and calls.

    White space between the parts of a call may differ from the model's format. A possible beginning of a call is held
    back until it is certain. If it is not a call, or not of a declared function, it becomes text.
    """

    def __init__(self, format: CallFormat | None, names: set[str], tokenizer: Tokenizer) -> None:
        self._names = names
        self._calls: list[_Call] = []
        self._content = ""
        self._held = ""  # text that is not read yet
        self._lead = ""  # text before a name, until the call is certain
        self._json = _Json()
        self._marks: dict[int, str] = {}
        self._state: Literal["text", "name", "arguments", "after", "plain"] = "plain"
        if format is not None:
            self._state = "text"
            self._once = not format.marker  # only a whole answer is a call
            self._opening, self._middle, self._closing = (
                self._squeezed(text, tokenizer) for text in (format.opening, format.middle, format.closing)
            )
            self._joint = None if format.joint is None else self._squeezed(format.joint, tokenizer)

    def _squeezed(self, text: str, tokenizer: Tokenizer) -> str:
        """`text` without white space; control tokens become lone surrogates, which no answer has."""
        parts = [
            part if token is None else self._marks.setdefault(token, chr(0xD800 + len(self._marks)))
            for part, token in tokenizer.split(text)
        ]
        return "".join("".join(parts).split())

    def push(self, event: Event) -> list[Piece]:
        """The pieces that one event makes certain; the last one, all."""
        self._held += ("" if event.token is None else self._marks.get(event.token, "")) + event.text
        pieces: list[Piece] = []
        while self._held and getattr(self, f"_read_{self._state}")(pieces):
            pass
        if event.finish is not None:
            self._end(pieces)
        return pieces

    def message(self) -> dict[str, Any]:
        """The assistant's message so far, without its role: `content`, None if only calls, and `tool_calls` if any."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self._calls
        ]
        content = self._content if self._content or not calls else None
        return {"content": content} | ({"tool_calls": calls} if calls else {})

    def finish_reason(self, finish: str) -> str:
        """OpenAI's: `tool_calls` instead of `stop` where the answer has calls."""
        return "tool_calls" if finish == "stop" and self._calls else finish

    # Each of these reads from the held text, and returns whether there may be more to read.

    def _read_plain(self, pieces: list[Piece]) -> bool:
        self._add_text(self._held, pieces)
        self._held = ""
        return False

    def _read_text(self, pieces: list[Piece]) -> bool:
        starts = range(1 if self._once else len(self._held))
        at, end = next(
            ((i, end) for i in starts if (end := _match(self._opening, self._held, i)) is not None), (None, None)
        )
        if at is None or end is None:
            if self._once:
                self._state = "plain"
                return True
            return self._read_plain(pieces)
        self._add_text(self._held[:at], pieces)
        self._held = self._held[at:]
        if end == _MORE:
            return False
        self._begin(end - at)
        return True

    def _read_name(self, pieces: list[Piece]) -> bool:
        name = _LETTERS.match(self._held)[0]  # type: ignore[index]  # it matches nothing too
        end: int | None = None
        if len(name) == len(self._held) and any(known.startswith(name) for known in self._names):
            return False
        if name in self._names:
            end = _match(self._middle, self._held, len(name))
        if end is not None and end != _MORE:
            end = _match("{", self._held, end)
        if end is None:  # not a call after all
            self._add_text(self._lead, pieces)
            self._state = "plain" if self._once else "text"
            return True
        if end == _MORE:
            return False
        call = _Call(f"call_{secrets.token_hex(12)}", name)
        pieces.append(CallStart(len(self._calls), call.id, name))
        self._calls.append(call)
        self._held = self._held[end - 1 :]
        self._json = _Json()
        self._state = "arguments"
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        end = self._json.end(self._held)
        text, self._held = self._held[:end], "" if end is None else self._held[end:]
        self._calls[-1].arguments += text
        pieces.append(CallArguments(len(self._calls) - 1, text))
        if end is not None:
            self._state = "after"
        return True

    def _read_after(self, pieces: list[Piece]) -> bool:
        joint = None if self._joint is None else _match(self._joint, self._held, 0)
        closing = _match(self._closing, self._held, 0)
        if joint is not None and joint != _MORE:
            self._begin(joint)
        elif closing is not None and closing != _MORE:
            self._held = self._held[closing:]
            self._state = "plain" if self._once else "text"
        elif _MORE in (joint, closing):
            return False
        else:
            self._state = "plain" if self._once else "text"
        return True

    def _begin(self, end: int) -> None:
        self._lead, self._held = self._held[:end], self._held[end:]
        self._state = "name"

    def _end(self, pieces: list[Piece]) -> None:
        """Return the held text that does not belong to a call."""
        if self._state in ("text", "name"):
            self._add_text((self._lead if self._state == "name" else "") + self._held, pieces)
        self._held = ""

    def _add_text(self, text: str, pieces: list[Piece]) -> None:
        text = _MARKS.sub("", text)
        if text and not (self._calls and text.isspace()):
            self._content += text
            pieces.append(Text(text))
