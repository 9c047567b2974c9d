"""The verdict of bench/small_beside_transformers.py, by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return importlib.import_module("small_beside_transformers")


@pytest.mark.parametrize(("gap", "agree"), [(0.019, True), (-0.019, True), (0.021, False)])
def test_curves_agree_within_twice_the_noise_of_the_last_half(beside: ModuleType, gap: float, agree: bool) -> None:
    theirs = [4.0, 3.0, 2.0, 1.0]
    again = [9.0, 9.0, 2.01, 0.99]
    ours = [4.5, 9.0, 2.0 + gap, 1.0 + gap]
    found = beside.compare({"ours": ours, "theirs": theirs, "theirs again": again}, times=2.0)
    assert found["agree"] is agree
    assert found["mean_absolute_noise"] == pytest.approx(0.01)
    assert found["mean_noise"] == pytest.approx(0, abs=1e-12)
    assert found["mean_difference"] == pytest.approx(gap)
    assert found["first_difference"] == 0.5
    assert found["allowed"] == pytest.approx(0.02)


def test_without_noise_a_thousandth_is_allowed(beside: ModuleType) -> None:
    same = [2.0, 1.0]
    assert beside.compare({"ours": [2.0, 1.0009], "theirs": same, "theirs again": same}, times=2.0)["agree"]
    assert not beside.compare({"ours": [2.0, 1.0011], "theirs": same, "theirs again": same}, times=2.0)["agree"]
