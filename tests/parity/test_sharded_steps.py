"""Training in several processes is training in one: losses and gradients of 20 steps, through gloo.

Gradients and their norms are compared, because AdamW does not notice that they all are twice too large.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steps import STEPS, WAYS, network, train

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    found = {name: train(name) for name in ("one process", "one process, tied", "one process, LoRA")}
    for weight, value in network().named_parameters():
        assert torch.equal(found["one process"]["weights"][weight], value)
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one(processes: int, single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    names = [name for name, (data, tensor, _) in WAYS.items() if data * tensor == processes]
    subprocess.run(
        [sys.executable, str(TESTS / "steps.py"), str(processes), str(tmp_path), *names],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
    )
    for name in names:
        found = torch.load(tmp_path / f"{name}.pt")
        kind = next((kind for kind in ("tied", "LoRA") if kind in name), None)
        expected = single[f"one process, {kind}" if kind else "one process"]
        rounded = "bfloat16" in name
        for weight, value in expected["weights"].items():
            assert torch.equal(found["weights"][weight], value.to(found["weights"][weight].dtype)), (name, weight)
        for what in ("before", "losses", "norms"):
            assert found[what] == pytest.approx(expected[what], rel=2e-2 if rounded else 1e-5), (name, what)
        assert len(found["gradients"]) == STEPS
        for mine, truth in zip(found["gradients"], expected["gradients"], strict=True):
            assert mine.keys() == truth.keys()
            for weight, gradient in mine.items():
                error = (gradient - truth[weight]).norm() / truth[weight].norm()
                assert error <= (0.1 if rounded else 1e-4), (name, weight)
