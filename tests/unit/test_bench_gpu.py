"""bench/gpu.py where there is no GPU: what it says, and that both sides of each comparison have the same weights."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("resource", reason="bench/ measures on POSIX systems")
BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu")


def test_without_a_gpu_it_says_what_it_would_measure(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("here is a GPU")
    command = [sys.executable, BENCH / "gpu.py", "-o", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6.7 billion" in done.stdout
    assert not (tmp_path / "gpu.json").exists()


def test_a_part_that_is_stopped_keeps_its_figures(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nprint('{\"rate\": 2}', flush=True)\nprint('{\"cut', end='', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(gpu, "__file__", str(slow))
    part = gpu.run_part("inference", 1.0, dry=True)
    assert (part["status"], part["figures"]) == ("stopped after 1 s", [{"rate": 2}])


def test_a_part_that_fails_has_its_last_words(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("raise SystemExit('no memory')")
    monkeypatch.setattr(gpu, "__file__", str(bad))
    part = gpu.run_part("training", 60.0, dry=True)
    assert (part["status"], part["errors"].strip()) == ("exit code 1", "no memory")


def test_both_sides_have_the_same_weights(gpu: ModuleType) -> None:
    """In float32, transformers' logits are ours; and so are the tokens that its `generate` writes."""
    torch.manual_seed(0)
    what = replace(gpu.DRY, config=replace(gpu.DRY.config, n_kv_heads=2))
    model = gpu.network(what)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    found = gpu.agreement(model.float(), gpu.in_transformers(model))
    assert found["same first token"] == 1
    assert found["largest difference of the largest logit"] < 1e-4


def test_rates_count_the_tokens_after_the_third(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token each 10 ms from the third on: of two sequences, 200 tokens a second."""
    model = gpu.in_transformers(gpu.network(gpu.DRY))
    ticks = iter([0.0, 5.0, *(9 + 0.01 * i for i in range(100))])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks))
    for static in (False, True):
        ticks = iter([0.0, 5.0, *(9 + 0.01 * i for i in range(100))])
        assert gpu.generated(gpu.DRY, model, 2, static=static) == pytest.approx(200)


def test_the_table_has_medians_of_turns_after_the_first(gpu: ModuleType) -> None:
    figures = [{"training": "llama2", "turn": turn, "rate": rate} for turn, rate in enumerate((1.0, 30.0, 10.0, 20.0))]
    figures += [{"workload": "decode 1", "medians": {"llama2": 5.0}, "failed": {"transformers": "OutOfMemoryError"}}]
    record = {"parts": {"training": {"status": "done", "seconds": 3.0, "figures": figures}}}
    lines = list(gpu.table(json.loads(json.dumps(record))))
    assert lines[0] == "training: done, 3 s"
    assert [line.split()[-2:] for line in lines if "tokens/s" in line] == [["5.0", "tokens/s"], ["20.0", "tokens/s"]]
    assert "    transformers: OutOfMemoryError" in lines
