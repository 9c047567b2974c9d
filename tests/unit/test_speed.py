"""Speed of a tiny model and a clock that only the forward pass moves, by one second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import llama2
from llama2 import speed
from llama2.api import Model
from llama2.engine.runner import Batch
from llama2.errors import ContextError, EngineError
from models import tiny_config, write_tiny_gguf

CONTEXT = 256


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(context_length=CONTEXT))
    with llama2.load(tmp_path / "tiny.gguf", runner="numpy", sequences=8) as model:
        yield model


@pytest.fixture
def steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the model was run on since the last look, a second each."""
    ran: list[Batch] = []
    seconds = 0.0
    forward = model.engine.runner.forward

    def timed(batch: Batch, hidden: None) -> NDArray[np.float32]:
        nonlocal seconds
        ran.append(Batch(*(getattr(batch, name).copy() for name in Batch.__slots__)))
        seconds += 1
        return forward(batch)

    monkeypatch.setattr(model.engine.runner, "forward", timed)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: seconds)
    return ran


def prefill(model: Model, **work: int) -> float:
    return speed.prefill(model.checkpoint, model.engine, speed.Workload(**work))


def decode(model: Model, **work: int) -> float:
    return speed.decode(model.checkpoint, model.engine, speed.Workload(**work))


def test_prefill_reads_every_prompt(model: Model, steps: list[Batch]) -> None:
    # 8 prompts of 100 tokens in steps of 512 tokens: the sixth is cut after 12, two seconds in all.
    assert prefill(model, prompt=100, generate=1, batch=8) == 8 * 100 / 2
    assert [len(step.tokens) for step in steps] == [512, 288]
    assert sum(len(step.outputs) for step in steps) == 8
    first, second = (steps[0].tokens[:100], steps[0].tokens[100:200])
    assert (first != second).all()
    assert not model.engine.busy


@pytest.mark.parametrize(("batch", "depth"), [(1, 1), (8, 1), (3, 40)])
def test_decode_counts_whole_steps(batch: int, depth: int, model: Model, steps: list[Batch]) -> None:
    assert decode(model, prompt=1, generate=5, depth=depth, batch=batch) == batch
    assert [len(step.tokens) for step in steps] == [batch * depth] + 5 * [batch]
    assert [step.positions[-1] for step in steps] == list(range(depth - 1, depth + 5))
    assert not model.engine.busy


def test_decode_waits_for_the_last_sequence_to_begin(model: Model, steps: list[Batch]) -> None:
    # 8 prompts of 120 tokens: 512 = 4 * 120 + 32; then 4 answers and 480 - 32 = 448 tokens are left, which fit.
    assert decode(model, prompt=1, generate=3, depth=120, batch=8) == 8
    assert [len(step.tokens) for step in steps] == [512, 4 + 448, 8, 8, 8]


@pytest.mark.parametrize(("depth", "generate"), [(1, CONTEXT - 1 - 1), (200, CONTEXT - 200 - 4)])
def test_decode_ends_at_the_context(depth: int, generate: int, model: Model) -> None:
    # Eight prompts of 200 tokens take four steps of 512; at the end of them the first answers have four tokens.
    assert decode(model, prompt=1, generate=generate, depth=depth, batch=8) > 0
    with pytest.raises(ContextError, match=f"--depth {depth} and --generate {generate + 1} .* context of 256"):
        decode(model, prompt=1, generate=generate + 1, depth=depth, batch=8)


def test_a_failed_step_is_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Batch, hidden: None) -> NDArray[np.float32]:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(model.engine.runner, "forward", fails)
    for measure in (prefill, decode):
        with pytest.raises(EngineError, match="by hand"):
            measure(model, prompt=1, generate=1)
