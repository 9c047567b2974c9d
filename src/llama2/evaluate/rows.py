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
from llama2.evaluate import metrics
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

    def elements(self, *names: str, **fields: type | tuple[type, ...]) -> Iterator[tuple[str, Row]]:
        """Objects of the list under `names` in the one JSON value of the file. Raises EvaluationError as `objects`."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{self.path}: is not JSON ({error}); download the set again") from None
        for name in names:
            found = checked(str(self.path), found, **{name: list})[name]
        if not isinstance(found, list):
            raise EvaluationError(f"{self.path}: is not a list; compare it with the task's source")
        for number, row in enumerate(found):
            where = f"{self.path}: {'.'.join(names)}[{number}]"
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


def gsm8k(found: Mapping[str, SetFile]) -> Splits:
    """GSM8K: `question`, `answer`, which ends in `#### ` and a number; a file's name is its split."""
    splits: Splits = {}
    for file in found.values():
        for where, row in file.objects(question=str, answer=str):
            _matched(where, r".*#### -?[0-9,.]*[0-9]\s*", row["answer"])
            splits.setdefault(file.path.stem, []).append(row)
    return splits


def svamp(found: Mapping[str, SetFile]) -> Splits:
    """SVAMP: `ID`, `Body`, `Question`, `Answer` as text, `Type`. Whole numbers have no decimals."""
    rows = []
    for file in found.values():
        for _, row in file.elements(ID=str, Body=str, Question=str, Answer=(int, float), Type=str):
            rows.append(row | {"Answer": f"{row['Answer']:.15g}"})
    return {"test": rows}


def nq_open(found: Mapping[str, SetFile]) -> Splits:
    """Natural Questions, open: `question`, `answer` (a list of aliases)."""
    rows = []
    for file in found.values():
        for where, row in file.objects(question=str, answer=list):
            rows.append(row | {"answer": _texts(where, "answer", row["answer"])})
    return {"validation": rows}


def triviaqa(found: Mapping[str, SetFile]) -> Splits:
    """TriviaQA in its own form: `question`, `question_id`, `answer` (value, aliases)."""
    rows = []
    for file in found.values():
        for where, row in file.elements("Data", Question=str, QuestionId=str, Answer=dict):
            answer = checked(f"{where}: Answer", row["Answer"], Value=str, Aliases=list)
            gold = {"value": answer["Value"], "aliases": _texts(where, "Aliases", answer["Aliases"])}
            rows.append({"question": row["Question"], "question_id": row["QuestionId"], "answer": gold})
    return {"validation": rows}


def squad(found: Mapping[str, SetFile]) -> Splits:
    """SQuAD 2.0: `title`, `context`, `question`, `answers` (text: a list, empty where there is none)."""
    rows = []
    for file in found.values():
        for title, context, where, row in _paragraphs(file):
            texts = [checked(where, each, text=str)["text"] for each in row["answers"]]
            rows.append({"title": title, "context": context, "question": row["question"], "answers": {"text": texts}})
    return {"validation": rows}


def quac(found: Mapping[str, SetFile]) -> Splits:
    """QuAC: `title`, `context`, `history` (the questions before with their answers), `question`, `answers` (texts).

    Questions on which people agree too little are left out, as the authors do: F1 below 0.4 (Choi et al. 2018, 4).
    """
    rows: list[Row] = []
    for file in found.values():
        before: tuple[str, list[str]] = ("", [])
        for title, context, where, row in _paragraphs(file):
            texts = [checked(where, each, text=str)["text"] for each in row["answers"]]
            original = checked(where, checked(where, row, orig_answer=dict)["orig_answer"], text=str)["text"]
            history = before[1] if before[0] == context else []
            before = (context, [*history, f"Q: {row['question']}\nA: {original}\n\n"])
            if metrics.human_f1(texts) >= 0.4:
                passage = context.removesuffix(metrics.CANNOT_ANSWER).rstrip()
                asked = {"title": title, "context": passage, "history": "".join(history), "question": row["question"]}
                rows.append(asked | {"answers": {"texts": texts}})
    return {"validation": rows}


def _paragraphs(file: SetFile) -> Iterator[tuple[str, str, str, Row]]:
    """Title, context, place and question of the form that SQuAD and QuAC have."""
    for where, article in file.elements("data", paragraphs=list):
        for i, paragraph in enumerate(article["paragraphs"]):
            place = f"{where}: paragraphs[{i}]"
            context = checked(place, paragraph, context=str, qas=list)["context"]
            for k, row in enumerate(paragraph["qas"]):
                at = f"{place}: qas[{k}]"
                yield str(article.get("title", "")), context, at, checked(at, row, question=str, answers=list)


def mathematics(found: Mapping[str, SetFile]) -> Splits:
    """MATH: `problem`, `level`, `type`, `solution` with its answer boxed; a file's name is its split."""
    splits: Splits = {}
    for file in found.values():
        for where, row in file.objects(problem=str, level=str, type=str, solution=str):
            if metrics.boxed(row["solution"]) is None:
                raise EvaluationError(f"{where}: the solution has no boxed answer; compare it with the source")
            splits.setdefault(file.path.stem, []).append(row)
    return splits


#: How a reasoned answer of BIG-Bench Hard begins.
_STEPS = "Let's think step by step."


def bbh(found: Mapping[str, SetFile]) -> Splits:
    """BIG-Bench Hard: `task`, `description`, `input`, `target`; in the split `dev`, three each with their `reasoning`.

    These come from the set's own prompts, whose first lines are a canary.
    """
    splits: Splits = {"dev": [], "test": []}
    descriptions: dict[str, str] = {}
    for file in (each for each in found.values() if each.path.suffix == ".txt"):
        task = file.path.stem
        _, _, prompt = file.text.partition("-----\n")
        descriptions[task], *shots = prompt.split("\n\nQ: ")
        for shot in shots:
            text = rf"(?P<input>.*)\nA: {_STEPS}(?P<reasoning>\s.*the answer is (?P<target>.*)\.)"
            found_parts = _matched(f"{file.path}: {task}", text, shot.rstrip())
            splits["dev"].append({"task": task, "description": descriptions[task], **found_parts.groupdict()})
    for file in (each for each in found.values() if each.path.suffix == ".json"):
        for where, row in file.elements("examples", input=str, target=str):
            if (task := file.path.stem) not in descriptions:
                raise EvaluationError(
                    f"{where}: the prompt of {task} is not among the files; name it in the task's file"
                )
            splits["test"].append({"task": task, "description": descriptions[task], **row})
    return splits


def humaneval(found: Mapping[str, SetFile]) -> Splits:
    """HumanEval: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`."""
    fields: dict[str, type] = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)
    return {"test": [row for file in found.values() for _, row in file.objects(**fields)]}


def mbpp(found: Mapping[str, SetFile]) -> Splits:
    """MBPP: `task_id`, `text`, `code`, `test_list` (three), `test_setup_code`; lines end in a newline alone.

    The rows 11 to 510 are the split `test`. The rows 1 to 10 are `prompt`: first 2, 3 and 4, with which Austin et al.
    2021 ask, then the others.
    """
    splits: Splits = {"prompt": [], "test": []}
    for file in found.values():
        for where, row in file.objects(task_id=int, text=str, code=str, test_list=list, test_setup_code=str):
            if len(_texts(where, "test_list", row["test_list"])) != 3:
                raise EvaluationError(f"{where}: the field 'test_list' does not have three tests; check the file")
            row["code"] = row["code"].replace("\r\n", "\n")
            if row["task_id"] <= 510:
                splits["prompt" if row["task_id"] <= 10 else "test"].append(row)
    splits["prompt"].sort(key=lambda row: (row["task_id"] not in (2, 3, 4), row["task_id"]))
    return splits


def ifeval(found: Mapping[str, SetFile]) -> Splits:
    """IFEval: `key`, `prompt`, `instruction_id_list`, `kwargs` (an object for each instruction)."""
    rows = []
    for file in found.values():
        for where, row in file.objects(key=int, prompt=str, instruction_id_list=list, kwargs=list):
            if len(row["kwargs"]) != len(row["instruction_id_list"]):
                raise EvaluationError(f"{where}: kwargs and instruction_id_list have unequal lengths; check the file")
            rows.append(row)
    return {"train": rows}


def _texts(where: str, name: str, values: list[Any]) -> list[str]:
    """A list of texts that is not empty."""
    if not values or not all(isinstance(value, str) for value in values):
        raise EvaluationError(f"{where}: the field {name!r} is not a list of texts; download the set again")
    return values


_ANSWERED = (gsm8k, svamp, nq_open, triviaqa, squad, quac, mathematics, bbh, humaneval, mbpp, ifeval)
READERS: dict[str, Callable[[Mapping[str, SetFile]], Splits]] = {
    reader.__name__: reader for reader in (arc, *_ANSWERED)
}
