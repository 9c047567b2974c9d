"""Messages to (tokens, which of them the assistant said); the only place that knows `[INST]` (spec 2.3)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama2.errors import DialogError, TemplateError
from llama2.text import template as templates
from llama2.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

_FOLLOWING = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant", "user"),
}

#: Llama 2's role markers. They are ordinary text to its tokenizer, so no message may contain one.
SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

#: What Meta's reference answers to a dialog that contains one of SPECIAL_TAGS.
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function that an assistant's message makes; `id` is what the answer to it names.

    Arguments are text where the model wrote no JSON object, as it does when a limit cuts its answer.
    """

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog: who speaks (one of ROLES), and what.

    An assistant may call tools, and then need not say anything. A tool's message answers the first call without an
    answer that has its `tool_call_id` and calls the function `name`; None means any.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class Dialog:
    """Messages in an order that chat models know: at most one system message, first, then user and assistant in turn.

    After an assistant's message that calls tools come the tools' answers, one to each call. Takes each message as a
    Message or as a mapping of OpenAI's form. Raises DialogError that names the one that is out of order, empty, or of
    an unknown role. Unless `strict`, any order and empty texts are taken. Calls may then be without an answer,
    and their arguments need not be JSON. `turns.arrange` makes of these what a template can write.
    """

    def __init__(self, messages: Iterable[Message | Mapping[str, Any]], *, strict: bool = True) -> None:
        if isinstance(messages, (str, bytes, bytearray, Mapping)) or not isinstance(messages, Iterable):
            raise DialogError(f"a dialog is a list of messages with role and content, not {type(messages).__name__}")
        self.messages = tuple(_message(i, message, strict) for i, message in enumerate(messages))
        if not self.messages:
            raise DialogError("the dialog has no messages")
        if strict:
            self._check_order()
        self._answered = _answered(self.messages, strict)

    def _check_order(self) -> None:
        expected: tuple[str, ...] = ("system", "user")
        for i, message in enumerate(self.messages):
            if message.role not in expected:
                raise DialogError(f"message {i}: role {message.role} where {' or '.join(expected)} must come")
            expected = ("tool",) if message.tool_calls else _FOLLOWING[message.role]
        if self.messages[-1].role == "system":
            raise DialogError("message 0: a system message alone asks nothing; add a user message")

    @property
    def uses_tools(self) -> bool:
        """Whether an assistant's message calls tools."""
        return any(message.tool_calls for message in self.messages)

    def render(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        neutralise: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether the assistant said it, its end-of-turn token included.

        A dialog that ends with the assistant is whole, as in training. With `continue_final` the tokens end within its
        last message, which the model continues. Any other requests an answer. `template` is the checkpoint's
        Jinja source and `variables` what else it may use. A SentencePiece vocabulary without a template, or with
        Llama 2's, has Llama 2's own format. `tools` are declarations of functions in OpenAI's form, for templates that
        know tools; others refuse them, and messages that call or answer.

        A message that contains a role marker in ordinary text is refused by DialogError. With `neutralise` the marker
        is broken by a space: `[ INST]`. Raises TemplateError when the template fails or exceeds its limits.
        """
        if (tools or self.uses_tools) and not (template and templates.knows_tools(template)):
            raise DialogError(
                "this model's chat format knows no tools: ask without tools, or use a model that calls them"
            )
        if template is None and tokenizer.kind != "sentencepiece":
            raise DialogError("this model has no chat template: use `llama2 generate`, or choose one with --template")
        if template is None or (tokenizer.kind == "sentencepiece" and templates.is_llama2(template)):
            if variables:
                raise TemplateError(f"Llama 2's chat format has no template variable {next(iter(variables))!r}")
            pattern = _any_of(SPECIAL_TAGS)
            texts = [cleared(f"message {i}", m.content, pattern, neutralise) for i, m in enumerate(self.messages)]
            return _llama2(texts, self.messages[0].role == "system", tokenizer, continue_final)
        markers = templates.role_markers(template, tokenizer, system=self.messages[0].role == "system")
        for name, value in (variables or {}).items():
            if isinstance(value, str) and _any_of(markers).search(value):
                raise TemplateError(f"template variable {name!r} contains a role marker; remove it")
        pattern = _any_of(markers)
        write: Callable[..., dict[str, Any]] = dict
        if self.uses_tools:  # what knows of calls is imported where there are some: a start must be quick
            from llama2.text.calls import call_form

            write = call_form(template, tokenizer).message
        messages = self._for_template(lambda i, text: cleared(f"message {i}", text, pattern, neutralise), write)
        declared = tools and templates.each_text(tools, lambda text: cleared("tools", text, pattern, neutralise))
        return templates.render(template, messages, tokenizer, variables or {}, declared or None, continue_final)

    def _for_template(
        self, clear: Callable[[int, str], str], write: Callable[..., dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The messages as templates expect them, their texts as `clear` gives them for a message's number.

        `write` makes an assistant's message of its text and its calls. These are numbered through the dialog, in nine
        digits, as Mistral's templates demand it of an id.
        """
        messages: list[dict[str, Any]] = []
        count = 0
        calls: list[dict[str, Any]] = []  # of the latest message that has any
        for i, message in enumerate(self.messages):
            entry: dict[str, Any] = {"role": message.role, "content": clear(i, message.content)}
            if message.tool_calls:
                functions = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
                functions = templates.each_text(functions, partial(clear, i))
                calls = [{"id": f"{count + n:09d}", **function} for n, function in enumerate(functions)]
                count += len(calls)
                entry = write(entry["content"], calls)
            elif message.role == "tool":
                call = calls[self._answered[i]]
                entry |= {"tool_call_id": call["id"], "name": call["name"]}
            messages.append(entry)
        return messages


def _answered(messages: Sequence[Message], strict: bool) -> dict[int, int]:
    """Which of the calls before it each tool's message answers, by the message's number.

    Raises DialogError for an answer to no call, and if `strict`, for a call without an answer.
    """
    answered: dict[int, int] = {}
    calls: Sequence[ToolCall] = ()
    open_calls: list[int] = []
    for i, message in enumerate(messages):
        if message.role == "tool":
            id, name = message.tool_call_id, message.name
            at = next((n for n in open_calls if id in (None, calls[n].id) and name in (None, calls[n].name)), None)
            if at is None:
                wanted = "" if id is None else f" with the id {id!r}"
                wanted += "" if name is None else f" of {name!r}"
                raise DialogError(f"message {i}: no call before it{wanted} is without an answer")
            open_calls.remove(at)
            answered[i] = at
        elif open_calls and strict:
            call = calls[open_calls[0]]
            raise DialogError(f"message {i}: the call of {call.name!r} before it has no answer; add a tool's message")
        calls = message.tool_calls or calls
        open_calls = [*range(len(calls))] if message.tool_calls else open_calls
    if strict and messages[-1].role == "tool" and open_calls:
        call = calls[open_calls[0]]
        raise DialogError(f"message {len(messages) - 1}: the call of {call.name!r} has no answer; add a tool's message")
    return answered


def cleared(where: str, text: str, pattern: re.Pattern[str], neutralise: bool) -> str:
    """`text` without role markers in ordinary text: refused by DialogError, or broken by a space after one letter."""
    while match := pattern.search(text):
        if not neutralise:
            raise DialogError(
                f"{where} contains {match[0]!r}, which marks roles in this model's chat format; "
                "remove it, or have it neutralised"
            )
        text = pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
    return text


def default_system_prompt() -> str:
    """The system prompt that Llama 2's first release put before every dialog, later only an example (spec 2.3)."""
    return Path(__file__).with_name("default_system_prompt.txt").read_text(encoding="utf-8")


def _message(index: int, message: Message | Mapping[str, Any], strict: bool) -> Message:
    if not isinstance(message, Message):
        message = _from_mapping(index, message, strict)
    if message.role not in ROLES:
        raise DialogError(f"message {index}: role {message.role!r} is unknown; roles are {', '.join(ROLES)}")
    if not isinstance(message.content, str):
        raise DialogError(f"message {index}: content must be text, not {type(message.content).__name__}")
    if message.tool_calls and message.role != "assistant":
        raise DialogError(f"message {index}: only the assistant calls tools, not {message.role}")
    if (message.tool_call_id, message.name) != (None, None) and message.role != "tool":
        raise DialogError(f"message {index}: only a tool answers a call, not {message.role}")
    if strict and not message.content.strip() and not message.tool_calls and message.role != "tool":
        raise DialogError(f"message {index}: content is empty")
    return message


def _from_mapping(index: int, message: Mapping[str, Any], strict: bool) -> Message:
    """The message of a mapping in OpenAI's form, with the fields that its role has."""
    more = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}
    if not isinstance(message, Mapping) or not {"role"} <= set(message):
        raise DialogError(f"message {index}: a message has a role and a content, and nothing else")
    role = message["role"]
    allowed = {"role", "content"} | more.get(role if isinstance(role, str) else "", set())
    calls = message.get("tool_calls") or ()
    if not set(message) <= allowed or not ("content" in message or calls):
        raise DialogError(f"message {index}: a message has a role and a content, and nothing else")
    if not isinstance(calls, (list, tuple)):
        raise DialogError(f"message {index}: tool_calls must be a list")
    content: Any = message.get("content")
    return Message(
        role,
        "" if content is None and calls else content,
        tuple(_call(f"message {index}: tool_calls[{n}]", call, strict) for n, call in enumerate(calls)),
        message.get("tool_call_id"),
        message.get("name"),
    )


def _call(where: str, call: Any, strict: bool) -> ToolCall:
    """A call in OpenAI's form, its arguments an object or the JSON text of one; or any text, unless `strict`.

    Raises DialogError.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DialogError(f"{where} must be {{'id', 'type': 'function', 'function': {{'name', 'arguments'}}}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        text = arguments
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not strict and not isinstance(arguments, Mapping):
            return ToolCall(function["name"], text, call.get("id"))
    if not isinstance(arguments, Mapping):
        raise DialogError(f"{where}.function.arguments must be a JSON object")
    return ToolCall(function["name"], arguments, call.get("id"))


def _any_of(markers: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")


def _llama2(texts: list[str], system: bool, tokenizer: Tokenizer, continue_final: bool) -> tuple[list[int], list[bool]]:
    """Llama 2's format: BOS before each question, EOS after each answer, and each such pair encoded by itself.

    With `continue_final`, the last answer is as it was given up to here, and has no EOS.
    """
    if system:
        rules, user, *rest = texts
        texts = [f"<<SYS>>\n{rules}\n<</SYS>>\n\n{user}", *rest]
    ids: list[int] = []
    mask: list[bool] = []
    for turn in range(0, len(texts), 2):
        question, *answer = texts[turn : turn + 2]
        asked = f"[INST] {question.strip()} [/INST]"
        open_end = continue_final and turn + 2 >= len(texts)
        text = asked + "".join(f" {said.lstrip()}" if open_end else f" {said.strip()} " for said in answer)
        new, ends = tokenizer.encode_with_ends(text)
        begin, end = tokenizer.encode("", bos=True), tokenizer.encode("", eos=bool(answer) and not open_end)
        ids += begin + new + end
        mask += [False, *templates.said(ends, [(len(asked), len(text))]), *[True for _ in end]]
    return ids, mask
