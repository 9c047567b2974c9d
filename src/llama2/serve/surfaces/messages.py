"""A message of a request → a message as `Dialog` reads it."""

from __future__ import annotations

from typing import Any

from llama2.serve.errors import Refusal, unsupported
from llama2.serve.surfaces.wire import ChatMessage


def to_message(where: str, message: ChatMessage, content: str = "content") -> dict[str, Any]:
    """A message with one text as its content. Raises Refusal for parts that are not text.

    `where` is the message's place in the request, and `content` the name of that field there.
    """
    role = "system" if message.role == "developer" else message.role
    if role == "function":
        raise unsupported(f"{where}.role", f"{role!r} is not supported, 'tool' is")
    converted: dict[str, Any] = {"role": role, "content": _text(f"{where}.{content}", message)}
    if message.tool_calls:
        converted["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        converted["tool_call_id"] = message.tool_call_id
    return converted


def _text(field: str, message: ChatMessage) -> str:
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise Refusal(400, f"{field}: is missing", param=field)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for at, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise unsupported(f"{field}.{at}", f"{part.type[:40]!r} is not supported, only text is")
        texts.append(part.text)
    return "\n".join(texts)
