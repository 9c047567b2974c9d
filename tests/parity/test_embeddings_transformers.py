"""Embeddings against transformers' hidden states on the same dequantized weights; and the same bits in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import llama2
from llama2 import checkpoint
from llama2.config import BIASED
from llama2.engine.embedding import normalised
from llama2.engine.request import Pooling
from models import tiny_config, write_tiny_gguf
from oracle_transformers import transformers_model

Floats = NDArray[np.float32]
TEXTS = ["The cat sat on the mat.", "Rain is expected tomorrow, and the wind will turn.", "a"]


def theirs(network: Any, tokens: list[int], pooling: str) -> Floats:
    """Pooled from the last hidden states that transformers names so, which are those after the final norm."""
    import torch

    with torch.inference_mode():
        states = network(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].numpy()
    vector: Floats = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector


@pytest.mark.parametrize("pooling", get_args(Pooling))
@pytest.mark.parametrize("runner", ["native", "numpy", "torch"])
@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(n_kv_heads=4, tied_embeddings=True), tiny_config(biases=BIASED)]
)
def test_tiny_models(config: Any, runner: Any, pooling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA2_ISA", "plain")  # the best of some machines attends in bfloat16
    write_tiny_gguf(tmp_path / "tiny.gguf", config=config)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, config.vocab_size, length).tolist() for length in (1, 40, 7, 200)]
    with llama2.load(tmp_path / "tiny.gguf", runner=runner) as model:
        network = transformers_model(model.checkpoint)
        raw = model.embed(prompts, pooling=pooling, normalise=False)
        unit = model.embed(prompts, pooling=pooling)
    expected = np.stack([theirs(network, prompt, pooling) for prompt in prompts])
    tolerance = 5e-3 if runner == "native" else 1e-4  # its cache has 16-bit numbers; states are about 1 large
    np.testing.assert_allclose(raw, expected, rtol=0, atol=tolerance)
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected / lengths, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def network(model_path: Path) -> Any:
    with checkpoint.open(model_path) as opened:
        return transformers_model(opened)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_the_default_model(pooling: Any, model_path: Path, network: Any) -> None:
    for runner, tolerance in (("numpy", 1e-3), ("native", 8e-3)):  # which also rounds activations to 8 bits
        with llama2.load(model_path, runner=runner) as model:  # type: ignore[arg-type]
            found = model.embed(TEXTS, pooling=pooling)
            expected = np.stack([normalised(theirs(network, model.encode(text), pooling)) for text in TEXTS])
        assert np.abs(found - expected).max() <= tolerance, runner
        assert (found * expected).sum(axis=1).min() >= 0.9995, runner


@pytest.mark.parametrize("format", ["F32", "Q4_1", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_the_same_bits_in_any_company_and_on_any_threads(format: str, pooling: Any, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(format), format=format, tokenizer="bpe")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 300, length).tolist() for length in (200, 1, 33, 64, 7, 90)]
    with llama2.load(tmp_path / "tiny.gguf", threads=1) as model:
        expected = np.concatenate([model.embed([prompt], pooling=pooling) for prompt in prompts])
    for threads in (1, 2):
        with llama2.load(tmp_path / "tiny.gguf", threads=threads, sequences=4) as model:
            for order in (range(len(prompts)), [5, 1, 3, 0, 4, 2]):
                found = model.embed([prompts[i] for i in order], pooling=pooling)
                np.testing.assert_array_equal(found.view(np.uint32), expected[list(order)].view(np.uint32))
