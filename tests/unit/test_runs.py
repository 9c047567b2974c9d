"""`llama2 runs` by figures that were worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from commands import typed
from llama2.cli.runs import axis, curve, smooth
from llama2.records import Run


def line(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "tokens": 100 * step, "tokens_per_second": 10.0 * step, "mfu": 0.5} | more


def made(folder: Path, name: str, date: str, lines: list[dict[str, Any]]) -> Run:
    run = Run.create(folder / name, {"steps": 4}, parameters=1234, seed=3)
    (run.folder / "run.json").write_text(json.dumps(run.origin | {"date": date, "commit": "abc"}))
    for each in lines:
        run.log(**each)
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made(tmp_path, "later", "2026-02-01T00:00:00+00:00", [])
    lines = [line(1, 1.0), line(2, 9.0), line(3, 9.0), line(2, 2.0), line(3, 3.0, validation=math.log(8))]
    made(tmp_path, "first", "2026-01-01T00:00:00+00:00", lines)
    (tmp_path / "no run").mkdir()
    return tmp_path


def test_lists_the_oldest_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "runs", "--runs", folder)
    assert code == 0
    # Steps 2 and 3 were done twice; the mean of 1, 2, 3 is 2, and 1.96 × 1 / √3 = 1.1316.
    assert [" ".join(row.split()) for row in out.splitlines()] == [
        "NAME PARAMETERS STEP TOKENS LOSS VALIDATION PPL TOKENS/S MFU BEGUN",
        "first 1,234 3/4 300 2.0000 ± 1.1316 2.0794 8.00 20 50.0% 2026-01-01T00:00:00+00:00",
        "later 1,234 0/4 0 - - - - - 2026-02-01T00:00:00+00:00",
    ]


def test_json_names_where_figures_come_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "runs", folder / "first", "--json")
    assert code == 0
    [row] = json.loads(out)["runs"]
    assert row | {"loss_interval": None, "validation": None, "perplexity": None} == {
        "name": str(folder / "first"),
        "folder": str(folder / "first"),
        "begun": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "seed": 3,
        "parameters": 1234,
        "step": 3,
        "steps": 4,
        "tokens": 300,
        "loss": 2.0,
        "loss_interval": None,
        "validation": None,
        "perplexity": None,
        "tokens_per_second": 20.0,
        "mfu": 0.5,
        "notes": 0,
    }
    assert row["perplexity"] == pytest.approx(8)


def test_draws_them_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(folder, "second", "2026-01-02T00:00:00+00:00", [line(1, None, note="skipped"), line(2, 5.0)])
    code, out, _ = typed(capsys, "runs", "first", "second", "--runs", folder, "--plot", folder / "curves.svg")
    assert code == 0
    assert out.splitlines()[-1] == f"{folder / 'curves.svg'}: 2 runs"
    drawing = ET.parse(folder / "curves.svg").getroot()  # noqa: S314
    panels = [e.get("id") for e in drawing.iter() if (e.get("id") or "").startswith("axes_")]
    assert panels == ["axes_1", "axes_2"]
    texts = (folder / "curves.svg").read_text()
    assert all(f"<!-- {text} -->" in texts for text in ("first", "second", "training loss", "validation loss"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nothing"], 1, "nothing: is no run of {} (there: first, later); name one of them, or a run's folder"),
        (["--plot", "x.doc"], 2, "--plot x.doc: the name must end in one of .png, .svg, .pdf"),
        (["later", "--plot", "x.png"], 1, "no run has figures to draw; let one do a step"),
    ],
)
def test_errors(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str) -> None:
    found, _, error = typed(capsys, "runs", *words, "--runs", folder)
    assert found == code
    assert message.format(folder) in error
    assert error.count("\n") == 1


def test_no_runs_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, "runs", "--runs", tmp_path / "none")
    assert (code, out) == (0, f"No runs in {tmp_path / 'none'} yet; `llama2 pretrain recipes/nano.toml` begins one.\n")


def test_a_curve_and_its_axes(folder: Path) -> None:
    lines = curve(Run(folder / "first"))
    assert [(each["step"], each["loss"]) for each in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert axis(lines, "tokens") == [100, 200, 300]
    assert axis(lines, "step") == [1, 2, 3]
    timed = [each | {"seconds": seconds} for each, seconds in zip(lines, (36, 72, 0), strict=True)]
    assert axis(timed, "hours") == pytest.approx([0.01, 0.03, 0.03])


def test_a_mean_whose_weights_halve_every_twenty_steps() -> None:
    means = smooth([math.nan, 4.0, *[math.nan] * 20, 1.0])
    assert math.isnan(means[0])
    assert means[1:22] == pytest.approx([4.0] * 21)
    # 21 steps on, 4 weighs k = 2 ** (-21 / 20), and 1 weighs 1.
    k = 2 ** (-21 / 20)
    assert means[22] == pytest.approx((4 * k + 1) / (k + 1))
