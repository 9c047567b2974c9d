"""A run of evaluate: the same bytes however it runs, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluations import QUESTIONS, arc_task, tiny_model, write_rows
from llama2 import api
from llama2.evaluate.run import EvaluationSettings, evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[api.Model]:
    with tiny_model(tmp_path_factory.mktemp("evaluated")) as model:
        yield model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_rows(folder / "mine.jsonl", QUESTIONS)
    return folder


def test_one_and_64_at_once_give_the_same_bytes(model: api.Model, data: Path, tmp_path: Path) -> None:
    """Pitfall 16: padding and batch composition move scores elsewhere."""
    for batch in (1, 64):
        evaluate(model, [arc_task()], tmp_path / str(batch), EvaluationSettings(data=data, in_flight=batch))
    for name in ("answers.jsonl", "samples/mine.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "64" / name).read_bytes()
    tasks = [json.loads((tmp_path / batch / "record.json").read_text())["tasks"] for batch in ("1", "64")]
    assert tasks[0] == tasks[1]
    assert tasks[0]["mine"]["n"] == 4
