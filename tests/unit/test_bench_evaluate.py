"""bench/evaluate_figures.py: which of a run's scores is put beside which published one."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("resource", reason="bench/ measures on POSIX systems")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("evaluate_figures")


def run(protocol: str, **scores: float) -> dict[str, Any]:
    """A record of 1,000 items a task."""
    part = {"se": 0.01, "n": 1000, "clusters": None, "method": "normal"}
    intervals = {label: part | {"mean": x, "low": x - 0.02, "high": x + 0.02} for label, x in scores.items()}
    tasks = {
        label: {"metrics": {"acc_norm": {"value": each["mean"], "interval": each}}} for label, each in intervals.items()
    }
    return {"settings": {"protocol": protocol}, "tasks": tasks | {"piqa": {"not_run": "no file"}}}


def test_scores_are_beside_the_published_ones(script: ModuleType) -> None:
    records = [run("harness", hellaswag=0.43), run("paper", hellaswag=0.44, arc_easy=0.48, arc_challenge=0.27)]
    found = {(each.name, each.source): script.row(each, script.measured(each, records)) for each in script.FIGURES}
    assert found["HellaSwag", script.CARD][2:] == ["40.9", "44.0 [42.0, 46.0]", "+3.1", "no", "no"]
    assert found["HellaSwag", script.THIRD][2:] == ["43.0", "43.0 [41.0, 45.0]", "+0.0", "yes", "yes"]
    # the mean of 48 and 27, with the error √(1² + 1²) / 2
    assert found["ARC, mean of both", script.CARD][3] == "37.5 [36.1, 38.9]"
    assert found["PIQA", script.CARD][3] == "not run"
    assert found["ARC-e", script.THIRD][3] == "not run"  # the harness's run does not have it
