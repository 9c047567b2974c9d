"""Tasks of likelihood over rows written here: fields as in public, prompts of the paper and of the harness."""

from __future__ import annotations

import bz2
import re
from pathlib import Path
from typing import Any, cast

import pytest
from test_evaluate_bias import CASES as BIAS_CASES

from evaluations import by_hand, jsonl, one_task
from llama2 import recipe
from llama2.errors import EvaluationError, RecipeError
from llama2.evaluate import rows as sets
from llama2.evaluate.items import parts
from llama2.evaluate.task import EvaluationTask, load, names

LSAT = {"passage": "A map. ", "question": "Where?", "options": ["(A)here", "(B)there"], "label": "B"}
MMLU = {
    "mmlu/dev/international_law_dev.csv": b'"Is it,\nso?",a,b,c,d,B\n' * 5,
    "mmlu/test/international_law_test.csv": b" Which? ,w,x,y,z,D\n",
}
SHOT = "Is it,\nso?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
LAW = "The following are multiple choice questions (with answers) about international law.\n\n" + 5 * SHOT
LAW += "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:"

#: Task, its files, and by protocol the contexts and continuations of the first item, and the right one's index.
CASES: list[tuple[str, dict[str, bytes], dict[str, tuple[list[str], list[str], int]]]] = [
    (
        "openbookqa",
        {"x.jsonl": jsonl({"query": "Fog is near", "choices": ["a marsh", "a desert"], "gold": 0})},
        {
            "paper": (["Fog is near"] * 2 + ["Answer:"] * 2, [" a marsh", " a desert"] * 2, 0),
            "harness": (["Fog is near"] * 2, [" a marsh", " a desert"], 0),
        },
    ),
    (
        "piqa",
        {"x.jsonl": jsonl({"goal": "To sit", "sol1": "stand", "sol2": "bend"}), "x.lst": b"1\n"},
        dict.fromkeys(("paper", "harness"), (["Question: To sit\nAnswer:"] * 2, [" stand", " bend"], 1)),
    ),
    (
        "siqa",
        {
            "x.jsonl": jsonl(
                {"context": "Al ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c"}
            ),
            "x.lst": b"3\n",
        },
        {
            "paper": (["Question: Al ran. Why?\nAnswer:"] * 3, [" a", " b", " c"], 2),
            "harness": (["Q: Al ran. Why?\nA:"] * 3, [" a", " b", " c"], 2),
        },
    ),
    (
        "hellaswag",
        {"x.bz2": bz2.compress(b"Tea: Al boils water. the Kettle\n2\nsings.\nflies.\nwhistles.\nsits.\n")},
        dict.fromkeys(
            ("paper", "harness"),
            (["Tea: Al boils water. The kettle"] * 4, [" sings.", " flies.", " whistles.", " sits."], 2),
        ),
    ),
    (
        "winogrande",
        {
            "x.jsonl": jsonl(
                {"context_options": ["Ann saw the cat so the cat", "Ann saw the cat so Ann"], "continuation": "ran."}
                | {"gold": 1}
            )
        },
        dict.fromkeys(
            ("paper", "harness"), (["Ann saw the cat so the cat", "Ann saw the cat so Ann"], [" ran."] * 2, 1)
        ),
    ),
    (
        "copa",
        {"x.jsonl": jsonl({"query": "It rained, because", "choices": ["clouds came.", "Al left."], "gold": 0})},
        {
            "paper": (["It rained because"] * 2, [" clouds came.", " al left."], 0),
            "harness": (["It rained because"] * 2, ["  clouds came.", "  al left."], 0),
        },
    ),
    (
        "boolq",
        {
            "x.jsonl": jsonl(
                {"query": "Passage: Tea is hot.\nQuestion: is tea hot?\n", "choices": ["no", "yes"], "gold": 1},
            ).replace(b"hot?\\n", b"hot?\\nAnswer:")
        },
        {
            "paper": (
                ["Tea is hot.\nQuestion: is tea hot?\nAnswer:"] * 2 + ["Answer:"] * 2,
                [" no", " yes"] * 2,
                1,
            ),
            "harness": (["Tea is hot.\nQuestion: is tea hot?\nAnswer:"] * 2, [" no", " yes"], 1),
        },
    ),
    (
        "lambada",
        {"x.jsonl": jsonl({"context": "He saw\nthe", "continuation": "sea"})},
        dict.fromkeys(("paper", "harness"), (["He saw\nthe"], [" sea"], 0)),
    ),
    ("mmlu", MMLU, dict.fromkeys(("paper", "harness"), ([LAW] * 4, [" A", " B", " C", " D"], 3))),
    (
        "agieval_lsat_rc",
        {"x.jsonl": jsonl(*[LSAT] * 1, *({**LSAT, "question": f"{n}?"} for n in range(3)))},
        {
            "harness": (
                ["A map. Q: Where? Answer Choices: (A)here (B)there\nA: Among A through B, the answer is"] * 2,
                [" (A)here", " (B)there"],
                1,
            ),
        },
    ),
]

CASES += BIAS_CASES


@pytest.mark.parametrize(("name", "files", "expected"), CASES, ids=lambda each: each if isinstance(each, str) else "")
def test_prompts(name: str, files: dict[str, bytes], expected: dict[str, Any], tmp_path: Path) -> None:
    task = one_task(load(name), tmp_path, files)
    for protocol, (contexts, continuations, gold) in expected.items():
        part = parts(task, sets.read(task, tmp_path)[0], cast("Any", protocol))[0]
        item = part.items(by_hand(4096), {part.ids[0]}, seed=0, chat=False)[0]
        assert [instance.args for instance in item.instances] == list(zip(contexts, continuations, strict=True))
        assert (contexts[gold] + continuations[gold]).endswith(part.verbalised(item))
        for index, instance in enumerate(item.instances):
            instance.filtered_resps["none"] = (-1.0 if index == gold else -9.0, index == gold)
        assert part._processed(item)["acc"] == 1


def lettered(n: int) -> dict[str, Any]:
    return {"query": f"Question: {n}?\nChoices:\nA. x\nB. y\nAnswer:", "choices": ["A", "B"], "gold": 1}


@pytest.mark.parametrize("name", [name for name in names() if load(name).output != "generate_until"])
def test_formats_render(name: str, tmp_path: Path) -> None:
    """Each format of each task of likelihood asks something else than the task itself."""
    files = {case[0]: case[1] for case in CASES} | {"commonsenseqa": {"x.jsonl": jsonl(*map(lettered, range(9)))}}
    plain = {"query": "Question: Who?", "choices": ["he", "she"], "gold": 0}
    others = jsonl(*({**LSAT, "question": f"{n}?"} for n in range(6))) if "agieval" in name else jsonl(plain)
    task = one_task(load(name), tmp_path, files.get(name, {"x.jsonl": others}))
    prompts: list[Any] = []
    for asked in (task, *task.other_formats()):
        part = parts(asked, sets.read(asked, tmp_path)[0], "paper")[0]
        (item,) = part.items(by_hand(8192), {part.ids[0]}, seed=0, chat=False)
        assert item.refused is None
        prompts.append([instance.args for instance in item.instances])
    assert len({str(prompt) for prompt in prompts}) == len(prompts)
    assert asked.shots == part.shots


def test_subjects_of_mmlu_by_category() -> None:
    """As the harness groups them."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu/default"
    theirs = {}
    for file in folder.glob("mmlu_*.yaml"):
        text = file.read_text()
        if found := re.search(r'"tag": "mmlu_(\w+)_tasks"', text):
            theirs[file.stem.removeprefix("mmlu_")] = found[1].replace("_", " ")
    assert len(theirs) == 57
    assert {subject: sets.MMLU_CATEGORIES.get(subject, "other") for subject in theirs} == theirs


def broken(name: str, files: dict[str, bytes], folder: Path) -> str:
    """What is said of a set's files."""
    with pytest.raises(EvaluationError) as refused:
        sets.read(one_task(load(name), folder, files), folder)
    return str(refused.value).removeprefix(f"{folder}/")


def test_rows_that_are_not_the_sets(tmp_path: Path) -> None:
    """File, line, and what is wrong with it."""
    row = {"query": "Fog is near", "choices": ["a", "b"], "gold": 2}
    for name, files, message in (
        ("openbookqa", {"x.jsonl": jsonl({**row, "gold": 1}, row)}, "x.jsonl:2: the answer 2 is not one of 2 choices"),
        ("openbookqa", {"x.jsonl": b"{\n"}, "x.jsonl:1: is not JSON"),
        ("openbookqa", {"x.jsonl": jsonl({**row, "gold": True})}, "x.jsonl:1: the field 'gold' has a value of another"),
        (
            "mmlu",
            {"mmlu/test/law_test.csv": b"Which?,a,b,c,d,E\n"},
            "mmlu/test/law_test.csv:1: is not a question",
        ),
        (
            "piqa",
            {"x.jsonl": jsonl({"goal": "g", "sol1": "a", "sol2": "b"}), "x.lst": b"0\n1\n"},
            "x.lst: has 2",
        ),
        ("hellaswag", {"x.txt": b"Tea: a\n1\nb\n"}, "x.txt: has 3 lines, and an item has 6"),
        ("boolq", {"x.jsonl": jsonl({**row, "gold": 1})}, "x.jsonl:1: the query is not of the form"),
    ):
        assert broken(name, files, tmp_path).startswith(message)


def test_a_part_without_examples(tmp_path: Path) -> None:
    task = one_task(load("mmlu"), tmp_path, {**MMLU, "mmlu/dev/international_law_dev.csv": b"Is it?,a,b,c,d,B\n"})
    with pytest.raises(EvaluationError, match="mmlu: needs 5 examples of the split dev, and there are 1"):
        parts(task, sets.read(task, tmp_path)[0], "paper")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": ""}, "choices: is missing"),
        ({"normalisation": "words"}, "normalisation: Input should be 'none', 'characters' or 'answer'"),
        ({"promt": "x"}, "promt: unknown setting; did you mean prompt?"),
        ({"aggregation": "strata", "stratum": ""}, "aggregation: strata needs a stratum"),
    ],
)
def test_a_task_that_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        recipe.make(load("arc_easy").model_dump() | changes, EvaluationTask, where="mine")
