"""When a model should say nothing: risk by coverage, by hand, and confidences of choices and of answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluations import QUESTIONS, arc_task, jsonl, one_task, tiny_model
from llama2.evaluate import table
from llama2.evaluate.abstention import abstention, confidence
from llama2.evaluate.run import EvaluationSettings, evaluate
from llama2.evaluate.scores import read_samples
from llama2.evaluate.task import load
from models import tiny_config


def test_risk_by_coverage_by_hand() -> None:
    """The surest is right, then one wrong, one right, one wrong: risks of 0, 1/2, 1/3, 1/2."""
    found = abstention([0.9, 0.2, 0.5, 0.7], [1, 0, 1, 0])
    assert found["risk"] == 0.5
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found["accuracy"] == {"1": 0.5, "0.75": pytest.approx(2 / 3), "0.5": 0.5, "0.25": 1, "0.1": 1}
    assert found["threshold"]["0.5"] == 0.7
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.5 + 0.7) / 4)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_without_a_difference_in_confidence_every_coverage_is_equal(right: list[bool]) -> None:
    found = abstention([0.5] * len(right), [float(each) for each in right])
    assert found["aurc"] == pytest.approx(found["risk"])
    assert [*found["accuracy"].values()] == pytest.approx([1 - found["risk"]] * 5)


def test_confidences_by_hand() -> None:
    choices = [{"logprob": math.log(p) - 700} for p in (0.1, 0.3)]  # e**-700 is nearly nothing
    assert confidence({"continuations": choices}) == pytest.approx(0.75)
    assert confidence({"answers": ["x"], "tokens": [2], "logprobs": [math.log(0.81)]}) == pytest.approx(0.9)


def test_in_a_run(tmp_path: Path) -> None:
    """Choices, and answers with the log-likelihood that the engine gives for their tokens."""
    (tmp_path / "mine.jsonl").write_bytes(jsonl(*QUESTIONS))
    choices = arc_task(abstains=True, normalisation="none")
    files = {"nq.jsonl": jsonl(*({"question": f"who is {n}?", "answer": ["him"]} for n in range(7)))}
    answers = one_task(load("nq_open"), tmp_path, files).model_copy(update={"max_tokens": 4})
    with tiny_model(tmp_path, config=tiny_config(context_length=4096)) as model:
        record = evaluate(model, [choices, answers], tmp_path / "run", EvaluationSettings(data=tmp_path))
        sample = read_samples(tmp_path / "run", "nq_open")[0]
        query = model.generate(record["tasks"]["nq_open"]["example"], max_tokens=4, temperature=0, logprobs=0)
    for name, count in (("mine", 4), ("nq_open", 7)):
        task = record["tasks"][name]
        assert task["abstention"]["n"] == count
        assert task["abstention"]["risk"] == pytest.approx(1 - task["metrics"][task["metric"]]["value"])
    assert sample["logprobs"][0] == pytest.approx(math.fsum(each.logprob for each in query.logprobs or ()), abs=1e-6)
    assert any(line.startswith("answering the surest") for line in table.lines(record))
