"""Logits of merged adapters beside transformers, whose weights NumPy has added B A to, under their own names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import LINEAR, Arrays, merged, random_parts, write_adapter
from llama2 import checkpoint
from llama2.checkpoint import hf_folder
from llama2.engine.runner import Batch
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.runner_torch import TorchRunner
from models import tiny_config, write_tiny_gguf
from oracle_transformers import theirs, transformers_model

TOKENS = np.random.default_rng(0).integers(3, 320, 40).tolist()

#: How far logits may be off, as a share of the largest one, by what the base's matrices become.
BOUNDS = {"F32": 1e-5, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 4e-2}


@pytest.mark.parametrize(
    ("format", "folder"),
    [("F32", False), ("Q4_0", False), ("Q4_K", False), ("F32", True), ("F16", True), ("BF16", True)],
    ids=lambda value: value if isinstance(value, str) else "folder" if value else "gguf",
)
def test_logits(format: str, folder: bool, tmp_path: Path) -> None:
    """Grouped queries; adapters of two ranks and scales at once."""
    path = tmp_path / "base.gguf"
    write_tiny_gguf(path, format=format, config=tiny_config(format))
    base = checkpoint.open(path)
    if folder:
        path = tmp_path / "base"
        hf_folder.write(base, path)
    network = transformers_model(base)
    weights: Arrays = {name: value.numpy() for name, value in network.state_dict().items()}
    first = random_parts(weights, LINEAR, rank=4)
    second = random_parts(weights, ["q_proj", "k_proj", "lm_head"], rank=2, seed=2)
    changed = merged(merged(weights, first, 0.5 * 1 / 4), second, 1 / np.sqrt(2))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in changed.items()})
    expected = theirs(network, TOKENS)
    adapters = [
        (write_adapter(tmp_path / "first", first, r=4, lora_alpha=1), 0.5),
        (write_adapter(tmp_path / "second", second, r=2, lora_alpha=1, use_rslora=True), 1.0),
    ]
    model = checkpoint.open(path, adapters=adapters)
    became = model.tensors["layers.0.attention.wq.weight"].format
    assert became == (format if format in BOUNDS else "Q8_0")
    scale = np.abs(expected).max()
    before = np.abs(_logits(NumpyRunner(base, 4)) - expected).max()
    assert before > 10 * BOUNDS[became] * scale  # the adapters do something
    native_runner = partial(NativeRunner, isa="plain")  # the same on each machine
    for runner, own in ((NumpyRunner, 0.0), (native_runner, 5e-3), (TorchRunner, 0.0)):  # what a 16-bit cache costs
        assert np.abs(_logits(runner(model, 4)) - expected).max() <= (BOUNDS[became] + own) * scale


def _logits(runner: Any) -> np.ndarray[Any, Any]:
    n = len(TOKENS)
    arrays = (TOKENS, range(n), [0] * n, [[2, 0]], range(n))
    logits: np.ndarray[Any, Any] = runner.forward(Batch(*(np.array(array, np.int32) for array in arrays)))
    return logits
