"""Files of public sets as rows, with the field names that the set has in public, so that anyone's prompts fit them.

A reader takes a set's files by name and returns rows by split. Each file is checked by its SHA-256 first.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from llama2 import files
from llama2.data.set_files import Row, SetFile, Splits, checked, text_list
from llama2.errors import EvaluationError
from llama2.evaluate import metrics, safety_rows
from llama2.evaluate.task import EvaluationTask

_LONGEST = 1 << 28  # bytes of a file


def missing(task: EvaluationTask, data: Path) -> str | None:
    """Why a task's rows cannot be read from the data folder: its first file that is not there; None if all are."""
    gone = [name for name in task.files if not files.exists(data / name)]
    return f"{gone[0]} is not in the data folder" if gone else None


def read(task: EvaluationTask, data: Path) -> tuple[Splits, dict[str, str]]:
    """A task's rows by split, and the SHA-256 of its files.

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


def openbookqa(found: Mapping[str, SetFile]) -> Splits:
    """OpenBookQA: `question_stem`, `choices` (text, label), `answerKey`."""
    rows = []
    for file in found.values():
        for where, row in file.objects(query=str, choices=list, gold=int):
            texts = _choices(where, row)
            choices = _lettered(texts)
            answer = choices["label"][_gold(where, row["gold"], len(texts))]
            rows.append({"question_stem": row["query"], "choices": choices, "answerKey": answer})
    return {"test": rows}


def commonsense_qa(found: Mapping[str, SetFile]) -> Splits:
    """CommonsenseQA: `question`, `choices` (text, label), `answerKey`; the file's queries list the choices."""
    rows = []
    for file in found.values():
        for where, row in file.objects(query=str, choices=list, gold=int):
            query = _matched(where, r"Question: (.*?)\nChoices:\n(.*)\nAnswer:", row["query"])
            texts = re.findall(r"^[A-Z]\. (.*)$", query[2], re.MULTILINE)
            if len(texts) != len(_choices(where, row)):
                raise EvaluationError(f"{where}: lists {len(texts)} choices of {len(row['choices'])}; check the file")
            choices = _lettered(texts)
            answer = choices["label"][_gold(where, row["gold"], len(texts))]
            rows.append({"question": query[1], "choices": choices, "answerKey": answer})
    return {"validation": rows}


def piqa(found: Mapping[str, SetFile]) -> Splits:
    """PIQA: `goal`, `sol1`, `sol2`, `label` (0 or 1); a second file has the labels."""
    questions, labels = _two(found)
    rows = []
    for (where, row), label in zip(questions.objects(goal=str, sol1=str, sol2=str), _labels(labels), strict=False):
        rows.append({**{name: row[name] for name in ("goal", "sol1", "sol2")}, "label": _gold(where, label, 2)})
    _same_length(questions, labels)
    return {"validation": rows}


def siqa(found: Mapping[str, SetFile]) -> Splits:
    """SIQA: `context`, `question`, `answerA` to `answerC`, `label` ("1" to "3"); a second file has the labels."""
    questions, labels = _two(found)
    names = ("context", "question", "answerA", "answerB", "answerC")
    rows = []
    for (where, row), label in zip(questions.objects(**dict.fromkeys(names, str)), _labels(labels), strict=False):
        rows.append({**{name: row[name] for name in names}, "label": str(_gold(where, label - 1, 3) + 1)})
    _same_length(questions, labels)
    return {"validation": rows}


def _two(found: Mapping[str, SetFile]) -> list[SetFile]:
    files = list(found.values())
    if len(files) != 2:
        raise EvaluationError("files: has to name two files, the questions' and the labels'; check the task's file")
    return files


def _labels(file: SetFile) -> Iterator[int]:
    for where, line in file.lines():
        if not line.strip().isdecimal():
            raise EvaluationError(f"{where}: is not a label; download the set again")
        yield int(line)


def _same_length(questions: SetFile, labels: SetFile) -> None:
    asked, labelled = (sum(1 for _ in file.lines()) for file in (questions, labels))
    if asked != labelled:
        raise EvaluationError(f"{labels.path}: has {labelled} labels for {asked} questions; download the set again")


def hellaswag(found: Mapping[str, SetFile]) -> Splits:
    """HellaSwag: `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label` ("0" to "3").

    The file has six lines an item: `activity: context`, label, four endings. A context that does not end a sentence has
    its last words in `ctx_b`, as ActivityNet's have.
    """
    rows = []
    for file in found.values():
        lines = file.text.removesuffix("\n").split("\n")
        if len(lines) % 6:
            raise EvaluationError(f"{file.path}: has {len(lines)} lines, and an item has 6; download the set again")
        for start in range(0, len(lines), 6):
            where = f"{file.path}:{start + 1}"
            context, label, *endings = lines[start : start + 6]
            if not label.isdecimal() or not all(endings):
                raise EvaluationError(f"{where}: is not an item of a label and four endings; download the set again")
            activity, text = _matched(where, r"(.+?): (.*)", context).groups()
            begun = re.fullmatch(r'(.*[.!?"]) ([^.!?"]+)', text, re.DOTALL)
            whole, rest = begun.groups() if begun else (text, "")
            gold = str(_gold(where, int(label), 4))
            rows.append({"activity_label": activity, "ctx_a": whole, "ctx_b": rest, "endings": endings, "label": gold})
    return {"validation": rows}


def winogrande(found: Mapping[str, SetFile]) -> Splits:
    """WinoGrande: `sentence` with `_`, `option1`, `option2`, `answer` ("1" or "2"); twins share `template`."""
    rows = []
    for file in found.values():
        for where, row in file.objects(context_options=list, continuation=str, gold=int):
            options = row["context_options"]
            if len(options) != 2 or not all(isinstance(option, str) for option in options):
                raise EvaluationError(f"{where}: 'context_options' is not two texts; download the set again")
            words = [option.split(" ") for option in options]
            shared = 0
            while shared < min(map(len, words)) - 1 and words[0][shared] == words[1][shared]:
                shared += 1
            before = " ".join([*words[0][:shared], ""])
            rows.append(
                {
                    "sentence": f"{before}_ {row['continuation']}",
                    "option1": options[0].removeprefix(before),
                    "option2": options[1].removeprefix(before),
                    "answer": str(_gold(where, row["gold"], 2) + 1),
                    "template": before,
                }
            )
    return {"validation": rows}


def boolq(found: Mapping[str, SetFile]) -> Splits:
    """BoolQ: `passage`, `question`, `label` (1 for yes)."""
    rows = []
    for file in found.values():
        for where, row in file.objects(query=str, choices=list, gold=int):
            query = _matched(where, r"Passage: (.*)\nQuestion: (.*?)\??(\nAnswer:)?", row["query"])
            if _choices(where, row) != ["no", "yes"]:
                raise EvaluationError(f"{where}: the choices are not no and yes; download the set again")
            rows.append({"passage": query[1], "question": query[2], "label": _gold(where, row["gold"], 2)})
    return {"validation": rows}


def copa(found: Mapping[str, SetFile]) -> Splits:
    """COPA: `premise`, `question` (cause or effect), `choice1`, `choice2`, `label` (0 or 1)."""
    rows = []
    for file in found.values():
        for where, row in file.objects(query=str, choices=list, gold=int):
            query = _matched(where, "(.*), (because|therefore)", row["query"])
            first, second = (text[0].upper() + text[1:] for text in _choices(where, row)[:2])
            question = {"because": "cause", "therefore": "effect"}[query[2]]
            rows.append(
                {
                    "premise": f"{query[1]}.",
                    "question": question,
                    "choice1": first,
                    "choice2": second,
                    "label": _gold(where, row["gold"], 2),
                }
            )
    return {"validation": rows}


def lambada(found: Mapping[str, SetFile]) -> Splits:
    """LAMBADA: `text`, whose last word is to be predicted."""
    rows = []
    for file in found.values():
        for where, row in file.objects(context=str, continuation=str):
            if not row["continuation"].strip() or " " in row["continuation"]:
                raise EvaluationError(f"{where}: the continuation is not one word; download the set again")
            rows.append({"text": f"{row['context']} {row['continuation']}"})
    return {"test": rows}


#: MMLU's subjects by the paper's four categories (Hendrycks et al. 2021, appendix B); the others are "other".
_MMLU = {
    "stem": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history "
        "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
        "professional_law world_religions"
    ),
    "social sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ),
}
MMLU_CATEGORIES = {subject: name for name, subjects in _MMLU.items() for subject in subjects.split()}


def mmlu(found: Mapping[str, SetFile]) -> Splits:
    """MMLU: `question`, `choices`, `answer` (0 to 3), `subject`, `category`; the folder of a file is its split."""
    splits: Splits = {}
    for file in found.values():
        split = file.path.parent.name
        subject = file.path.stem.removesuffix(f"_{split}")
        about = {"subject": subject, "category": MMLU_CATEGORIES.get(subject, "other")}
        # Fields hold newlines in quotes, so that an item may take several lines.
        table = csv.reader(io.StringIO(file.text, newline=""), strict=True)
        try:
            for fields in table:
                where = f"{file.path}:{table.line_num}"
                if len(fields) != 6 or fields[5] not in "ABCD" or len(fields[5]) != 1:
                    raise EvaluationError(f"{where}: is not a question, four choices and a letter; check the file")
                question, *choices, letter = fields
                answer = "ABCD".index(letter)
                splits.setdefault(split, []).append(
                    {"question": question, "choices": choices, "answer": answer, **about}
                )
        except csv.Error as error:
            raise EvaluationError(f"{file.path}:{table.line_num}: is not CSV ({error}); check the file") from None
    return splits


def agieval(found: Mapping[str, SetFile]) -> Splits:
    """AGIEval's multiple choice: `query`, `choices`, `gold` (a list of one index), and `passage` ("" for none)."""
    rows = []
    for file in found.values():
        for where, row in file.objects(question=str, options=list, label=str):
            options = row["options"]
            if not 2 <= len(options) <= 7 or not all(isinstance(option, str) for option in options):
                raise EvaluationError(f"{where}: 'options' is not two to seven texts; download the set again")
            letters = "ABCDEFG"[: len(options)]
            gold = _gold(where, letters.find(row["label"]) if len(row["label"]) == 1 else -1, len(options))
            passage = row.get("passage") or ""
            query = (
                f"{passage}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
                f"A: Among A through {letters[-1]}, the answer is"
            )
            rows.append(
                {"query": query, "choices": options, "gold": [gold], "passage": passage, "letters": list(letters)}
            )
    return {"test": rows}


def gsm8k(found: Mapping[str, SetFile]) -> Splits:
    """GSM8K: `question`, `answer`, which ends in `#### ` and a number; a file's name is its split."""
    splits: Splits = {}
    for file in found.values():
        for where, row in file.objects(question=str, answer=str):
            if re.search(r"#### -?[0-9,.]*[0-9]\s*$", row["answer"]) is None:
                raise EvaluationError(f"{where}: the answer does not end in #### and a number; download the set again")
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
            rows.append(row | {"answer": text_list(where, "answer", row["answer"])})
    return {"validation": rows}


def triviaqa(found: Mapping[str, SetFile]) -> Splits:
    """TriviaQA in its own form: `question`, `question_id`, `answer` (value, aliases)."""
    rows = []
    for file in found.values():
        for where, row in file.elements("Data", Question=str, QuestionId=str, Answer=dict):
            answer = checked(f"{where}: Answer", row["Answer"], Value=str, Aliases=list)
            gold = {"value": answer["Value"], "aliases": text_list(where, "Aliases", answer["Aliases"])}
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
            if len(text_list(where, "test_list", row["test_list"])) != 3:
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


_CHOSEN = (arc, openbookqa, commonsense_qa, piqa, siqa, hellaswag, winogrande, boolq, copa, lambada, mmlu, agieval)
_ANSWERED = (gsm8k, svamp, nq_open, triviaqa, squad, quac, mathematics, bbh, humaneval, mbpp, ifeval)
READERS: dict[str, Callable[[Mapping[str, SetFile]], Splits]] = {
    reader.__name__: reader for reader in (*_CHOSEN, *_ANSWERED, *safety_rows.READERS)
}
