"""A run's record: groups, distances to the paper, spread over formats, the table, and comparisons of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evaluations import QUESTIONS, arc_task, tiny_model, write_rows
from llama2.errors import EvaluationError
from llama2.evaluate import table
from llama2.evaluate.comparison import compare_runs
from llama2.evaluate.intervals import mean_interval
from llama2.evaluate.run import EvaluationSettings, evaluate
from llama2.evaluate.scores import beside_published, format_spread, group_scores, read_record

RIGHT = {"1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0}


def task(values: Mapping[str, float] = RIGHT, **changes: Any) -> dict[str, Any]:
    """A task's part of a record."""
    interval = mean_interval([*values.values()], proportion=True)
    part = {
        "title": "ARC-e",
        "version": 1,
        "task": "a1",
        "protocol": "paper",
        "shots": 0,
        "chat": False,
        "n": len(values),
        "refused": 0,
        "metric": "acc",
        "metrics": {"acc": {"value": interval.mean, "interval": interval.to_json()}},
    }
    return part | changes


def record(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A record with these tasks."""
    groups, formats = group_scores(tasks), format_spread(tasks)
    return {"model": "tiny", "weights": "00", "tasks": tasks, "groups": groups, "formats": formats}


def run(
    folder: Path,
    values: Mapping[str, float] = RIGHT,
    *,
    cluster: str | None = None,
    prompt: str = "p",
    question: str | None = None,
    **changes: Any,
) -> Path:
    """A finished run of arc_easy."""
    (folder / "samples").mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record({"arc_easy": task(values, **changes)})))
    shared = {"prompt": prompt, "cluster": cluster, "question": question}
    shared = {name: value for name, value in shared.items() if value is not None}
    samples = [{"id": name, **shared, "values": {"acc": value}} for name, value in values.items()]
    write_rows(folder / "samples/arc_easy.jsonl", samples)
    return folder


def test_two_runs_are_compared_item_by_item(tmp_path: Path) -> None:
    theirs = run(tmp_path / "b", {"1": 0.0, "2": 1.0, "3": 0.0, "4": 0.0})
    found = compare_runs(run(tmp_path / "a"), theirs)
    compared = found["tasks"]["arc_easy"]
    assert (compared["difference"], compared["only_a"], compared["only_b"]) == (0.5, 2, 0)
    assert compared["p"] == compared["p_holm"] == 0.5  # two coins fall on one side
    assert table.comparison_lines(found)[2].split()[:2] == ["arc_easy", "+50.0"]
    clustered = compare_runs(run(tmp_path / "c", cluster="x"), run(tmp_path / "d", cluster="x"))
    assert clustered["tasks"]["arc_easy"]["clusters"] == 1


def test_models_with_other_chat_templates_are_compared(tmp_path: Path) -> None:
    ours, theirs = (run(tmp_path / name, prompt=name, question="q", chat=True) for name in "ab")
    assert compare_runs(ours, theirs)["tasks"]["arc_easy"]["n"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "q"}, "arc_easy has another prompt at item 1 and 3 more"),
        ({"version": 2}, "arc_easy has another version 2 there and 1 here"),
        ({"task": "b2"}, "arc_easy has another settings"),
        ({"protocol": "harness"}, "another protocol harness there and paper here"),
        ({"shots": 5}, "another examples 5 there and 0 here"),
        ({"prompt": "q"}, "arc_easy has another prompt at item 1 and 3 more"),
        ({"values": {"1": 1.0, "5": 1.0}}, r"arc_easy has other items \(4 are in one run only\)"),
    ],
)
def test_runs_that_differ_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    theirs = run(tmp_path / "b", **changes)
    with pytest.raises(EvaluationError, match=words):
        compare_runs(run(tmp_path / "a"), theirs)


def test_what_is_not_a_finished_run_is_refused(tmp_path: Path) -> None:
    ours = run(tmp_path / "a")
    with pytest.raises(EvaluationError, match="does not hold a finished run"):
        compare_runs(ours, tmp_path)
    (tmp_path / "record.json").write_text('{"tasks": 1}')
    with pytest.raises(EvaluationError, match="does not have tasks"):
        read_record(tmp_path)
    other = run(tmp_path / "b")
    (other / "record.json").write_text(json.dumps(record({"piqa": task()})))
    with pytest.raises(EvaluationError, match="does not have a score of the same task"):
        compare_runs(ours, other)
    damaged = run(tmp_path / "c")
    (damaged / "samples/arc_easy.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(EvaluationError, match=r"arc_easy.jsonl:1: is not an item"):
        compare_runs(ours, damaged)


def test_a_group_has_a_mean_when_all_members_have_scores() -> None:
    low, high = {"1": 0.0, "2": 0.0, "3": 0.0, "4": 1.0}, RIGHT
    tasks = {"humaneval": task(low), "mbpp": task(high), "gsm8k": task(high), "math": {"not_run": "no file"}}
    groups = group_scores(tasks)
    assert groups["code"]["mean"]["mean"] == 0.5
    # each has s² = 1/4 over 4 values, so the error of their mean is √(1/16 + 1/16) / 2
    assert groups["code"]["mean"]["se"] == pytest.approx((2 / 16) ** 0.5 / 2)
    assert (groups["mathematics"]["mean"], groups["mathematics"]["missing"]) == (None, ["math"])


def test_distance_to_the_paper() -> None:
    found = beside_published("arc_easy", 0, 0.412)
    assert found is not None
    assert (found["shots"], found["percent"]["Llama 2 7B"], found["distance"]["Llama 2 7B"]) == (0, 75.2, -34.0)
    assert beside_published("lambada", 0, 0.5) is None


def test_the_table_reads_like_the_papers() -> None:
    tasks = {
        "humaneval": task(title="HumanEval", published=beside_published("humaneval", 0, 0.75)),
        "mbpp": {"title": "MBPP", "not_run": "bubblewrap is missing"},
        "commonsenseqa": task(title="CSQA", shots=0, published=beside_published("commonsenseqa", 0, 0.75), cut=2),
        "lambada": task(title="LAMBADA", refused=3),
        "mmlu": task(title="MMLU", shots=5),
        "mmlu@cloze": task({"1": 0.0, "2": 1.0}, title="MMLU"),
    }
    shown = table.lines(record(tasks))
    assert shown[0].split() == ["Code", "Commonsense", "MMLU"]  # of which the run has tasks
    assert shown[1].split() == ["tiny", "-", "-", "75.0"]
    assert shown[3].split() == ["Llama", "2", "7B", "16.8", "63.9", "45.3"]
    text = "\n".join(shown)
    assert "Code does not have a mean: without mbpp" in text
    assert "MBPP: not run, bubblewrap is missing" in text
    assert "57.8 (7-shot)" in text  # the paper's examples are others
    assert "LAMBADA: 3 of 7 items do not fit the context" in text
    assert "CSQA: 2 answers were cut by their limit of tokens" in text
    assert next(line for line in shown if line.startswith("mmlu ")).split() == ["mmlu", "50.0", "75.0", "25.0"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tasks = {"arc_easy": task(published=beside_published("arc_easy", 0, 0.75)), "piqa": {"not_run": "no file"}}
    table.draw(record(tasks), tmp_path / "scores.svg")
    assert "arc_easy (4)" in (text := (tmp_path / "scores.svg").read_text()) or "<path" in text
    with pytest.raises(EvaluationError, match="no task has a score to draw"):
        table.draw(record({"piqa": {"not_run": "no file"}}), tmp_path / "none.svg")


def test_a_run_in_several_formats(tmp_path: Path) -> None:
    write_rows(tmp_path / "sets/mine.jsonl", QUESTIONS)
    mine = arc_task(formats={"bare": {"prompt": "{{question}}"}, "long": {"description": "Answer. "}})
    with tiny_model(tmp_path) as model:
        found = evaluate(
            model, [mine, *mine.other_formats()], tmp_path / "run", EvaluationSettings(data=tmp_path / "sets")
        )
    assert [*found["tasks"]] == ["mine", "mine@bare", "mine@long"]
    scores = found["formats"]["mine"]["scores"]
    assert scores == {
        name.partition("@")[2]: part["metrics"]["acc_norm"]["value"] for name, part in found["tasks"].items()
    }
    assert found["formats"]["mine"]["range"] == max(scores.values()) - min(scores.values())
    assert compare_runs(tmp_path / "run", tmp_path / "run")["tasks"]["mine@bare"]["p"] == 1
    assert read_record(tmp_path / "run") == json.loads(json.dumps(found))
