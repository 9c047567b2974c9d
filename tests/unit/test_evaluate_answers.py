"""Tasks whose answers are generated: their rows, prompts, stops and scores, on rows written for the tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluations import write_rows
from llama2 import api
from llama2.errors import EvaluationError
from llama2.evaluate import execution, metrics, rows, task
from llama2.evaluate.run import EvaluationSettings, evaluate
from llama2.evaluate.task import EvaluationTask
from models import tiny_config, write_tiny_gguf

#: The sets that were fetched for this project, where they are.
SETS = Path(__file__).parents[2].parent / "shared/data"

GENERATED = [
    each for each in map(task.load, task.names()) if each.output == "generate_until" and each.suite == "academic"
]

TESTS = ["assert add(1) == 2", "assert add(2) == 3", "assert add(3) == 4"]
MBPP = [
    {"task_id": i, "text": f"Add {i}.", "code": "def add(x):\r\n    return x + 1"} for i in (1, 2, 3, 4, 5, 11, 511)
]
SQUAD = {
    "data": [
        {
            "title": "Oslo",
            "paragraphs": [
                {
                    "context": "Oslo is in Norway.",
                    "qas": [
                        {"id": "1", "question": "Where is Oslo?", "answers": [{"text": "Norway", "answer_start": 11}]},
                        {"id": "2", "question": "Who is Oslo?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}
#: A dialog of three questions; on the second, people do not agree.
QUAC_TURNS = [
    ("What is it?", ["a town", "a town"]),
    ("Who founded it?", ["Harald the Hard", "CANNOTANSWER", "its people"]),
    ("Is it big?", ["CANNOTANSWER", "CANNOTANSWER"]),
]
QUAC = {
    "data": [
        {
            "title": "Oslo",
            "paragraphs": [
                {
                    "context": "Oslo is a town. CANNOTANSWER",
                    "qas": [
                        {
                            "id": f"q{i}",
                            "question": question,
                            "answers": [{"text": text} for text in texts],
                            "orig_answer": {"text": texts[0]},
                        }
                        for i, (question, texts) in enumerate(QUAC_TURNS)
                    ],
                }
            ],
        }
    ]
}
BBH = {"canary": "x", "examples": [{"input": "Two and two is", "target": "Four"}]}
BBH_PROMPT = (
    "BENCHMARK DATA, canary x\n-----\nAdd.\n\nQ: One and one is\nA: Let's think step by step.\nIt is 2.\n"
    "So the answer is Two.\n\nQ: No and one is\nA: Let's think step by step. It is 1. So the answer is One.\n\n"
    "Q: No and no is\nA: Let's think step by step.\nNothing. So the answer is Zero."
)
#: Files of each set, in the form that the set has in public.
FILES: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "gsm8k/train.jsonl": [{"question": f"{i}?", "answer": f"<<{i}+1={i}>>It is {i}.\n#### {i}"} for i in range(8)],
        "gsm8k/test.jsonl": [{"question": "How many?", "answer": "It is 1,000.\n#### 1,000"}],
    },
    "svamp": {
        "svamp/SVAMP.json": [
            {"ID": f"chal-{i}", "Body": f"Ann has {i} pens", "Question": "How many?", "Answer": float(i), "Type": "Sum"}
            for i in range(9)
        ]
    },
    "nq_open": {"nq_open/NQ-open.dev.jsonl": [{"question": f"who is {i}", "answer": [f"Mr {i}"]} for i in range(6)]},
    "triviaqa": {
        "triviaqa/wikipedia-dev.json": {
            "Data": [
                {"Question": f"Who is {i}?", "QuestionId": f"q{i}", "Answer": {"Value": f"Mr {i}", "Aliases": [f"{i}"]}}
                for i in range(6)
            ]
        }
    },
    "squad": {"squad/dev-v2.0.json": SQUAD},
    "quac": {"quac/val_v0.2.json": QUAC},
    "math": {
        f"math/{split}.jsonl": [
            {"problem": f"Find {i}.", "level": "Level 1", "type": "Algebra", "solution": f"It is $\\boxed{{{i}}}$."}
            for i in range(count)
        ]
        for split, count in (("train", 4), ("test", 1))
    },
    "bbh": {"bbh/addition.json": BBH, "bbh/cot-prompts/addition.txt": BBH_PROMPT},
    "humaneval": {
        "humaneval/HumanEval.jsonl.gz": [
            {
                "task_id": "HumanEval/0",
                "prompt": 'def add(x):\n    """Add one."""\n',
                "entry_point": "add",
                "canonical_solution": "    return x + 1\n",
                "test": "def check(candidate):\n    assert candidate(1) == 2\n",
            }
        ]
    },
    "mbpp": {"mbpp/mbpp.jsonl": [row | {"test_list": TESTS, "test_setup_code": ""} for row in MBPP]},
    "ifeval": {
        "ifeval/input_data.jsonl": [
            {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        ]
    },
}
FILES |= {"bbh_direct": FILES["bbh"], "humaneval_pass100": FILES["humaneval"], "mbpp_pass80": FILES["mbpp"]}


def write(folder: Path, name: str, **changes: Any) -> EvaluationTask:
    """Write the files of a set, some changed; its task without their SHA-256."""
    for path, content in (FILES[name] | changes).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.write_text(content)
        elif file.suffix == ".json":
            file.write_text(json.dumps(content))
        else:
            write_rows(file, content)
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress(file.read_bytes()))
    return task.load(name).model_copy(update={"files": dict.fromkeys(FILES[name], "")})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[api.Model]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=4096))
    with api.load(path, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def record(model: api.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of every task that generates, with three tokens an answer."""
    folder = tmp_path_factory.mktemp("sets")
    tasks = [write(folder, each.name).model_copy(update={"max_tokens": 3}) for each in GENERATED]
    return evaluate(model, tasks, folder / "run", EvaluationSettings(data=folder, limit=1)) | {"folder": folder / "run"}


PROMPTS = {
    "gsm8k": "Question: 6?\nAnswer: It is 6.\n#### 6\n\nQuestion: 7?\nAnswer: It is 7.\n#### 7\n\n"
    "Question: How many?\nAnswer:",
    "squad": "Title: Oslo\n\nBackground: Oslo is in Norway.\n\nQuestion: Wh",
    "math": "Problem:\nFind 3.\n\nSolution: It is $\\boxed{3}$.\n\nProblem:\nFind 0.\n\nSolution:",
    "bbh": BBH_PROMPT.partition("-----\n")[2] + "\n\nQ: Two and two is\nA: Let's think step by step.",
    "bbh_direct": "Add.\n\nQ: One and one is\nA: Two\n\nQ: No and one is\nA: One\n\nQ: No and no is\nA: Zero\n\n"
    "Q: Two and two is\nA:",
    "humaneval": 'def add(x):\n    """Add one."""\n',
    "mbpp": "[BEGIN]\ndef add(x):\n    return x + 1\n[DONE]\n\n"
    "You are an expert Python programmer, and here is your task: Add 11. Your code should pass these tests:\n\n"
    "assert add(1) == 2\nassert add(2) == 3\nassert add(3) == 4\n[BEGIN]\n",
    "ifeval": "No commas.",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_published_ones(record: dict[str, Any], name: str) -> None:
    found = record["tasks"][name]
    if name.startswith(("humaneval", "mbpp")) and execution.available():
        pytest.skip(str(execution.available()))
    assert PROMPTS[name] in found["example"]
    if name not in ("gsm8k", "squad", "math", "mbpp"):  # of which only the end is here
        assert found["example"] == PROMPTS[name]
    if name == "gsm8k":
        assert found["example"].count("Question:") == 9
        assert "<<" not in found["example"]
    if name == "mbpp":
        tasks = [f"task: Add {i}." for i in (2, 3, 4, 11)]  # Austin et al. 2021 ask with 2, 3 and 4
        assert [found["example"].count(each) for each in tasks] == [1, 1, 1, 1]
        assert found["example"].count("[BEGIN]") == 4


@pytest.mark.parametrize("name", ["nq_open", "triviaqa", "svamp"])
def test_the_item_is_never_among_its_examples(record: dict[str, Any], name: str) -> None:
    *examples, asked = record["tasks"][name]["example"].strip().rsplit("Q", record["tasks"][name]["shots"] + 1)[1:]
    assert len(examples) == record["tasks"][name]["shots"] == {"svamp": 8}.get(name, 5)
    assert len({*examples, asked}) == len(examples) + 1
    question = asked.partition("\nA")[0]
    assert not any(question in each for each in examples)


def test_open_questions_begin_as_the_papers(record: dict[str, Any]) -> None:
    assert record["tasks"]["nq_open"]["example"].startswith("Answer these questions:\nQ: who is ")
    assert record["tasks"]["nq_open"]["example"].endswith("?\nA:")


def test_every_task_has_scores_or_a_reason(record: dict[str, Any]) -> None:
    for each in GENERATED:
        found = record["tasks"][each.name]
        if each.executes and execution.available():
            assert found["not_run"] == execution.available()
        elif max(each.pass_at, default=0) > each.samples:
            assert "--full draws" in found["not_run"]
        else:
            assert found["metric"] in found["metrics"], each.name
            assert "interval" in found["metrics"][found["metric"]], each.name


def test_an_answer_cut_by_its_limit_is_counted_as_such(record: dict[str, Any]) -> None:
    found = record["tasks"]["math"]
    sample = json.loads((record["folder"] / "samples/math.jsonl").read_text())
    assert (found["n"], found["cut"]) == (1, 1)
    assert sample["finish"] == ["length"]
    assert sample["tokens"] == [3]


def test_instructions_count_alike_whatever_their_prompt(record: dict[str, Any]) -> None:
    """Two instructions of a prompt are two values of a cluster."""
    interval = record["tasks"]["ifeval"]["metrics"]["instruction_strict"]["interval"]
    assert (interval["n"], interval["clusters"]) == (1, 1)


@pytest.mark.parametrize("each", GENERATED, ids=lambda each: each.name)
def test_words_stop_an_answer_only_where_a_line_begins(each: EvaluationTask) -> None:
    """Pitfalls 13 and 14: `Question` as a stop cuts an answer that speaks of a question."""
    assert all(stop.startswith("\n") or stop == "[DONE]" for stop in each.stops)
    assert callable(getattr(metrics, each.scorer))


def test_quac_has_its_history_and_leaves_out_what_people_disagree_on(tmp_path: Path) -> None:
    splits, _ = rows.read(write(tmp_path, "quac"), tmp_path)
    first, last = splits["validation"]
    assert (first["history"], first["context"]) == ("", "Oslo is a town.")
    assert last["history"] == "Q: What is it?\nA: a town\n\nQ: Who founded it?\nA: Harald the Hard\n\n"
    assert last["answers"]["texts"] == ["CANNOTANSWER", "CANNOTANSWER"]


BAD_ROWS: list[tuple[str, str, Any, str]] = [
    ("gsm8k", "gsm8k/test.jsonl", [{"question": "?", "answer": "5"}], "test.jsonl:1: the answer does not end in"),
    ("gsm8k", "gsm8k/train.jsonl", [{"question": "?"}], "train.jsonl:1: the field 'answer' is missing"),
    ("svamp", "svamp/SVAMP.json", {"ID": "x"}, "SVAMP.json: is not a list"),
    ("svamp", "svamp/SVAMP.json", [{"ID": "x"}], r"SVAMP.json: \[0\]: the field 'Body' is missing"),
    ("svamp", "svamp/SVAMP.json", "[", "SVAMP.json: is not JSON"),
    (
        "nq_open",
        "nq_open/NQ-open.dev.jsonl",
        [{"question": "?", "answer": []}],
        "dev.jsonl:1: the field 'answer' is not",
    ),
    ("triviaqa", "triviaqa/wikipedia-dev.json", {"data": []}, "the field 'Data' is missing"),
    (
        "squad",
        "squad/dev-v2.0.json",
        {"data": [{"paragraphs": [{"qas": []}]}]},
        r"data\[0\]: paragraphs\[0\]: .*'context'",
    ),
    ("math", "math/test.jsonl", [dict.fromkeys(("problem", "level", "type", "solution"), "x")], "has no boxed answer"),
    ("bbh", "bbh/cot-prompts/addition.txt", "-----\nAdd.\n\nQ: 1\nA: 2", "addition: the query is not of the form"),
    ("bbh", "bbh/addition.json", {"examples": [{"input": "x"}]}, r"examples\[0\]: the field 'target' is missing"),
    (
        "mbpp",
        "mbpp/mbpp.jsonl",
        [MBPP[0] | {"test_list": TESTS[:2], "test_setup_code": ""}],
        "does not have three tests",
    ),
    (
        "ifeval",
        "ifeval/input_data.jsonl",
        [{"key": 1, "prompt": "", "instruction_id_list": ["a"], "kwargs": []}],
        "input_data.jsonl:1: kwargs and instruction_id_list have unequal lengths",
    ),
]


@pytest.mark.parametrize(("name", "path", "content", "message"), BAD_ROWS)
def test_a_row_that_is_not_the_sets_is_refused(
    tmp_path: Path, name: str, path: str, content: Any, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        rows.read(write(tmp_path, name, **{path: content}), tmp_path)


def test_the_harness_asks_with_its_own_examples(tmp_path: Path) -> None:
    """Its file of a task of BIG-Bench Hard holds three; rows that are asked are never examples."""
    from llama2.evaluate.items import parts

    files = {"bbh/navigate.json": BBH, "bbh/cot-prompts/navigate.txt": BBH_PROMPT}
    chosen = write(tmp_path, "bbh", **files).model_copy(update={"files": dict.fromkeys(files, "")})
    splits, _ = rows.read(chosen, tmp_path)
    (part,) = parts(chosen, splits, "harness")
    context = part.inner.fewshot_context(part.inner.task_docs[0], num_fewshot=part.shots)
    assert context.startswith("Given a series of navigation instructions, determine whether one would end up back")
    assert context.count("If you follow these instructions, do you return to the starting point?") == 3
    assert context.count("Let's think step by step.\nWe start at the origin") == 3
    assert context.endswith("Q: Two and two is\nA: Let's think step by step.\n")


def test_the_papers_number_of_answers_is_drawn_by_full() -> None:
    code = task.load("humaneval_pass100")
    assert code.lacking == "pass@100 needs 100 answers to a question, not 10; --full draws 200"
    assert (code.full().samples, code.full().lacking) == (200, execution.available())
    assert task.load("gsm8k").full() == task.load("gsm8k")
    assert (task.load("humaneval").temperature, task.load("mbpp_pass80").temperature) == (0.1, 0.8)


def test_code_is_not_run_without_its_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "bubblewrap" in str(task.load("mbpp").lacking)


@pytest.mark.skipif(not (SETS / "bbh").is_dir(), reason="the sets are not on this machine")
def test_prompts_of_big_bench_hard_are_the_sets_own() -> None:
    """The description and the three examples, put together again, are the whole of each file."""
    chosen = task.load("bbh")
    splits, _ = rows.read(chosen, SETS)
    assert (len(splits["dev"]), len(splits["test"])) == (81, 6511)
    for name in {row["task"] for row in splits["dev"]}:
        shots = [row for row in splits["dev"] if row["task"] == name]
        text = "\n\n".join(
            [
                shots[0]["description"],
                *(f"Q: {r['input']}\nA: Let's think step by step.{r['reasoning']}" for r in shots),
            ]
        )
        file = (SETS / f"bbh/cot-prompts/{name}.txt").read_text()
        assert text == file.partition("-----\n")[2].rstrip()


def test_programs_are_not_executed_again(model: api.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that took too long on one day may not on another."""
    executed: list[str] = []

    def scored(answer: str, row: Any) -> dict[str, float]:
        executed.append(answer)
        return {"passed": float(len(executed) == 1)}

    monkeypatch.setattr(execution, "available", lambda: None)
    monkeypatch.setattr(metrics, "humaneval", scored)
    code = write(tmp_path, "humaneval").model_copy(update={"max_tokens": 3, "samples": 1})
    settings, seen = EvaluationSettings(data=tmp_path), []
    first = evaluate(model, [code], tmp_path / "run", settings, progress=lambda *each: seen.append(each))
    assert (len(executed), first["tasks"]["humaneval"]["metrics"]["pass@1"]["value"]) == (1, 1.0)
    assert seen[-1] == ("programs", 1, 1)
    samples = (tmp_path / "run/samples/humaneval.jsonl").read_bytes()
    again = evaluate(model, [code], tmp_path / "run", settings, resume=True)
    assert (len(executed), again["tasks"]) == (1, first["tasks"])
    assert (tmp_path / "run/samples/humaneval.jsonl").read_bytes() == samples
