"""transformers' LlamaForCausalLM with the weights of a checkpoint of ours, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llama2.checkpoint import Checkpoint
from llama2.config import ModelConfig

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


_BIASES = {"attention": "attention.", "mlp": "feed_forward."}


def rotate_half_order(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of wq or wk, or of their biases, from Meta's order, pairs side by side, to Hugging Face's, halves."""
    return weight.reshape(heads, len(weight) // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def their_names(c: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each tensor, by Meta's."""
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
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}


def their_order(c: ModelConfig, name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of the tensor that Meta calls `name` as Hugging Face orders them."""
    if name.split(".")[-2] in ("wq", "wk"):
        return rotate_half_order(weight, c.n_heads if ".wq." in name else c.n_kv_heads)
    return weight


def transformers_model(model: Checkpoint) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    c = model.config
    scaling = c.rope_scaling
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if scaling and scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        rope |= {name: getattr(scaling, name) for name in names}
        rope["original_max_position_embeddings"] = scaling.original_context
    context = scaling.original_context if scaling and scaling.kind == "dynamic" else c.context_length
    shape: dict[str, Any] = {
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.hidden_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": context,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": c.tied_embeddings,
        "attn_implementation": "eager",
        "dtype": "float32",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "uniform_"):  # the weights of a default model take seconds to draw, and are replaced
            patch.setattr(torch.Tensor, name, lambda weight, *_, **__: weight)
        if c.sliding_window:
            network = MistralForCausalLM(MistralConfig(**shape, sliding_window=c.sliding_window))
        else:
            biases = {f"{key}_bias": any(part in name for name in c.biases) for key, part in _BIASES.items()}
            network = LlamaForCausalLM(LlamaConfig(**shape, **biases))
    names, state = their_names(c), dict[str, torch.Tensor]()
    for name, tensor in model.tensors.items():
        weight = their_order(c, name, tensor.dequantize())
        state[names[name]] = torch.from_numpy(np.ascontiguousarray(weight))
    if c.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    absent = network.load_state_dict(state, strict=False)
    assert not absent.unexpected_keys
    assert all(name.endswith("o_proj.bias") for name in absent.missing_keys)
    for name in absent.missing_keys:
        torch.nn.init.zeros_(network.get_parameter(name))
    return network.eval()


def theirs(network: LlamaForCausalLM, tokens: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = network(torch.tensor([tokens])).logits[0].numpy()
    return logits
