"""Tiny random Llama models in GGUF files, written by the `gguf` package and so independent of the code under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf import TokenType
from numpy.typing import NDArray

from llama2.config import ModelConfig

TokenizerKind = Literal["sentencepiece", "bpe"]

#: Byte positions of the float16 scales in a block, and their sizes that give weights of about ±0.1.
_K_SCALES = {
    "Q2_K": {80: 8e-3, 82: 12e-3},
    "Q3_K": {108: 2e-3},
    "Q4_K": {0: 4e-4, 2: 3e-3},
    "Q5_K": {0: 2e-4, 2: 3e-3},
    "Q6_K": {208: 8e-5},
    "IQ4_NL": {0: 1e-3},
}

#: GGUF's names of a block's tensors, and Meta's.
_BLOCK_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PAIRS = ["er", "on", "in", "at", "is", "it", "of", "to", "he", "re", "en", "al", "or", "st", "ar"]


def tiny_config(format: str = "F32", **changes: Any) -> ModelConfig:
    """A Llama with grouped-query attention whose rows fit `format`'s blocks: 64 wide, or 256 for the K formats."""
    dim = 256 if format.endswith("_K") else 64
    config = ModelConfig(
        dim=dim,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=2 * dim,
        vocab_size=320,
        head_dim=dim // 4,
        context_length=256,
    )
    return replace(config, **changes)


def random_weights(format: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """Random weights of about ±0.1 as gguf stores them; those that gguf cannot write are random blocks."""
    if scales := _K_SCALES.get(format):
        block, size = gguf.GGML_QUANT_SIZES[GGMLType[format]]
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
        for at, scale in scales.items():
            halves = (scale * rng.uniform(0.5, 1.5, blocks.shape[:-1])).astype("<f2")
            blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
        return blocks.reshape(*shape[:-1], -1)
    values = rng.normal(0, 0.1, shape).astype(np.float32)
    return gguf.quants.quantize(values, GGMLType[format])


def write_tiny_gguf(
    path: Path,
    *,
    config: ModelConfig | None = None,
    format: str = "F32",
    tokenizer: TokenizerKind = "sentencepiece",
    pre: str = "smollm",
    template: str | None = None,
    seed: int = 0,
    architecture: str = "llama",
    edit: Callable[[gguf.GGUFWriter], object] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Write a random Llama to `path`, and return its weights by Meta's names as the `gguf` package dequantises them.

    Matrices have `format`, norms are F32. `edit` may add what it likes to the writer before the file is written.
    """
    config = config or tiny_config(format)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, config)
    (_add_sentencepiece if tokenizer == "sentencepiece" else _add_bpe)(writer, config.vocab_size)
    if tokenizer == "bpe":
        writer.add_tokenizer_pre(pre)
    if template is not None:
        writer.add_chat_template(template)

    names = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight"}
    if not config.tied_embeddings:
        names["output.weight"] = "output.weight"
    for i in range(config.n_layers):
        for theirs, metas in _BLOCK_NAMES.items():
            names[f"blk.{i}.{theirs}.weight"] = f"layers.{i}.{metas}.weight"
            if metas in config.biases:
                names[f"blk.{i}.{theirs}.bias"] = f"layers.{i}.{metas}.bias"
    shapes = config.tensor_shapes()
    weights: dict[str, NDArray[np.float32]] = {}
    for theirs, metas in names.items():
        shape = shapes[metas]
        if len(shape) == 1:
            offset = 0 if theirs.endswith(".bias") else 1
            dtype, data = GGMLType.F32, (offset + random_weights("F32", shape, rng)).astype(np.float32)
        else:
            dtype, data = GGMLType[format], random_weights(format, shape, rng)
        writer.add_tensor(theirs, data, raw_dtype=dtype)
        weights[metas] = gguf.quants.dequantize(data, dtype).reshape(shape)
    if config.rope_scaling and config.rope_scaling.divisors:
        writer.add_tensor("rope_freqs.weight", np.array(config.rope_scaling.divisors, np.float32))
    if edit:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.n_heads != config.dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if (scaling := config.rope_scaling) and scaling.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        writer.add_rope_scaling_yarn_attn_factor(scaling.attention_factor)
    if config.rope_scaling and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_sentencepiece(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Llama 2's layout: <unk> <s> </s>, 256 bytes, then merged pieces from likely to rare, then single characters."""
    pieces = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    words = ["▁" + letter for letter in "taoiswcb"] + _PAIRS
    letters = ["▁", *"etaoinsrhldcumfpgwybvkxjqz"]
    pieces += [(piece, TokenType.NORMAL) for piece in words + letters]
    pieces = (pieces + [(f"<unused{i}>", TokenType.UNUSED) for i in range(vocab_size)])[:vocab_size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([0.0 if i < 259 else float(258 - i) for i in range(vocab_size)])
    writer.add_token_types([int(kind) for _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _add_bpe(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """SmolLM2's layout: control tokens, the alphabet that stands for the 256 bytes, then what the merges make."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    space = alphabet[ord(" ")]
    merges = [(space, letter) for letter in "taoiswcb"] + [(pair[0], pair[1]) for pair in _PAIRS]
    pieces = [(text, TokenType.CONTROL) for text in _CHATML]
    pieces += [(alphabet[byte], TokenType.NORMAL) for byte in range(256)]
    pieces += [("".join(pair), TokenType.NORMAL) for pair in merges]
    pieces = (pieces + [(f"<unused{i}>", TokenType.UNUSED) for i in range(vocab_size)])[:vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_types([int(kind) for _, kind in pieces])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
