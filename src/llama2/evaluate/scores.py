"""Scores of a run's record: a task's with its interval, means of the paper's groups, distances to published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.errors import EvaluationError
from llama2.evaluate.intervals import Interval
from llama2.evaluate.published import LLAMA_2, figures, groups

RECORD, SAMPLES = "record.json", "samples"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run. Raises EvaluationError where there is none, or it is damaged."""
    path = folder / RECORD
    if not files.exists(path):
        raise EvaluationError(f"{folder}: does not hold a finished run, {RECORD} is missing; make it with `evaluate`")
    record = files.load_json(path, error=EvaluationError)
    if not isinstance(record.get("tasks"), dict) or not all(
        isinstance(task, dict) for task in record["tasks"].values()
    ):
        raise EvaluationError(f"{path}: does not have tasks; evaluate again")
    return record


def read_samples(folder: Path, label: str) -> list[dict[str, Any]]:
    """A task's items as the run recorded them. Raises EvaluationError for a missing or damaged file."""
    path = folder / SAMPLES / f"{label}.jsonl"
    found = []
    with files.open_file(path, error=EvaluationError) as file:
        for number, line in enumerate(file, 1):
            try:
                sample = json.loads(line)
                found.append({**sample, "id": str(sample["id"]), "prompt": str(sample["prompt"])})
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise EvaluationError(f"{path}:{number}: is not an item ({error}); evaluate again") from None
    return found


def score(task: Mapping[str, Any]) -> Interval | None:
    """The score of a task's part of a record; None for one that was not run.

    Its interval is infinite where the record has none, such as that of a perplexity.
    """
    if "metrics" not in task:
        return None
    found = task["metrics"][task["metric"]]
    if "interval" not in found:
        return Interval(found["value"], math.inf, -math.inf, math.inf, task["n"], None, "none")
    return Interval.from_json(found["interval"])


def group_scores(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean of each of the paper's groups with its interval, and the members without a score.

    A group with a missing member does not have a mean.
    """
    scores = {name: found for name, task in tasks.items() if (found := score(task)) is not None}
    return {
        group.name: {
            "title": group.title,
            "mean": None if (mean := group.mean(scores)) is None else mean.to_json(),
            "missing": group.missing(scores),
        }
        for group in groups()
    }


def beside_published(name: str, shots: int, value: float) -> dict[str, Any] | None:
    """What the paper has for a task, and a score's distance to it in points; None for what it does not have.

    `shots` is the number of examples in the paper's prompts, which may be another than ours.
    """
    row = figures(name, shots)
    if row is None:
        return None
    models = {model: row.by_model[model] for model in LLAMA_2 if model in row.by_model}
    return {
        "shots": row.shots,
        "percent": models,
        "distance": {model: round(100 * value - percent, 4) for model, percent in models.items()},
    }


def format_spread(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How far a score moves with the prompt, of tasks that were asked in several formats: task@format.

    `scores` are by format, the task's own first, under an empty name. `range` is the distance of highest and lowest.
    """
    scores: dict[str, dict[str, float]] = {}
    for label, task in tasks.items():
        name, _, format = label.partition("@")
        if (found := score(task)) is not None:
            scores.setdefault(name, {})[format] = found.mean
    return {
        name: {"scores": some, "range": max(some.values()) - min(some.values())}
        for name, some in scores.items()
        if len(some) > 1
    }
