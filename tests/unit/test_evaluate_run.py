"""A run of evaluate: the same bytes however it runs, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest

import llama2
from commands import typed
from evaluations import QUESTIONS, arc_task, tiny_model, write_rows
from llama2 import api
from llama2.errors import EvaluationError, RunError
from llama2.evaluate import metrics
from llama2.evaluate.run import EvaluationSettings, evaluate
from llama2.evaluate.task import FOLDER, EvaluationTask, load


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


def _evaluate_until_killed(path: Path, task: EvaluationTask, data: Path, folder: Path) -> None:
    calls = count()

    def kill(what: str, done: int, total: int) -> None:
        if what == "tokens" and next(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    with api.load(path, threads=1) as model:
        evaluate(model, [task], folder, EvaluationSettings(data=data, in_flight=2), progress=kill)


def test_a_killed_run_goes_on_to_the_same_bytes(model: api.Model, data: Path, tmp_path: Path) -> None:
    """A real process is killed after 20 answers, and another one is left half written."""
    rows = [{**row, "query": f"{row['query']} {n}"} for n in range(6) for row in QUESTIONS]
    write_rows(data / "many.jsonl", rows)
    task = arc_task("many", files={"many.jsonl": ""}, shots=1)
    answers = tmp_path / "run" / "answers.jsonl"
    arguments = (model.checkpoint.path, task, data, tmp_path / "run")
    child = get_context("fork").Process(target=_evaluate_until_killed, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with answers.open("ab") as file:
        file.write(b'{"key": "cut off')
    before = answers.stat().st_size
    settings = EvaluationSettings(data=data, in_flight=3)
    asked: list[tuple[str, int]] = []
    evaluate(
        model,
        [task],
        tmp_path / "run",
        settings,
        resume=True,
        progress=lambda what, done, _: asked.append((what, done)),
    )
    whole = evaluate(model, [task], tmp_path / "whole", settings)
    assert next(done for what, done in asked if what == "tokens") > 0
    assert before < answers.stat().st_size
    for name in ("answers.jsonl", "samples/many.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "run" / "record.json").read_text())["tasks"] == whole["tasks"]


def test_what_a_run_records(model: api.Model, data: Path, tmp_path: Path) -> None:
    record = evaluate(model, [arc_task()], tmp_path / "run", EvaluationSettings(data=data, limit=3, seed=5))
    task = record["tasks"]["mine"]
    samples = [json.loads(line) for line in (tmp_path / "run/samples/mine.jsonl").read_text().splitlines()]
    assert record["weights"] == sha256(model.checkpoint.path.read_bytes()).hexdigest()
    assert task["files"] == {"mine.jsonl": sha256((data / "mine.jsonl").read_bytes()).hexdigest()}
    assert (task["rows"], task["n"], task["shots"], task["refused"], task["cut"]) == (4, 3, 0, 0, 0)
    prompts = [sha256(f"{QUESTIONS[int(sample['id'])]['query']}\nAnswer:".encode()).hexdigest() for sample in samples]
    assert [sample["prompt"] for sample in samples] == prompts
    scores = [sample["values"]["acc_norm"] for sample in samples]
    assert task["metrics"]["acc_norm"]["value"] == sum(scores) / 3
    for sample in samples:  # the score follows from the sample
        norms = [each["logprob"] / (len(each["text"]) - 1) for each in sample["continuations"]]
        assert sample["values"]["acc_norm"] == float(norms.index(max(norms)) == QUESTIONS[int(sample["id"])]["gold"])


def test_answers_that_their_limit_cuts_are_counted(
    model: api.Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "short", lambda text, row: {"exact_match": len(text) < 3}, raising=False)
    changes = {"output": "generate_until", "scorer": "short", "metric": "exact_match", "normalisation": "none"}
    task = arc_task(choices="", target="{{answerKey}}", max_tokens=2, shots=1, **changes)
    record = evaluate(model, [task], tmp_path / "run", EvaluationSettings(data=data))["tasks"]["mine"]
    samples = [json.loads(line) for line in (tmp_path / "run/samples/mine.jsonl").read_text().splitlines()]
    assert record["cut"] == sum(sample["finish"] == ["length"] for sample in samples) > 0
    assert all(len(sample["answers"]) == 1 and sample["tokens"][0] <= 2 for sample in samples)


def test_items_that_do_not_fit_are_counted(model: api.Model, tmp_path: Path) -> None:
    long = {**QUESTIONS[0], "query": f"Question: {'x' * 300}"}
    write_rows(tmp_path / "mine.jsonl", [*QUESTIONS, long])
    record = evaluate(model, [arc_task()], tmp_path / "run", EvaluationSettings(data=tmp_path))["tasks"]["mine"]
    assert (record["n"], record["refused"]) == (4, 1)
    sample = json.loads((tmp_path / "run/samples/mine.jsonl").read_text().splitlines()[-1])
    assert sample["refused"].endswith("tokens, and the context is 256")
    write_rows(tmp_path / "mine.jsonl", [long])
    record = evaluate(model, [arc_task()], tmp_path / "other", EvaluationSettings(data=tmp_path))["tasks"]["mine"]
    assert record["not_run"] == "none of 1 items fits the context"


def test_another_run_is_not_continued(model: api.Model, data: Path, tmp_path: Path) -> None:
    evaluate(model, [arc_task()], tmp_path, EvaluationSettings(data=data))
    with pytest.raises(RunError, match="holds a run already"):
        evaluate(model, [arc_task()], tmp_path, EvaluationSettings(data=data))
    for task, settings, message in (
        (arc_task(), EvaluationSettings(data=data, limit=3), "cannot go on with other limit: it was None and is 3"),
        (arc_task(version=2), EvaluationSettings(data=data), "cannot go on with other tasks"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate(model, [task], tmp_path, settings, resume=True)
    with (
        llama2.load(model.checkpoint.path, runner="numpy") as other,
        pytest.raises(EvaluationError, match=r"other arithmetic: it was native, .+ and is numpy, float32;"),
    ):
        evaluate(other, [arc_task()], tmp_path, EvaluationSettings(data=data), resume=True)


@pytest.mark.parametrize(
    ("isa", "words", "cache_type"),
    [(None, (), "float16"), ("plain", (), "auto"), (None, ("--runner", "numpy"), "auto")],
)
def test_the_command_caches_in_float16_unless_the_instruction_set_is_given(
    isa: str | None,
    words: tuple[str, ...],
    cache_type: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def load(name: str, runtime: llama2.Runtime, **_: object) -> None:
        asked.append(runtime.cache_type)
        raise EvaluationError("enough")

    monkeypatch.setattr("llama2.api.load", load)
    monkeypatch.delenv("LLAMA2_ISA", raising=False)
    if isa:
        monkeypatch.setenv("LLAMA2_ISA", isa)
    found, _, error = typed(capsys, "evaluate", "some", "--tasks", "arc_easy", "--data", data, *words)
    assert (found, error, asked) == (1, "llama2: error: enough\n", [cache_type])


BAD = [
    (["--tasks", "arc_eazy"], 1, "arc_eazy: unknown task; did you mean arc_easy?"),
    (["--tasks", "arc_easy", "--data", "DATA/nowhere"], 2, "DATA/nowhere: is not a folder"),
    (["--tasks", "arc_easy", "--limit", "0"], 2, "Invalid value for '--limit': 0 is not in the range"),
    (["--tasks", "arc_easy"], 1, "DATA/arc/arc_easy.jsonl: has SHA-256 "),
    (["--tasks", "DATA/lacking.toml"], 1, "DATA/lacking.jsonl:2: the field 'gold' is missing"),
    (["--tasks", "arc_easy@poem"], 1, "arc_easy: does not have the format poem; it has qa, bare"),
    ([], 2, "give either --suite or --tasks"),
]


@pytest.mark.parametrize(("words", "status", "message"), BAD, ids=lambda each: str(each)[:20])
def test_bad_input(
    words: list[str], status: int, message: str, model: api.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what, where and what to do."""
    write_rows(tmp_path / "arc/arc_easy.jsonl", QUESTIONS)
    write_rows(tmp_path / "lacking.jsonl", [QUESTIONS[0], {"query": "Question: Why?", "choices": ["a", "b"]}])
    text = (FOLDER / "arc_easy.toml").read_text()
    (tmp_path / "lacking.toml").write_text(re.sub(r'"arc/.*', '"lacking.jsonl" = ""', text))
    words = [word.replace("DATA", str(tmp_path)) for word in words]
    options = [] if "--data" in words else ["--data", tmp_path]
    found, out, error = typed(capsys, "evaluate", model.checkpoint.path, *words, *options, "--out", tmp_path / "run")
    assert (found, out, error.count("\n")) == (status, "", 1)
    assert message.replace("DATA", str(tmp_path)) in error
    assert not (tmp_path / "run").exists()


def test_without_its_files_a_task_is_not_run(model: api.Model, tmp_path: Path) -> None:
    record = evaluate(model, [load("siqa")], tmp_path / "run", EvaluationSettings(data=tmp_path))
    assert record["tasks"]["siqa"]["not_run"] == "siqa/dev.jsonl is not in the data folder"
    assert record["groups"]["commonsense"]["mean"] is None


def test_without_the_harness(model: api.Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "llama2.evaluate.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("llama2.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"not installed; `pip install 'whole-llama\[evaluate\]'` brings it"):
        evaluate(model, [arc_task()], tmp_path, EvaluationSettings(data=data))
    assert not (tmp_path / "run.json").exists()
