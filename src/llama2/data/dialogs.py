"""Dialogs as rows for supervised fine-tuning: whole ones, several in a row, with loss on what the assistant says.

The paper fills rows with prompts and answers, one after another, and has no loss on prompts (3.1). The assistant's
tokens are those that text/dialog.py names. A row is filled with the longest dialog that still fits, so that little of
it remains empty, and none is cut. What does not fit a row is refused, or left out and counted.

N tokens of all dialogs  T tokens of a row  B rows of a batch
"""

from __future__ import annotations

import ast
import bisect
import hashlib
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from llama2 import files
from llama2.data import dialog_files
from llama2.data.dialog_forms import TrainingDialog, understand
from llama2.data.loader import IGNORED, TokenBatch, shuffled
from llama2.errors import DataError, DialogError, TemplateError, TokenizerError
from llama2.recipe import Settings
from llama2.text import turns
from llama2.text.dialog import Dialog
from llama2.text.tokenizer import Tokenizer

#: A file's name that means Python's own library, whose docstrings answer questions about it.
STDLIB = "stdlib"

#: Folders of it that have no documentation.
_UNDOCUMENTED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
_NAMED = 8  # fields without a use that are named


class DialogSettings(Settings):
    """Which dialogs, and how they become rows. What is fitted to the data unless it is given says so."""

    files: list[Path] = Field(min_length=1, description="files or folders; stdlib: questions on Python's own library")
    length: int = Field(4096, ge=2, description="tokens of a row; unless given, what the longest dialog needs")
    boundaries: bool = Field(True, description="tokens read no other dialog than their own")
    answers: Literal["all", "last"] = Field("all", description="answers of a dialog that have a loss")
    too_long: Literal["refuse", "leave out"] = Field("refuse", description="what becomes of dialogs longer than a row")
    skip_bad: bool = Field(
        False, description="leave out and count what is not a dialog, or too long, instead of refusing"
    )
    neutralise: bool = Field(False, description="break role markers that messages contain instead of refusing them")
    validation: int = Field(0, ge=0, description="dialogs that are held out to be evaluated; unless given, a tenth")


@dataclass(frozen=True, slots=True)
class Example:
    """A dialog's token ids, and which of them have a loss."""

    tokens: NDArray[np.int32]  # (n,)
    loss_mask: NDArray[np.bool_]  # (n,)


@dataclass
class ReadReport:
    """What was found in files of dialogs."""

    forms: Counter[str] = field(default_factory=Counter)  # dialogs by the rule that read them
    unused: dict[str, None] = field(default_factory=dict)  # names of fields, in order
    notes: dict[str, None] = field(default_factory=dict)  # what the chat template made of some
    bad: int = 0
    first_bad: str = ""

    def lines(self) -> list[str]:
        """The report for a person, line by line."""
        lines = [", ".join(f"{count:,} dialogs read as {form}" for form, count in self.forms.most_common())]
        if self.unused:
            names = [*self.unused]
            more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"not used: {', '.join(map(files.quote, names[:_NAMED]))}{more}")
        lines += self.notes
        if self.bad:
            lines.append(f"{self.bad:,} left out; the first: {self.first_bad}")
        return lines


def read(
    paths: Sequence[Path], report: ReadReport | None = None, *, skip_bad: bool = False
) -> Iterator[tuple[str, TrainingDialog]]:
    """Dialogs of files and folders, each with its place, `FILE:LINE`.

    The file STDLIB is `documentation` of Python's own library. `report` notes by which rules records were read, and
    what of them was not used. Raises DataError for a file that cannot be read, and a record that is not a dialog which
    ends with the assistant's answer. With `skip_bad`, `report` counts such records.
    """
    report = report or ReadReport()
    for path in paths:
        if str(path) == STDLIB:
            for where, question in documentation(Path(sysconfig.get_path("stdlib"))):
                report.forms["docstrings"] += 1
                yield where, TrainingDialog(question)
            continue
        for file in dialog_files.find([path]):
            for where, raw in dialog_files.records(file):
                try:
                    record = dialog_files.value(raw)
                    form, dialog, unused = understand(record)
                except DialogError as error:
                    _bad(where, error, report, skip_bad)
                    continue
                report.forms[form] += 1
                report.unused |= dict.fromkeys(unused)
                yield where, dialog


def _bad(where: str, error: Exception, report: ReadReport, skip: bool) -> None:
    """Count what cannot be trained on, or raise DataError that says so."""
    reason = f"{where}: {error}"
    if not skip:
        raise DataError(f"{reason}; --skip-bad leaves such out") from None
    report.bad += 1
    report.first_bad = report.first_bad or reason


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
        turns = {"user": question.format(name), "assistant": answer}
        where = f"{path}:{getattr(node, 'lineno', 1)}"
        yield where, Dialog({"role": role, "content": content} for role, content in turns.items())
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_":
                settings = "What is {}?" if isinstance(inner, ast.ClassDef) else "What does {} do?"
                yield from _documented(path, inner, f"{name}.{inner.name}", settings)


def render(
    dialog: TrainingDialog,
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    answers: Literal["all", "last"] = "all",
    neutralise: bool = False,
    notes: dict[str, None] | None = None,
) -> Example:
    """A dialog's tokens, with a loss on those answers that are to have one, or on the last one alone (paper 3.3).

    What the template cannot write is written as the engine does it for a request (`text.turns`), which `notes` hold.
    Raises as Dialog.render does.
    """
    arranged = turns.arrange(dialog.dialog, template, tokenizer, dialog.tools or None, neutralise=neutralise)
    if notes is not None:
        notes |= dict.fromkeys(arranged.notes)
    ids, said = arranged.dialog.render(tokenizer, template, neutralise=neutralise, tools=arranged.tools)
    loss_mask = np.array(said, np.bool_)
    edges = np.flatnonzero(np.diff(loss_mask, prepend=False, append=False))
    spans = list(zip(edges[::2], edges[1::2], strict=True))  # of answers
    if not spans:
        raise DialogError("the model's chat template shows no answer of the assistant; use another template")
    wanted = dialog.with_loss or (True,) * len(spans)
    if len(wanted) != len(spans):
        raise DialogError("the model's chat template does not keep answers apart, so they cannot have weights")
    for number, (start, end) in enumerate(spans, 1):
        if not wanted[number - 1] or (answers == "last" and number < len(spans)):
            loss_mask[start:end] = False
    if not loss_mask.any():
        raise DialogError("the last answer has weight 0, and no other has a loss")
    return Example(np.array(ids, np.int32), loss_mask)


class Packed:
    """Dialogs in rows, a loader's RowSource. With `boundaries`, tokens read their own dialog alone.

    What is left of a row holds token 0, and has no loss.
    """

    def __init__(self, name: str, examples: Sequence[Example], *, length: int, boundaries: bool = True) -> None:
        self.name, self.length = name, length
        self.dialogs = len(examples)
        self._boundaries = boundaries
        sizes = np.array([len(example.tokens) for example in examples], np.int64)
        if self.dialogs == 0:
            raise DataError(f"{name}: no dialogs are there to train on; give more, or longer rows")
        if sizes.max() > length:
            raise DataError(f"{name}: a dialog has {sizes.max()} tokens and a row {length}; choose longer rows")
        self._tokens = np.concatenate([example.tokens for example in examples])  # (N,)
        self._loss_mask = np.concatenate([example.loss_mask for example in examples])  # (N,)
        self._ends = np.cumsum(sizes)  # of each dialog in them
        self._starts = self._ends - sizes
        self._rows = pack(sizes.tolist(), length)

    @cached_property
    def sha256(self) -> str:
        """Of every token, its place, and whether it has a loss."""
        digest = hashlib.sha256(f"{self.length} {self._boundaries} {self._rows}".encode())
        for array in (self._tokens, self._loss_mask):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def loss_tokens(self) -> int:
        """Tokens that have a loss."""
        return int(self._loss_mask.sum())

    @property
    def filled(self) -> float:
        """Share of the rows' tokens that are of dialogs."""
        return len(self._tokens) / (len(self._rows) * self.length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int]) -> TokenBatch:
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
                following, mask = self._tokens[start + 1 : end], self._loss_mask[start + 1 : end]
                targets[row, at : at + size - 1] = np.where(mask, following, IGNORED)
                documents[row, at : at + size] = count
                at += size
        return TokenBatch(tokens, targets, documents if self._boundaries else None)


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
    """Dialogs to train on, and those that are only evaluated, by the file or folder given."""

    train: Packed
    validation: list[Packed]
    left_out: int  # dialogs longer than a row


@dataclass(frozen=True, slots=True)
class Rendered:
    """Every dialog of some files as tokens, with its place and the file or folder given, and what was found there."""

    examples: list[Example]
    places: list[str]
    sources: list[str]
    report: ReadReport


def render_all(
    settings: DialogSettings, tokenizer: Tokenizer, template: str | None, with_tools: str | None
) -> Rendered:
    """Read and render dialogs; those that declare tools by the template `with_tools`.

    Raises DataError for what is not a dialog, or one that the template cannot write, unless such are to be skipped.
    """
    rendered = Rendered([], [], [], ReadReport())
    report = rendered.report
    dialogs = ((path, *each) for path in settings.files for each in read([path], report, skip_bad=settings.skip_bad))
    for path, where, dialog in dialogs:
        chosen = with_tools if dialog.tools else template
        try:
            example = render(
                dialog, tokenizer, chosen, answers=settings.answers, neutralise=settings.neutralise, notes=report.notes
            )
        except (DialogError, TemplateError, TokenizerError) as error:
            _bad(where, error, report, settings.skip_bad)
            continue
        rendered.examples.append(example)
        rendered.places.append(where)
        rendered.sources.append(str(path))
    return rendered


def prepare(settings: DialogSettings, rendered: Rendered, *, seed: int = 0) -> Prepared:
    """Pack dialogs; the seed chooses those that are held out.

    Raises DataError for one that a row does not hold, unless they are to be left out, and when none is left.
    """
    name = ", ".join(map(str, settings.files))
    short = [len(example.tokens) <= settings.length for example in rendered.examples]
    examples, sources = [*compress(rendered.examples, short)], [*compress(rendered.sources, short)]
    left_out = len(rendered.examples) - len(examples)
    if left_out and settings.too_long == "refuse" and not settings.skip_bad:
        longer = (len(example.tokens) > settings.length for example in rendered.examples)
        where, example = next(compress(zip(rendered.places, rendered.examples, strict=True), longer))
        raise DataError(
            f"{where}: the dialog has {len(example.tokens)} tokens and a row {settings.length}; choose longer rows, "
            "or have such dialogs left out with --skip-bad"
        )
    if len(examples) <= settings.validation:
        raise DataError(
            f"{name}: has {len(examples)} dialogs, of which {settings.validation} are held out; give more, or a "
            "smaller data.validation"
        )
    held = {shuffled(place, len(examples), key=seed) for place in range(settings.validation)}
    packed = partial(Packed, length=settings.length, boundaries=settings.boundaries)
    train = [example for place, example in enumerate(examples) if place not in held]
    evaluated: dict[str, list[Example]] = {}
    for place in sorted(held):
        evaluated.setdefault(sources[place], []).append(examples[place])
    return Prepared(packed(name, train), [packed(source, some) for source, some in evaluated.items()], left_out)
