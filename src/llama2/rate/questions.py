"""What is rated: prompts with answers of models, whose names and order a rater does not know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from llama2 import files
from llama2.data.comparisons import order
from llama2.errors import DataError

Kind = Literal["comparison", "preference", "safety"]
KINDS: tuple[Kind, ...] = ("comparison", "preference", "safety")
_LONGEST = 1 << 24  # bytes of a line


@dataclass(frozen=True, slots=True)
class Question:
    """Answers to one prompt, by model: two that are compared, or one whose safety is rated.

    `id` is a digest of prompt, models and answers, so ratings of one edition of a file never count for another.
    """

    id: str
    prompt: tuple[Mapping[str, str], ...]  # messages of role and content, the last of the user
    answers: Mapping[str, str]
    category: str = ""

    def shown(self, rater: str, seed: int) -> list[str]:
        """The models in the order in which this rater sees their answers."""
        return sorted(self.answers, key=lambda model: order(seed, f"{self.id} {rater} {model}"))


def read(path: Path, kind: Kind) -> list[Question]:
    """The questions of a file of JSON lines: `prompt` (text or messages), `answers` (model: text), perhaps `category`.

    Of more than two answers, each pair is compared. Raises DataError for a line that is not such a record.
    """
    found: dict[str, Question] = {}
    with files.open_file(path, error=DataError) as file:
        for number, line in enumerate(files.lines(file, _LONGEST), 1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line or b"")
            except (ValueError, RecursionError):
                raise DataError(f"{where}: is not JSON of at most {_LONGEST >> 20} MB; correct the line") from None
            for question in _questions(where, record, kind):
                found.setdefault(question.id, question)
    if not found:
        raise DataError(f"{path}: holds no question; a line has prompt and answers")
    return list(found.values())


def _questions(where: str, record: Any, kind: Kind) -> list[Question]:
    answers = record.get("answers") if isinstance(record, dict) else None
    if not isinstance(answers, dict) or not all(isinstance(text, str) and text.strip() for text in answers.values()):
        raise DataError(f"{where}: answers must be an object of model and text, none of them empty")
    prompt = _messages(where, record.get("prompt"))
    size = 1 if kind == "safety" else 2
    if len(answers) < size:
        raise DataError(f"{where}: has {len(answers)} answers, and {kind} needs {size}")
    category = record.get("category", "")
    if not isinstance(category, str):
        raise DataError(f"{where}: category must be a text")
    return [_question(prompt, {name: answers[name] for name in some}, category) for some in combinations(answers, size)]


def _messages(where: str, prompt: Any) -> tuple[Mapping[str, str], ...]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: prompt must be a text, or messages of role and content")
    for each in messages:
        known = isinstance(each, dict) and each.get("role") in ("system", "user", "assistant")
        if not known or not isinstance(each.get("content"), str):
            raise DataError(f"{where}: a message has a role (system, user or assistant) and a text as content")
    if messages[-1]["role"] != "user":
        raise DataError(f"{where}: the prompt does not end with the user")
    return tuple({"role": each["role"], "content": each["content"]} for each in messages)


def _question(prompt: Sequence[Mapping[str, str]], answers: Mapping[str, str], category: str) -> Question:
    digest = hashlib.sha256(json.dumps([list(prompt), sorted(answers.items())]).encode()).hexdigest()
    return Question(digest[:24], tuple(prompt), dict(answers), category)
