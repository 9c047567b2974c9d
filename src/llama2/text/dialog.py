"""Messages to (tokens, which of them the assistant said); the only place that knows `[INST]` (spec 2.3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import DialogError, TemplateError
from llama2.text import template as templates
from llama2.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

#: Llama 2's role markers. They are ordinary text to its tokenizer, so no message may contain one.
SPECIAL_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

#: What Meta's reference answers to a dialog that contains one of SPECIAL_TAGS.
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog: who speaks (one of ROLES), and what."""

    role: str
    content: str


class Dialog:
    """Messages in an order that chat models know: at most one system message, first, then user and assistant in turn.

    Takes each message as a Message or as a mapping with `role` and `content`. Raises DialogError that names the one
    that is out of order, empty, or of an unknown role.
    """

    def __init__(self, messages: Iterable[Message | Mapping[str, Any]]) -> None:
        self.messages = tuple(_message(i, message) for i, message in enumerate(messages))
        if not self.messages:
            raise DialogError("the dialog has no messages")
        expected: tuple[str, ...] = ("system", "user")
        for i, message in enumerate(self.messages):
            if message.role not in expected:
                raise DialogError(f"message {i}: role {message.role} where {' or '.join(expected)} must come")
            expected = ("assistant",) if message.role == "user" else ("user",)
        if self.messages[-1].role == "system":
            raise DialogError("message 0: a system message alone asks nothing; add a user message")

    def render(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        neutralise: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether the assistant said it, its end-of-turn token included.

        A dialog that ends with the user asks for an answer; one that ends with the assistant is whole, as in training.
        `template` is the checkpoint's Jinja source and `variables` what else it may use. A SentencePiece vocabulary
        without a template, or with Llama 2's, has Llama 2's own format.

        A message that contains a role marker written in ordinary text is refused by DialogError, or with `neutralise`
        the marker is broken by a space: `[ INST]`. Raises TemplateError when the template fails or exceeds its limits.
        """
        if template is None and tokenizer.kind != "sentencepiece":
            raise DialogError("this model has no chat template: use `llama2 generate`, or pass a template")
        if template is None or (tokenizer.kind == "sentencepiece" and templates.known(template) == "Llama 2"):
            if variables:
                raise TemplateError(f"Llama 2's chat format has no template variable {next(iter(variables))!r}")
            return _llama2(self._without(SPECIAL_TAGS, neutralise), tokenizer)
        markers = templates.role_markers(template, tokenizer, system=self.messages[0].role == "system")
        for name, value in (variables or {}).items():
            if isinstance(value, str) and _any_of(markers).search(value):
                raise TemplateError(f"template variable {name!r} contains a role marker; remove it")
        messages = [{"role": m.role, "content": m.content} for m in self._without(markers, neutralise)]
        return templates.render(template, messages, tokenizer, variables or {})

    def _without(self, markers: Iterable[str], neutralise: bool) -> list[Message]:
        """The messages without role markers in ordinary text: refused, or broken by a space after the first letter."""
        pattern = _any_of(markers)
        messages = []
        for i, message in enumerate(self.messages):
            content = message.content
            while match := pattern.search(content):
                if not neutralise:
                    raise DialogError(
                        f"message {i} contains {match[0]!r}, which marks roles in this model's chat format; "
                        "remove it, or have it neutralised"
                    )
                content = pattern.sub(lambda m: f"{m[0][0]} {m[0][1:]}", content)
            messages.append(Message(message.role, content))
        return messages


def default_system_prompt() -> str:
    """The system prompt that Llama 2's first release put before every dialog, later only an example (spec 2.3)."""
    return Path(__file__).with_name("default_system_prompt.txt").read_text(encoding="utf-8")


def _message(index: int, message: Message | Mapping[str, Any]) -> Message:
    if not isinstance(message, Message):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise DialogError(f"message {index}: a message has a role and a content, and nothing else")
        message = Message(message["role"], message["content"])
    if message.role not in ROLES:
        raise DialogError(f"message {index}: role {message.role!r} is unknown; roles are {', '.join(ROLES)}")
    if not isinstance(message.content, str):
        raise DialogError(f"message {index}: content must be text, not {type(message.content).__name__}")
    if not message.content.strip():
        raise DialogError(f"message {index}: content is empty")
    return message


def _any_of(markers: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")


def _llama2(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Llama 2's format: BOS before each question, EOS after each answer, and each such pair encoded by itself."""
    texts = [message.content for message in messages]
    if messages[0].role == "system":
        system, user, *rest = texts
        texts = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}", *rest]
    ids: list[int] = []
    mask: list[bool] = []
    for turn in range(0, len(texts), 2):
        question, *answer = texts[turn : turn + 2]
        asked = f"[INST] {question.strip()} [/INST]"
        text = asked + "".join(f" {said.strip()} " for said in answer)
        new = tokenizer.encode(text, bos=True, eos=bool(answer))
        ids += new
        mask += [False, *templates.said(new[1 : len(new) - len(answer)], text, [(len(asked), len(text))], tokenizer)]
        mask += [True for _ in answer]
    return ids, mask
