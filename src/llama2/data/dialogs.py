"""Dialogs as rows for supervised fine-tuning: whole ones, several in a row, with loss on what the assistant says.

The paper fills rows with prompts and answers, one after another, and has no loss on prompts (3.1). Which of a dialog's
tokens are the assistant's is text/dialog.py's to say. A row is filled with the longest dialog that still fits, so that
little of it stays empty, and none is cut: what does not fit a row is refused, or left out and counted.

N tokens of all dialogs  T tokens of a row  B rows of a batch
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from llama2.data.loader import IGNORED, Batch, shuffled
from llama2.errors import DataError, DialogError
from llama2.recipe import Settings
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import Tokenizer

#: Forms of a record that holds one question and its answer: names of the question, of what may belong to it, and of the
#: answer. OpenAI's and TRL's, Alpaca's, Dolly's.
_PAIRS = (("prompt", None, "completion"), ("instruction", "input", "output"), ("instruction", "context", "response"))
_FORMS = "messages, or prompt and completion, or instruction, input and output, or instruction, context and response"


#: A file's name that stands for Python's own library, whose docstrings answer questions about it.
STDLIB = "stdlib"

#: Folders of it that have no documentation.
_UNDOCUMENTED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}


class DialogSettings(Settings):
    """Which dialogs, and how they become rows."""

    files: list[Path] = Field(min_length=1, description="JSONL files; stdlib: questions about Python's own library")
    length: int = Field(4096, ge=2, description="tokens of a row")
    boundaries: bool = Field(True, description="tokens read no other dialog than their own")
    answers: Literal["all", "last"] = Field("all", description="answers of a dialog that are learnt")
    too_long: Literal["refuse", "leave out"] = Field("refuse", description="what becomes of dialogs longer than a row")
    neutralise: bool = Field(False, description="break role markers that messages contain instead of refusing them")
    validation: int = Field(0, ge=0, description="dialogs that are evaluated and not learnt")


@dataclass(frozen=True, slots=True)
class Example:
    """A dialog's token ids, and which of them are learnt."""

    tokens: NDArray[np.int32]  # (n,)
    learnt: NDArray[np.bool_]  # (n,)


def read(files: Sequence[Path]) -> Iterator[tuple[str, Dialog]]:
    """Dialogs of JSONL files, each with its place, `FILE:LINE`. Lines of white space are none.

    The file STDLIB is `documentation` of Python's own library. A record has `messages` in OpenAI's form, or is a
    question with its answer; other fields say nothing here. Raises DataError for a file that cannot be read, and a
    record that is no dialog which ends with the assistant's answer.
    """
    for path in files:
        if str(path) == STDLIB:
            yield from documentation(Path(sysconfig.get_path("stdlib")))
            continue
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{path}:{number}"
                        yield where, _dialog(where, line)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give JSONL files of dialogs") from None


def _dialog(where: str, line: bytes) -> Dialog:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8, at byte {error.start} of the line; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error}); write one object a line") from None
    try:
        dialog = Dialog(_messages(record))
    except DialogError as error:
        raise DataError(f"{where}: {error}; mend or remove the line") from None
    if dialog.messages[-1].role != "assistant":
        raise DataError(f"{where}: the dialog ends without an answer of the assistant; add one, or remove the line")
    return dialog


def _messages(record: Any) -> list[Any]:
    if isinstance(record, dict):
        if isinstance(messages := record.get("messages"), list):
            return messages
        for question, more, answer in _PAIRS:
            asked, context, told = record.get(question), record.get(more, "") if more else "", record.get(answer)
            if isinstance(asked, str) and isinstance(context, str) and isinstance(told, str):
                content = f"{asked}\n\n{context}" if context.strip() else asked
                return [{"role": "user", "content": content}, {"role": "assistant", "content": told}]
    raise DialogError(f"a record has {_FORMS}")


def documentation(folder: Path) -> Iterator[tuple[str, Dialog]]:
    """Questions about what the Python modules in a folder define, answered by the first paragraph of its docstring.

    Names that begin with an underscore are left out, and so are files that this Python cannot read.
    """
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if _UNDOCUMENTED.intersection(parts) or any(part.startswith("_") for part in parts if part != "__init__"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _documented(str(path), tree, module, "What is the module {} for?")


def _documented(
    path: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, question: str
) -> Iterator[tuple[str, Dialog]]:
    answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if answer:
        told = {"user": question.format(name), "assistant": answer}
        where = f"{path}:{getattr(node, 'lineno', 1)}"
        yield where, Dialog({"role": role, "content": content} for role, content in told.items())
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_":
                asked = "What is {}?" if isinstance(inner, ast.ClassDef) else "What does {} do?"
                yield from _documented(path, inner, f"{name}.{inner.name}", asked)


def render(
    dialog: Dialog,
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    answers: Literal["all", "last"] = "all",
    neutralise: bool = False,
) -> Example:
    """A dialog's tokens, of which all answers are learnt, or the last one alone (paper 3.3).

    Raises as Dialog.render does.
    """
    ids, said = dialog.render(tokenizer, template, neutralise=neutralise)
    learnt = np.array(said, np.bool_)
    if not learnt.any():
        raise DialogError("the model's chat template shows no answer of the assistant; use another template")
    if answers == "last":
        asked = np.flatnonzero(~learnt[: np.flatnonzero(learnt)[-1]])  # before the last answer's end
        learnt[: asked[-1]] = False
    return Example(np.array(ids, np.int32), learnt)


class Packed:
    """Dialogs in rows, a loader's Source. With `boundaries`, tokens read their own dialog alone.

    What is left of a row holds token 0, and has no loss.
    """

    def __init__(self, name: str, examples: Sequence[Example], *, length: int, boundaries: bool = True) -> None:
        self.name, self.length = name, length
        self.dialogs = len(examples)
        self._boundaries = boundaries
        sizes = np.array([len(example.tokens) for example in examples], np.int64)
        if self.dialogs == 0:
            raise DataError(f"{name}: no dialogs are there to learn from; give more, or longer rows")
        if sizes.max() > length:
            raise DataError(f"{name}: a dialog has {sizes.max()} tokens and a row {length}; choose longer rows")
        self._tokens = np.concatenate([example.tokens for example in examples])  # (N,)
        self._learnt = np.concatenate([example.learnt for example in examples])  # (N,)
        self._ends = np.cumsum(sizes)  # of each dialog in them
        self._starts = self._ends - sizes
        self._rows = pack(sizes.tolist(), length)

    @cached_property
    def sha256(self) -> str:
        """Of every token, whether it is learnt, and where it stands."""
        digest = hashlib.sha256(f"{self.length} {self._boundaries} {self._rows}".encode())
        for array in (self._tokens, self._learnt):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def learnt(self) -> int:
        """Tokens that have a loss."""
        return int(self._learnt.sum())

    @property
    def filled(self) -> float:
        """Share of the rows' tokens that are of dialogs."""
        return len(self._tokens) / (len(self._rows) * self.length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Rows by number: (B, T)."""
        shape = len(numbers), self.length
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        documents = np.empty(shape, np.int32)
        for row, number in enumerate(numbers):
            at = 0
            documents[row] = len(self._rows[number])  # what is left over
            for count, dialog in enumerate(self._rows[number]):
                start, end = self._starts[dialog], self._ends[dialog]
                size = int(end - start)
                tokens[row, at : at + size] = self._tokens[start:end]
                following, learnt = self._tokens[start + 1 : end], self._learnt[start + 1 : end]
                targets[row, at : at + size - 1] = np.where(learnt, following, IGNORED)
                documents[row, at : at + size] = count
                at += size
        return Batch(tokens, targets, documents if self._boundaries else None)


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which of the sizes share a row of `length`: each, from the largest on, goes where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in a row, and which row, in order
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        place = bisect.bisect_left(room, (sizes[number], -1))
        left, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(room, (left - sizes[number], row))
    return rows


@dataclass(frozen=True, slots=True)
class Prepared:
    """Dialogs that are ready to be learnt from, and of the same files those that are only evaluated."""

    train: Packed
    validation: Packed | None
    left_out: int  # dialogs longer than a row


def prepare(asked: DialogSettings, tokenizer: Tokenizer, template: str | None = None, *, seed: int = 0) -> Prepared:
    """Read, render and pack dialogs; the seed chooses those that are not learnt.

    Raises DataError for one that a row does not hold, unless they are to be left out, and when none is left.
    """
    name = ", ".join(map(str, asked.files))
    examples = []
    left_out = 0
    for where, dialog in read(asked.files):
        try:
            example = render(dialog, tokenizer, template, answers=asked.answers, neutralise=asked.neutralise)
        except DialogError as error:
            raise DataError(f"{where}: {error}") from None
        if len(example.tokens) <= asked.length:
            examples.append(example)
        elif asked.too_long == "leave out":
            left_out += 1
        else:
            raise DataError(
                f"{where}: the dialog has {len(example.tokens)} tokens and a row {asked.length}; choose longer rows, "
                "or have such dialogs left out"
            )
    if len(examples) <= asked.validation:
        raise DataError(f"{name}: has {len(examples)} dialogs, of which {asked.validation} are not learnt; give more")
    held = {shuffled(place, len(examples), key=seed) for place in range(asked.validation)}

    def packed(wanted: bool) -> Packed:
        some = [example for place, example in enumerate(examples) if (place in held) == wanted]
        return Packed(name, some, length=asked.length, boundaries=asked.boundaries)

    return Prepared(packed(False), packed(True) if held else None, left_out)
