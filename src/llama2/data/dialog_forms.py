"""Records → dialogs: the forms in which people publish them, each read by a rule that has a name.

A form says where questions and answers are. Beside them any record may have `system`, `history` and `tools`. What no
rule uses is reported by name, so that it is clear what was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama2.data.dialog_files import parse
from llama2.errors import DialogError
from llama2.text.dialog import Dialog

#: Forms that are one question and its answer: fields of the question, of what may belong to it, and of the answer.
_PAIRS = {
    "prompt and completion": ("prompt", None, "completion"),
    "Alpaca": ("instruction", "input", "output"),
    "Dolly": ("instruction", "context", "response"),
    "question and answer": ("question", "context", "answer"),
    "prompt and response": ("prompt", None, "response"),
    "query and response": ("query", None, "response"),
    "input and output": ("input", None, "output"),
}
_FORMS = (
    "messages, or prompt and completion, or conversations, or instruction, input and output, or instruction, context "
    "and response, or question and answer, or text with [INST] or ChatML in it"
)

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_EDGES = re.compile(r"<s>|</s>|<\|endoftext\|>|<\|begin_of_text\|>|\s")
_RULES = re.compile(r"<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TrainingDialog:
    """A dialog that ends with the assistant, the tools declared in it, and which of its answers have a loss."""

    dialog: Dialog
    tools: tuple[Mapping[str, Any], ...] = ()
    with_loss: tuple[bool, ...] = ()  # by answer; none: all


@dataclass
class Fields:
    """What a record has, and which of it was used."""

    values: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)  # of messages

    def take(self, name: str) -> Any:
        """A field's value, None without it; from now on it counts as used."""
        self.used.add(name)
        return self.values.get(name)

    def structure(self, name: str) -> Any:
        """A field that is a list or an object, perhaps as JSON text, as tables have it."""
        value = self.take(name)
        return parse(value.encode()) if isinstance(value, str) and value.strip() else value

    def left(self) -> list[str]:
        """Names of what was not used."""
        return [name for name in self.values if name not in self.used] + self.unused


class _Turn(NamedTuple):
    """A message in OpenAI's form, and whether it has a loss if it is an answer."""

    message: dict[str, Any]
    with_loss: bool = True


def understand(record: Any) -> tuple[str, TrainingDialog, list[str]]:
    """The name of a record's form, its dialog, and the names of fields that say nothing here. Raises DialogError."""
    if not isinstance(record, Mapping):
        raise DialogError(f"a record has {_FORMS}")
    fields = Fields({name: value for name, value in record.items() if value is not None})
    name, turns = _form(fields)
    history = _history(fields)
    start = 1 if turns and turns[0].message.get("role") == "system" else 0
    turns[start:start] = history
    for key in ("system", "system_prompt"):
        rules = fields.take(key)
        if isinstance(rules, str) and rules.strip():
            if turns and turns[0].message.get("role") == "system":
                if turns[0].message["content"] != rules:
                    raise DialogError(f"has {key} beside another system message; leave one out")
            else:
                turns.insert(0, _Turn({"role": "system", "content": rules}))
        elif rules is not None and not isinstance(rules, str):
            raise DialogError(f"{key} must be text")
    tools = _tools(fields)
    dialog = Dialog(turn.message for turn in turns)
    if dialog.messages[-1].role != "assistant":
        raise DialogError("the dialog ends without an answer of the assistant; add one")
    with_loss = tuple(turn.with_loss for turn in turns if turn.message["role"] == "assistant")
    if not any(with_loss):
        raise DialogError("no answer has a loss: each has weight 0; leave the record out")
    return name, TrainingDialog(dialog, tools, () if all(with_loss) else with_loss), fields.left()


def _form(fields: Fields) -> tuple[str, list[_Turn]]:
    has = fields.values
    for key in ("messages", "conversations", "conversation"):
        if isinstance(has.get(key), (list, str)) and isinstance(messages := fields.structure(key), list):
            theirs = key != "messages" or any(isinstance(m, Mapping) and "from" in m for m in messages)
            return "ShareGPT" if theirs else "OpenAI's messages", _turns(messages, key, fields)
    if isinstance(has.get("prompt"), list) and isinstance(has.get("completion"), list):
        prompt = _turns(fields.take("prompt"), "prompt", fields)
        completion = _turns(fields.take("completion"), "completion", fields, len(prompt))
        return "TRL's conversational prompt and completion", [
            *(t._replace(with_loss=False) for t in prompt),
            *completion,
        ]
    for name, (question, more, answer) in _PAIRS.items():
        context = has.get(more, "") if more else ""
        if isinstance(has.get(question), str) and isinstance(has.get(answer), str) and isinstance(context, str):
            text, reply = fields.take(question), fields.take(answer)
            if more:
                fields.used.add(more)
            return name, _pair(f"{text}\n\n{context}" if context.strip() else text, reply)
    if isinstance(text := has.get("text"), str):
        fields.used.add("text")
        if "[INST]" in text:
            return "[INST] in text", _inst(text)
        if "<|im_start|>" in text:
            return "ChatML in text", _chatml(text)
        raise DialogError(
            "text has neither [INST] nor <|im_start|> in it, so it does not say who speaks; write messages"
        )
    raise DialogError(f"a record has {_FORMS}")


def _pair(question: str, answer: str, *, with_loss: bool = True) -> list[_Turn]:
    return [_Turn({"role": "user", "content": question}), _Turn({"role": "assistant", "content": answer}, with_loss)]


def _turns(messages: Sequence[Any], key: str, fields: Fields, first: int = 0) -> list[_Turn]:
    return [_turn(f"message {i}", message, key, fields) for i, message in enumerate(messages, first)]


def _turn(where: str, message: Any, key: str, fields: Fields) -> _Turn:
    """A message of OpenAI's or ShareGPT's form. Raises DialogError."""
    if not isinstance(message, Mapping):
        raise DialogError(f"{where}: must be an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    said = given.pop("role", None) or given.pop("from", None)
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise DialogError(f"{where}: role {said!r} is unknown; roles are {', '.join(_ROLES)}")
    content = _content(where, given.pop("content", given.pop("value", "")))
    turn: dict[str, Any] = {"role": role, "content": content}
    weight = given.pop("weight", 1)
    if weight not in (0, 1):
        raise DialogError(f"{where}: weight must be 0 or 1")
    calls = given.pop("tool_calls", None) or given.pop("function_call", None)
    if said == "function_call" and isinstance(content, str):
        calls, turn["content"] = parse(content.encode()), ""
    if calls:
        turn["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if role == "tool":
        turn |= {name: given.pop(name) for name in ("tool_call_id", "name") if name in given}
    fields.unused += [f"{key}.{name}" for name in given]
    return _Turn(turn, bool(weight))


def _content(where: str, content: Any) -> Any:
    """A message's text, its parts joined. Raises DialogError for a part that is not text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DialogError(f"{where}: has a part of type {kind}, and only text is supported")
    return "".join(texts)


def _call(call: Any) -> Any:
    """A call in OpenAI's form, of that or of its inner object alone."""
    return {"type": "function", "function": call} if isinstance(call, Mapping) and "function" not in call else call


def _history(fields: Fields) -> list[_Turn]:
    """What was said before: pairs of question and answer, or messages. Raises DialogError."""
    history = fields.structure("history")
    if not history:
        return []
    if isinstance(history, list) and all(isinstance(each, Mapping) for each in history):
        return _turns(history, "history", fields)
    turns = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DialogError("history must be a list of pairs, question and answer, or of messages")
        turns += _pair(*pair)
    return turns


def _tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """Declarations of functions in OpenAI's form. Raises DialogError."""
    tools = fields.structure("tools") or fields.structure("functions") or []
    if not isinstance(tools, list):
        raise DialogError("tools must be a list of declarations in OpenAI's form")
    declared: list[Mapping[str, Any]] = [_call(tool) for tool in tools]
    for tool in declared:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DialogError("tools must be a list of declarations in OpenAI's form, each with a name")
    return tuple(declared)


def _inst(text: str) -> list[_Turn]:
    """Llama 2's and Mistral's written form. Raises DialogError."""
    before, *parts = text.split("[INST]")
    if _EDGES.sub("", before):
        raise DialogError("text has words before its first [INST]; write messages")
    turns: list[_Turn] = []
    for part in parts:
        question, *answers = part.split("[/INST]")
        if len(answers) != 1:
            raise DialogError("text has an [INST] without its one [/INST]; fix it")
        rules = _RULES.fullmatch(question.strip()) if not turns else None
        if rules:
            turns.append(_Turn({"role": "system", "content": rules[1].strip()}))
            question = rules[2]
        answer = answers[0].strip().removesuffix("<s>").strip().removesuffix("</s>").strip()
        turns += _pair(question.strip(), answer)
    return turns


def _chatml(text: str) -> list[_Turn]:
    """ChatML. Raises DialogError."""
    if rest := _EDGES.sub("", _CHATML.sub("", text)):
        raise DialogError(f"text has words outside of its messages: {rest[:40]!r}; write messages")
    return [
        _turn(f"message {i}", {"role": match[1], "content": match[2].strip()}, "text", Fields({}))
        for i, match in enumerate(_CHATML.finditer(text))
    ]
