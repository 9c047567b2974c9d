"""Conversations as clients send them, arranged for a template that may know less.

What a template can write is left as it is. Where it cannot, neighbours of one role are joined, and where it knows no
tools, declarations, calls and their answers become text (docs/decisions/0018-take-what-has-one-meaning.md). Each such
change is a note for the caller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from llama2.errors import TemplateError
from llama2.text import template as templates
from llama2.text.dialog import Dialog, Message, cleared
from llama2.text.tokenizer import Tokenizer

#: Between texts that are joined.
_JOINT = "\n\n"

_ROLES = {"s": "system", "u": "user", "a": "assistant", "c": "assistant"}


class Arranged(NamedTuple):
    """A dialog that its template can write, the tools that the template is given, and what was changed."""

    dialog: Dialog
    tools: Sequence[Mapping[str, Any]] | None
    notes: tuple[str, ...] = ()


def arrange(
    dialog: Dialog,
    template: str | None,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    neutralise: bool = False,
) -> Arranged:
    """What the template can write of a dialog in any order. One that is in order, without tools, is not changed.

    Raises DialogError where a text spells a mark by which calls are written, unless it is to be neutralised.
    """
    notes: list[str] = []
    messages = _join_leading(dialog.messages)
    uses_tools = bool(tools) or any(message.tool_calls or message.role == "tool" for message in messages)
    if uses_tools and not _knows_calls(template, tokenizer):
        messages = _tools_as_text(messages, tokenizer, tools, neutralise)
        notes.append("the chat template knows no tools: they are written as text")
        tools = None
    elif (open_calls := _open_calls(messages)) and not _writes_open_calls(template or "", tokenizer):
        messages = _calls_as_words(messages, open_calls)
        notes.append("calls without an answer are written as text")

    def can_write(order: str) -> bool:
        return _writes(template, tokenizer, order)

    if any(message.role == "system" for message in messages[1:]):
        order = "suasu" if messages[0].role == "system" else "uasu"
        if not can_write(order):
            messages = _system_first(messages)
            notes.append("system messages are joined to the first")
    start = 1 if messages[0].role == "system" else 0
    answers = dialog.messages[-1].role != "assistant"
    if (answers and messages[-1].role == "assistant") or (start == len(messages) and not can_write("s")):
        messages = (*messages, Message("user", ""))
        notes.append("an empty user message is put at the end")
    if messages[start:] and messages[start].role == "assistant" and not can_write("sau" if start else "au"):
        messages = (*messages[:start], Message("user", ""), *messages[start:])
        notes.append("an empty user message is put before the assistant's first")
    for role, order in (("user", "uauu"), ("assistant", "uaau")):
        if _repeats(messages, role) and not can_write(order):
            messages = _joined(messages, role)
            notes.append(f"neighbouring {role} messages are joined")
    if messages[0].role == "system" and len(messages) > 1 and not can_write("su"):
        messages = _system_to_user(messages)
        notes.append("the system message is joined to the first user message")
    last = messages[-1]
    if len(messages) > 1 and last.role == "assistant" and not (last.content or last.tool_calls):
        messages = messages[:-1]  # to continue nothing is to answer
    arranged = dialog if messages is dialog.messages else Dialog(messages, strict=False)
    return Arranged(arranged, tools, tuple(notes))


def _knows_calls(template: str | None, tokenizer: Tokenizer) -> bool:
    from llama2.text.calls import native_format  # what knows of calls is imported where there are some

    return native_format(template, tokenizer) is not None


def _join(first: Message, *others: Message) -> Message:
    texts = [message.content for message in (first, *others) if message.content]
    calls = tuple(call for message in (first, *others) for call in message.tool_calls)
    return replace(first, content=_JOINT.join(texts), tool_calls=calls)


def _join_leading(messages: Sequence[Message]) -> tuple[Message, ...]:
    """System messages that open a conversation are one."""
    count = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    return (_join(*messages[:count]), *messages[count:]) if count > 1 else tuple(messages)


def _system_first(messages: Sequence[Message]) -> tuple[Message, ...]:
    systems = [message for message in messages if message.role == "system"]
    return (_join(*systems), *(message for message in messages if message.role != "system"))


def _system_to_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    system, first, *rest = messages
    if first.role != "user":
        return (Message("user", system.content), first, *rest)
    return (_join(Message("user", system.content), first), *rest)


def _repeats(messages: Sequence[Message], role: str) -> bool:
    return any(a.role == b.role == role for a, b in pairwise(messages))


def _joined(messages: Sequence[Message], role: str) -> tuple[Message, ...]:
    joined: list[Message] = []
    for message in messages:
        if joined and message.role == joined[-1].role == role and not joined[-1].tool_calls:
            joined[-1] = _join(joined[-1], message)
        else:
            joined.append(message)
    return tuple(joined)


def _open_calls(messages: Sequence[Message]) -> set[int]:
    """Numbers of messages with calls that lack an answer when the conversation continues, and of their answers."""
    found: set[int] = set()
    for i, message in enumerate(messages):
        if message.tool_calls:
            after = next((n for n in range(i + 1, len(messages)) if messages[n].role != "tool"), len(messages))
            if after < len(messages) and after - i - 1 < len(message.tool_calls):
                later = next((n for n in range(after, len(messages)) if messages[n].tool_calls), len(messages))
                found |= {i, *(n for n in range(i + 1, later) if messages[n].role == "tool")}
    return found


def _calls_as_words(messages: Sequence[Message], which: set[int]) -> tuple[Message, ...]:
    written = [*messages]
    for i in which:
        message = messages[i]
        calls = [f"{call.name}({_arguments(call.arguments)})" for call in message.tool_calls]
        text = "\n".join(filter(None, (message.content, *calls)))
        written[i] = Message("user" if message.role == "tool" else "assistant", text)
    return tuple(written)


def _tools_as_text(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None, neutralise: bool
) -> tuple[Message, ...]:
    """Tools declared in the system message, calls in the assistant's, and their answers in the user's."""
    from llama2.text.calls import generic_format

    format = generic_format(tokenizer)
    call_end = format.closing.split()[-1]
    begin, end = (mark.replace("call", "response") for mark in (format.marker, call_end))
    markers = re.compile("|".join(map(re.escape, (format.marker, call_end, begin, end))))
    written: list[Message] = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            calls = (format.joint or "").join(
                f"{call.name}{format.middle}{_arguments(call.arguments)}" for call in message.tool_calls
            )
            text = f"{format.opening}{calls}{format.closing}" if calls else ""
            written.append(Message("assistant", "\n".join(filter(None, (message.content, text)))))
        else:
            text = cleared(f"message {i}", message.content, markers, neutralise)
            answer = Message("user", f"{begin}\n{text}\n{end}")
            written.append(answer if message.role == "tool" else replace(message, content=text))
    if tools:
        declared = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        introduction = (
            "You can call these functions, one JSON object a line:\n"
            f"{cleared('tools', declared, markers, neutralise)}\n"
            "To call one, answer with its name and its arguments:\n"
            f"{format.opening}NAME{format.middle}{{...}}{format.closing}\n"
            f"Its result comes back between {begin} and {end}. Call a function only where it helps."
        )
        first, *rest = written
        rules = Message("system", introduction)
        written = [_join(first, rules), *rest] if first.role == "system" else [rules, *written]
    return tuple(written)


def _arguments(arguments: Mapping[str, Any] | str) -> str:
    return json.dumps(arguments, ensure_ascii=False)


@lru_cache(maxsize=256)
def _writes(template: str | None, tokenizer: Tokenizer, order: str) -> bool:
    """Whether the template writes messages in this order, a letter for each role, and neighbours of one role apart."""
    if template is None or (templates.is_llama2(template) and tokenizer.kind == "sentencepiece"):
        return re.fullmatch("s?u(au)*a?", order) is not None
    messages = [{"role": _ROLES[letter], "content": f"({i}{letter})"} for i, letter in enumerate(order)]
    return _all_written(template, messages, tokenizer)


@lru_cache(maxsize=16)
def _writes_open_calls(template: str, tokenizer: Tokenizer) -> bool:
    from llama2.text.calls import call_form

    call = {"id": "0" * 9, "name": "probe", "arguments": {"probed": "(1c)"}}
    messages = [{"role": "user", "content": "(0u)"}, call_form(template, tokenizer).message("", [call])]
    try:
        text = templates.text(template, [*messages, {"role": "user", "content": "(2u)"}], tokenizer, [])
    except TemplateError:
        return False
    places = [text.find(part) for part in ("(0u)", "(1c)", "(2u)")]
    return -1 not in places and places == sorted(places)


def _all_written(template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> bool:
    try:
        text = templates.text(template, messages, tokenizer)
    except TemplateError:
        return False
    contents = [str(message["content"]) for message in messages]
    places = [text.find(content) for content in contents]
    if -1 in places or places != sorted(places):
        return False
    ends = [place + len(content) for place, content in zip(places, contents, strict=True)]
    return all(
        text[end:start].strip() or a["role"] != b["role"]
        for (a, b), end, start in zip(pairwise(messages), ends, places[1:], strict=False)
    )
