"""The NumPy runner against transformers' LlamaForCausalLM in float32, on the same dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint
from llama2.config import ModelConfig, RopeScaling
from llama2.engine.runner import Batch
from llama2.engine.runner_numpy import NumpyRunner
from models import tiny_config, write_tiny_gguf

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


def rotate_half_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of wq or wk from Meta's order, pairs side by side, to Hugging Face's, first halves before second ones."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def transformers_model(model: Checkpoint) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    scaling = c.rope_scaling
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    config = LlamaConfig(
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.hidden_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.context_length,
        rms_norm_eps=c.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=c.tied_embeddings,
        attn_implementation="eager",
        dtype="float32",
    )
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    parts = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    for i in range(c.n_layers):
        names |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in parts.items()}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.tensors.items():
        weight = tensor.dequantize()
        if name.endswith(("wq.weight", "wk.weight")):
            weight = rotate_half_order(weight, c.n_heads if name.endswith("wq.weight") else c.n_kv_heads)
        state[names[name.removesuffix(".weight")] + ".weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    if c.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network = LlamaForCausalLM(config).eval()
    network.load_state_dict(state, strict=True)
    return network


def theirs(network: LlamaForCausalLM, tokens: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = network(torch.tensor([tokens])).logits[0].numpy()
    return logits


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
