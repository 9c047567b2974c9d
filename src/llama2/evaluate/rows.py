"""Files of public sets as rows, with the field names that the set has in public, so that anyone's prompts fit them.

A reader takes a set's files by name and returns rows by split. Each file is checked by its SHA-256 first.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.errors import EvaluationError
from llama2.evaluate.task import EvaluationTask

Row = dict[str, Any]
Splits = dict[str, list[Row]]

_LONGEST = 1 << 28  # bytes of a file


@dataclass(frozen=True, slots=True)
class SetFile:
    """A file of a set, as it is on disk."""

    path: Path
    data: bytes

    @property
    def text(self) -> str:
        """The content, decompressed by the name's end. Raises EvaluationError for what is not UTF-8."""
        opened = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(self.path.suffix, bytes)
        try:
            return opened(self.data).decode("utf-8-sig")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{self.path}: cannot be read ({error}); download it again") from None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Lines that are not empty, each with its place for messages."""
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.strip():
                yield f"{self.path}:{number}", line.removesuffix("\r")

    def objects(self, **fields: type | tuple[type, ...]) -> Iterator[tuple[str, Row]]:
        """JSON objects, one a line, each with its place. Raises EvaluationError as `checked` does."""
        for where, line in self.lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{where}: is not JSON ({error}); download the set again") from None
            yield where, checked(where, row, **fields)


def checked(where: str, row: Any, **fields: type | tuple[type, ...]) -> Row:
    """`row`, an object with these fields. Raises EvaluationError where one is missing or of another type."""
    if not isinstance(row, dict):
        raise EvaluationError(f"{where}: is not an object; download the set again")
    for name, kind in fields.items():
        if name not in row:
            raise EvaluationError(f"{where}: the field {name!r} is missing; compare it with the task's source")
        if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is int):
            raise EvaluationError(
                f"{where}: the field {name!r} has a value of another type; compare it with the source"
            )
    return row


def missing(task: EvaluationTask, data: Path) -> str | None:
    """Why a task's rows cannot be read from the data folder: its first file that is not there; None if all are."""
    gone = [name for name in task.files if not files.exists(data / name)]
    return f"{gone[0]} is not in the data folder" if gone else None


def read(task: EvaluationTask, data: Path) -> tuple[Splits, dict[str, str]]:
    """A task's rows by split, each with an `id`, and the SHA-256 of its files.

    Raises EvaluationError for a file that is missing or has another SHA-256, and for a row without a field.
    """
    if task.rows not in READERS:
        raise EvaluationError(f"{task.name}: rows: {task.rows} is not a reader; there are {', '.join(sorted(READERS))}")
    found: dict[str, SetFile] = {}
    digests: dict[str, str] = {}
    for name, expected in task.files.items():
        path = data / name
        content = files.read(path, limit=_LONGEST, error=EvaluationError)
        digests[name] = sha256(content).hexdigest()
        if expected and digests[name] != expected:
            raise EvaluationError(
                f"{path}: has SHA-256 {digests[name]} instead of {expected}; fetch it from {task.source}"
            )
        found[name] = SetFile(path, content)
    splits = READERS[task.rows](found)
    if not splits.get(task.split):
        raise EvaluationError(
            f"{task.name}: {', '.join(task.files)} has no rows of the split {task.split}; check the file"
        )
    for rows in splits.values():
        for number, row in enumerate(rows):
            row.setdefault("id", str(number))
    return splits, digests


def _gold(where: str, gold: int, count: int) -> int:
    if not 0 <= gold < count:
        raise EvaluationError(f"{where}: the answer {gold} is not one of {count} choices; download the set again")
    return gold


def _lettered(texts: list[str]) -> dict[str, list[str]]:
    return {"text": texts, "label": [chr(ord("A") + i) for i in range(len(texts))]}


def _choices(where: str, row: Row) -> list[str]:
    texts = row["choices"]
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise EvaluationError(f"{where}: the field 'choices' is not a list of texts; download the set again")
    return list(texts)


def _matched(where: str, pattern: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise EvaluationError(f"{where}: the query is not of the form that this set has; download the set again")
    return found


def arc(found: Mapping[str, SetFile]) -> Splits:
    """ARC: `question`, `choices` (text, label), `answerKey`."""
    rows = []
    for file in found.values():
        for where, row in file.objects(query=str, choices=list, gold=int):
            texts = _choices(where, row)
            question = _matched(where, "Question: (.*)", row["query"])[1]
            choices = _lettered(texts)
            answer = choices["label"][_gold(where, row["gold"], len(texts))]
            rows.append({"question": question, "choices": choices, "answerKey": answer})
    return {"test": rows}


READERS: dict[str, Callable[[Mapping[str, SetFile]], Splits]] = {reader.__name__: reader for reader in (arc,)}
