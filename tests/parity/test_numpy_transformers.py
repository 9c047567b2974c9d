"""The NumPy runner against transformers' LlamaForCausalLM in float32, on the same dequantized weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import llama2
from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.config import BIASED, ModelConfig, RopeScaling
from llama2.engine.runner import Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.engine.runner_torch import TorchRunner
from models import tiny_config, write_tiny_gguf
from oracle_transformers import theirs, transformers_model


def forward(runner: Runner, parts: list[tuple[list[int], int, list[int]]]) -> NDArray[np.float32]:
    """Logits of every token of `parts`: a sequence's new tokens, how many came before, and its blocks."""
    tokens = [token for new, _, _ in parts for token in new]
    positions = [start + i for new, start, _ in parts for i in range(len(new))]
    sequences = [s for s, (new, _, _) in enumerate(parts) for _ in new]
    width = max(len(blocks) for _, _, blocks in parts)
    table = [blocks + [-1] * (width - len(blocks)) for _, _, blocks in parts]
    arrays = (np.array(a, np.int32) for a in (tokens, positions, sequences, table, range(len(tokens))))
    return runner.forward(Batch(*arrays))


def test_two_hundred_greedy_tokens_of_the_default_model_and_their_logits(model_path: Path) -> None:
    """Each token is the argmax of transformers' logits after those before it, so its greedy answer is the same.

    The native runner guesses what follows, and NumPy takes from that what is its own argmax: ten steps for 200 tokens.
    """
    with checkpoint.open(model_path) as model:
        prompt = model.tokenizer.encode("The history of the alphabet begins in ancient Egypt, where")
        runner, network = NumpyRunner(model, n_blocks=8), transformers_model(model)
    blocks = [5, 0, 7, 2, 1, 6, 3, 4]
    tokens, logits = list(prompt), forward(runner, [(prompt, 0, blocks)])
    with llama2.load(model_path) as native:
        while len(tokens) < len(prompt) + 200:
            count, guess = min(32, len(prompt) + 199 - len(tokens)), [int(logits[-1].argmax())]
            if count and len(tokens) > len(prompt) + 8:  # the first ones by themselves
                guess += native.generate([*tokens, *guess], temperature=0, max_tokens=count).token_ids
            found = forward(runner, [(guess, len(tokens), blocks)])
            right = 1 + next((i for i, row in enumerate(found[:-1]) if row.argmax() != guess[i + 1]), len(guess) - 1)
            tokens, logits = tokens + guess[:right], np.concatenate([logits, found[:right]])
    assert len(tokens) == len(prompt) + 200
    expected = theirs(network, tokens)
    assert np.abs(logits - expected).max() <= 1e-3
    assert tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(axis=1).tolist()


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(n_kv_heads=4, tied_embeddings=True, norm_eps=1e-2),
        tiny_config(n_kv_heads=1, head_dim=24, rope_theta=1e6),
        tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
        tiny_config(biases=BIASED),
        tiny_config(sliding_window=20),
        tiny_config(rope_scaling=RopeScaling("yarn", factor=8.0, original_context=32, attention_factor=1.2)),
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


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # its new name is not known to transformers 4
@pytest.mark.parametrize("start", [NumpyRunner, NativeRunner, TorchRunner])
def test_dynamic_scaling_beyond_its_original_context(
    start: Callable[[Checkpoint, int], Runner], tmp_path: Path
) -> None:
    """However a text is cut, each token is turned as transformers turns it that decodes with a cache: by its length."""
    import torch
    from transformers import DynamicCache

    scaling = RopeScaling("dynamic", factor=4.0, original_context=40)
    write_tiny_gguf(tmp_path / "tiny.gguf", config=tiny_config(rope_theta=100.0))
    model = checkpoint.open(tmp_path / "tiny.gguf")
    model.config = replace(model.config, rope_scaling=scaling)
    network, text = transformers_model(model), np.random.default_rng(3).integers(0, 320, 90).tolist()
    cache, rows = DynamicCache(), []
    with torch.inference_mode():
        for part in (text[:33], *([token] for token in text[33:])):
            rows.append(network(torch.tensor([part]), past_key_values=cache).logits[0].numpy())
    expected = np.concatenate(rows)
    whole = forward(start(model, 3), [(text, 0, [2, 0, 1])])
    tolerance = 1e-2 if start is NativeRunner else 2e-5  # its cache has 16-bit numbers
    np.testing.assert_allclose(whole, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    runner = start(model, 3)
    chunks = [forward(runner, [(text[a:b], a, [2, 0, 1])]) for a, b in ((0, 50), (50, 51), (51, 90))]
    np.testing.assert_allclose(np.concatenate(chunks), whole, rtol=0, atol=1e-5)
