"""The NumPy runner against transformers' LlamaForCausalLM in float32, on the same dequantised weights."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llama2 import checkpoint
from llama2.config import ModelConfig, RopeScaling
from llama2.engine.runner import Batch
from llama2.engine.runner_numpy import NumpyRunner
from models import tiny_config, write_tiny_gguf
from oracle_transformers import theirs, transformers_model


def forward(runner: NumpyRunner, parts: list[tuple[list[int], int, list[int]]]) -> NDArray[np.float32]:
    """Logits of every token of `parts`: a sequence's new tokens, how many came before, and its blocks."""
    tokens = [token for new, _, _ in parts for token in new]
    positions = [start + i for new, start, _ in parts for i in range(len(new))]
    sequences = [s for s, (new, _, _) in enumerate(parts) for _ in new]
    width = max(len(blocks) for _, _, blocks in parts)
    table = [blocks + [-1] * (width - len(blocks)) for _, _, blocks in parts]
    arrays = (np.array(a, np.int32) for a in (tokens, positions, sequences, table, range(len(tokens))))
    return runner.forward(Batch(*arrays))


def test_two_hundred_greedy_tokens_of_the_default_model_and_their_logits(model_path: Path) -> None:
    """Each token is the argmax of transformers' logits after those before it, so its greedy answer is the same."""
    with checkpoint.open(model_path) as model:
        prompt = model.tokenizer.encode("The history of the alphabet begins in ancient Egypt, where")
        runner, network = NumpyRunner(model, n_blocks=8), transformers_model(model)
    blocks = [5, 0, 7, 2, 1, 6, 3, 4]
    tokens, logits = list(prompt), [forward(runner, [(prompt, 0, blocks)])]
    for _ in range(200):
        tokens.append(int(logits[-1][-1].argmax()))
        logits.append(forward(runner, [(tokens[-1:], len(tokens) - 1, blocks)]))
    expected = theirs(network, tokens)
    assert np.abs(np.concatenate(logits) - expected).max() <= 1e-3
    assert tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(axis=1).tolist()


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(n_kv_heads=4, tied_embeddings=True, norm_eps=1e-2),
        tiny_config(n_kv_heads=1, head_dim=24, rope_theta=1e6),
        tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
    ],
)
def test_tiny_models_in_batches_of_chunks(config: ModelConfig, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", config=config)
    with checkpoint.open(tmp_path / "tiny.gguf") as model:
        runner, network = NumpyRunner(model, n_blocks=16), transformers_model(model)
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, config.vocab_size, 70).tolist(), rng.integers(0, config.vocab_size, 40).tolist()
    blocks_a, blocks_b = [9, 3, 12], [1, 15]
    first = forward(runner, [(a[:33], 0, blocks_a), (b[:1], 0, blocks_b)])
    second = forward(runner, [(b[1:], 1, blocks_b), (a[33:], 33, blocks_a)])
    np.testing.assert_allclose(np.concatenate([first[:33], second[39:]]), theirs(network, a), rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.concatenate([first[33:], second[:39]]), theirs(network, b), rtol=0, atol=2e-5)
