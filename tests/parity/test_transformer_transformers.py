"""The network in PyTorch against transformers' LlamaForCausalLM, and the engine's runners against both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.config import BIASED, ModelConfig, RopeScaling
from llama2.engine.runner import Batch, Runner
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.model.transformer import ContiguousCache, Transformer
from models import tiny_config, write_tiny_gguf
from oracle_transformers import their_names, their_order, transformers_model

CONFIGS = {
    "multi-head": tiny_config(n_kv_heads=4),
    "multi-head, tied": tiny_config(n_kv_heads=4, tied_embeddings=True, norm_eps=1e-2),
    "grouped": tiny_config(),
    "grouped, tied": tiny_config(tied_embeddings=True),
    "multi-query": tiny_config(n_kv_heads=1, rope_theta=1e6),
    "odd sizes": tiny_config(dim=54, n_heads=6, n_kv_heads=3, head_dim=14, hidden_dim=77, vocab_size=321, n_layers=3),
    "linear scaling": tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
    "biases": tiny_config(biases=BIASED),
    "biases of attention, tied": tiny_config(biases=BIASED[:4], tied_embeddings=True),
    "window": tiny_config(sliding_window=9),
    "window of 1": tiny_config(sliding_window=1),
    "yarn": tiny_config(rope_scaling=RopeScaling("yarn", factor=8.0, original_context=32, attention_factor=1.2)),
    "yarn, not truncated": tiny_config(
        rope_theta=500.0,
        rope_scaling=RopeScaling(
            "yarn", factor=4.0, original_context=64, beta_fast=8.0, beta_slow=2.0, truncate=False, attention_factor=0.9
        ),
    ),
    "dynamic": tiny_config(rope_scaling=RopeScaling("dynamic", factor=4.0, original_context=45)),
    "llama3 scaling": tiny_config(rope_scaling=RopeScaling("llama3", factor=8.0, original_context=64)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path, config = tmp_path_factory.mktemp("tiny") / "tiny.gguf", CONFIGS[request.param]
    write_tiny_gguf(path, config=config)
    return replace(checkpoint.open(path), config=config)  # GGUF cannot name llama3 scaling


def tokens(config: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def test_logits_and_gradients_against_transformers(model: Checkpoint) -> None:
    ours, theirs, ids = Transformer.load(model), transformers_model(model), tokens(model.config, 2, 41)
    gradients = []
    for network, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append({name: parameter.grad.numpy() for name, parameter in network.named_parameters()})
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-5
    names, (mine, other) = their_names(model.config), gradients
    assert mine.keys() == model.config.tensor_shapes().keys()
    assert len(mine) == len(other)
    for name, gradient in mine.items():
        expected = other[names[name]]
        error = np.abs(their_order(model.config, name, gradient) - expected).max()
        assert error <= 1e-5 * np.abs(expected).max(), name


@torch.inference_mode()
def test_prefill_equals_token_by_token(model: Checkpoint) -> None:
    network, ids = Transformer.load(model), tokens(model.config, 3, 40)
    expected = network(ids)
    one, some = ContiguousCache(network, 3, 40), ContiguousCache(network, 3, 64)
    steps = torch.cat([network(ids[:, i : i + 1], one) for i in range(40)], dim=1)
    chunks = torch.cat([network(part, some) for part in ids.split([7, 1, 20, 12], dim=1)], dim=1)
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(chunks, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("start", "tolerance"), [(NumpyRunner, 1e-5), (NativeRunner, 1e-2)])
def test_runners_agree(model: Checkpoint, start: Callable[[Checkpoint, int], Runner], tolerance: float) -> None:
    """The tolerance is relative to the largest logit; the native runner keeps keys and values in 16 bits."""
    ids = tokens(model.config, 1, 60)
    with torch.inference_mode():
        expected = Transformer.load(model)(ids)[0].numpy()
    arrays = (ids[0], range(60), [0] * 60, [[2, 0]], range(60))
    logits = start(model, 3).forward(Batch(*(np.array(a, np.int32) for a in arrays)))
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("format", ["BF16", "F16", "Q8_0"])
def test_half_precision_against_transformers(format: str, tmp_path: Path) -> None:
    """The same weights in bfloat16 stay within what transformers' own bfloat16 is from its float32, times two."""
    write_tiny_gguf(tmp_path / "tiny.gguf", format=format)
    with checkpoint.open(tmp_path / "tiny.gguf") as model, torch.inference_mode():
        ids, theirs = tokens(model.config, 2, 41), transformers_model(model)
        network = Transformer.load(model, dtype=torch.bfloat16)
        exact = theirs(ids).logits
        rounded = theirs.bfloat16()(ids).logits.float()
        logits = network(ids)
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().mean() <= 2 * (rounded - exact).abs().mean()
