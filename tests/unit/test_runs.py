"""`llama2 runs` by metrics that were worked out by hand."""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from commands import typed
from llama2.curves import places, smooth
from llama2.records import Run, commit
from llama2.train import card


def line(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "tokens": 100 * step, "tokens_per_second": 10.0 * step, "mfu": 0.5} | more


MEASURED = {"validation": math.log(8), "sources": {"books": 1.5, "web": math.nan}}


def made(folder: Path, name: str, date: str, lines: list[dict[str, Any]]) -> Run:
    run = Run.create(folder / name, {"steps": 4}, parameters=1234, seed=3)
    (run.folder / "run.json").write_text(json.dumps(run.origin | {"date": date, "commit": "abc"}))
    for each in lines:
        run.log(**each)
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made(tmp_path, "later", "2026-02-01T00:00:00+00:00", [])
    lines = [line(1, 1.0), line(2, 9.0), line(3, 9.0), line(2, 2.0), line(3, 3.0, **MEASURED)]
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
        "sources": {"books": 1.5, "web": None},
        "damage": [],
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
        (["nothing"], 1, "nothing: is not a run of {} (there: first, later); name one of them, or a run's folder"),
        (["--plot", "x.doc"], 2, "--plot x.doc: the name must end in one of .png, .svg, .pdf"),
        (["later", "--plot", "x.png"], 1, "no run has metrics to draw; let one do a step"),
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
    lines = Run(folder / "first").curve()
    assert [(each["step"], each["loss"]) for each in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert places(lines, "tokens") == [100, 200, 300]
    assert places(lines, "step") == [1, 2, 3]
    timed = [each | {"seconds": seconds} for each, seconds in zip(lines, (36, 72, 0), strict=True)]
    assert places(timed, "hours") == pytest.approx([0.01, 0.03, 0.03])


def test_a_mean_whose_weights_halve_every_twenty_steps() -> None:
    means = smooth([math.nan, 4.0, *[math.nan] * 20, 1.0])
    assert math.isnan(means[0])
    assert means[1:22] == pytest.approx([4.0] * 21)
    # 21 steps on, 4 weighs k = 2 ** (-21 / 20), and 1 weighs 1.
    k = 2 ** (-21 / 20)
    assert means[22] == pytest.approx((4 * k + 1) / (k + 1))


GOOD = json.dumps({"step": 1, "loss": 1.0}) + "\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "[" * 100_000, "run.json: cannot be read"),
        ("run.json", "[]", "run.json: is not a JSON object"),
        ("run.json", "{}", "run.json: date is damaged"),
        ("run.json", '{"date": 5}', "run.json: date is damaged"),
        ("recipe.json", '{"steps": ' + "9" * 5000 + "}", "recipe.json: cannot be read"),
        ("metrics.jsonl", GOOD + "5\n", "metrics.jsonl:2: is not a JSON object"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl:1: does not have a step"),
        ("metrics.jsonl", '{"step": "a"}\n', "metrics.jsonl:1: does not have a step"),
        ("metrics.jsonl", '{"step": 1, "loss": "a"}\n', "metrics.jsonl:1: loss is not a number"),
        ("metrics.jsonl", '{"step": 1, "mfu": true}\n', "metrics.jsonl:1: mfu is not a number"),
        ("metrics.jsonl", '{"step": 1, "tokens": ' + "9" * 4000 + "}\n", "metrics.jsonl:1: tokens is not a number"),
        ("metrics.jsonl", None, "metrics.jsonl: is not a regular file"),
    ],
)
def test_a_run_that_is_damaged(
    file: str, text: str | None, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "first" / file
    path.unlink()
    if text is None:
        os.mkfifo(path)
    else:
        path.write_text(text)
    code, out, error = typed(capsys, "runs", "first", "--runs", folder)
    assert (code, out.count("\n"), error.count("\n"), message in error) == (0, 2, 1, True)
    assert out.splitlines()[1].split()[0] == "first"
    assert "- " in out.splitlines()[1]
    code, out, error = typed(capsys, "runs", "--runs", folder)
    assert (code, out.count("\n"), error.count("\n"), message in error) == (0, 3, 1, True)
    assert any(row.startswith("later ") and row.endswith(" 2026-02-01T00:00:00+00:00") for row in out.splitlines())


def odd(folder: Path, kind: str) -> None:
    """Make a run odd."""
    match kind:
        case "NUL bytes":
            (folder / "run.json").write_bytes(bytes(1000))
        case "half a record":
            text = (folder / "run.json").read_bytes()
            (folder / "run.json").write_bytes(text[: len(text) // 2])
        case "deep recipe":
            (folder / "recipe.json").write_text('{"a":' * 100_000)
        case "no recipe":
            (folder / "recipe.json").unlink()
        case "link to itself":
            (folder / "run.json").unlink()
            (folder / "run.json").symlink_to("run.json")
        case "link to nothing":
            (folder / "run.json").unlink()
            (folder / "run.json").symlink_to("nothing")
        case "FIFO":
            (folder / "run.json").unlink()
            os.mkfifo(folder / "run.json")
        case "folder":
            (folder / "metrics.jsonl").unlink()
            (folder / "metrics.jsonl").mkdir()
        case "absurd size":
            (folder / "run.json").write_text('{"date": "2026", "parameters": ' + "9" * 4000 + "}")
        case "long date":
            (folder / "run.json").write_text(json.dumps({"date": "2" * 10_000}))
        case "long line":
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "note": "x" * 100_000}) + "\n")
        case "absurd loss":
            (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1e300}\n')
        case "absurd source":
            (folder / "metrics.jsonl").write_text('{"step": 1, "sources": {"a": [1]}}\n')


ODD = [case.split('"')[1] for case in inspect.getsource(odd).splitlines() if case.lstrip().startswith("case ")]


def test_odd_folders_hide_no_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ODD:
        odd(made(folder, kind, "2026-01-05", [line(1, 1.0)]).folder, kind)
    (folder / "around").symlink_to(folder)
    (folder / "circle").symlink_to("circle")
    (folder / "a file").write_text("x")
    made(folder, "two\nlines\x1b[2J", "2026-01-06", [line(1, 1.0)])
    made(folder, os.fsdecode(b"no UTF-8 \xff"), "2026-01-07", [line(1, 1.0)])
    made(folder, r"a $\formula$", "2026-01-07", [line(1, 1.0)])
    made(folder, "huge", "2026-01-08", [line(10**20, 1e50, tokens=10**90, validation=800.0)])
    (folder / "huge" / "recipe.json").write_text('{"steps": ' + "9" * 4000 + "}")
    code, out, error = typed(capsys, "runs", "--runs", folder)
    assert code == 0
    assert error.count("\n") == len(ODD)
    assert all(f"{folder / kind}/" in error for kind in ODD)
    rows = {row[: len("link to nothing")].strip(): row for row in out.splitlines()[1:]}
    assert {*ODD, "first", "later", "two lines␛[2J"} < rows.keys()
    assert out.count("\n") == 1 + len(ODD) + 2 + 4
    assert " -/4 " in rows["folder"]
    assert "  1e+20/-" in rows["huge"]
    assert " 1.01e+304 " in rows["huge"]  # e^700
    assert max(map(len, out.splitlines())) < 250
    code, out, _ = typed(capsys, "runs", "--runs", folder, "--json")
    damaged = {row["name"]: row["damage"] for row in json.loads(out)["runs"] if row["damage"]}
    assert set(damaged) == set(ODD)
    code, out, error = typed(capsys, "runs", "--runs", folder, "--plot", folder / "curves.svg")
    assert code == 0, error


def test_a_run_is_named_by_what_no_path_may_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = typed(capsys, "runs", "a\0b", "--runs", folder)
    assert (code, "is not a run of" in error, error.count("\n")) == (1, True, 1)


def test_a_run_with_little_to_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "later" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": NaN, "validation": 1e99}\n')
    (folder / "later" / "run.json").write_text(json.dumps({"date": "2027\x1b]0;x\x07\n\u202e"}))
    code, out, _ = typed(capsys, "runs", "--runs", folder)
    assert code == 0
    assert out.splitlines()[-1].split()[0] == "later"
    assert out.endswith("2027␛]0;x␇ <U+202E>\n")


def test_states_are_named_by_steps(tmp_path: Path) -> None:
    from llama2.records import MODEL, newest

    for name in ("step-x9", "step-²", "step-1-9", "step-" + "9" * 30, "step-00000002", "step-00000010"):
        (tmp_path / "states" / name / "model").mkdir(parents=True)
    assert newest(tmp_path, MODEL) == tmp_path / "states" / "step-00000010" / "model"


def test_a_commit_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nprintf '\\377abc\\n'\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert commit(tmp_path) == "\ufffdabc"


def test_a_card_has_the_perplexity_of_every_loss(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    run.log(step=1, loss=0.0, tokens=8, validation=math.log(20))
    card.write(run)
    text = (run.folder / card.CARD).read_text()
    assert "| training, the last 1 steps | 0 | 1 |" in text
    assert "| validation | 2.996 | 20 |" in text
