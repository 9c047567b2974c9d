"""llama2.c's files written by struct and the specification (1.4d), value after value."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.config import ModelConfig
from models import tiny_config

CONFIG = tiny_config(hidden_dim=96, norm_eps=1e-5)
GROUP = 32  # 64, halved until it divides the hidden width

Weights = dict[str, NDArray[np.float32]]

_LAYER = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
_FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]


def random_weights(config: ModelConfig = CONFIG, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(0, 0.1, shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }


def sizes(config: ModelConfig, sign: int = 1) -> list[int]:
    c = config
    heads = [c.n_heads, c.n_kv_heads]
    return [c.dim, c.hidden_dim, c.n_layers, *heads, sign * c.vocab_size, c.context_length]


def every(config: ModelConfig, kinds: Sequence[str]) -> list[str]:
    return [f"layers.{i}.{kind}.weight" for kind in kinds for i in range(config.n_layers)]


def floats(values: NDArray[np.float32]) -> bytes:
    return struct.pack(f"<{values.size}f", *values.ravel().tolist())


def version_0(config: ModelConfig, weights: Weights) -> bytes:
    data = struct.pack("<7i", *sizes(config, 1 if config.tied_embeddings else -1))
    names = ["tok_embeddings.weight", *every(config, ["attention_norm", *_LAYER, "ffn_norm", *_FEED_FORWARD])]
    for name in [*names, "norm.weight"]:
        data += floats(weights[name])
    data += b"\x7f" * (2 * config.context_length * config.head_dim // 2 * 4)  # tables that nobody reads
    return data if config.tied_embeddings else data + floats(weights["output.weight"])


def header(config: ModelConfig, version: int, **changes: Any) -> bytes:
    data = struct.pack("<Ii7i", 0x616B3432, version, *sizes(config)) + bytes([config.tied_embeddings])
    return (data + (struct.pack("<i", GROUP) if version == 2 else b"")).ljust(256, b"\0")


def _order(config: ModelConfig) -> tuple[list[str], list[str]]:
    norms = [*every(config, ["attention_norm", "ffn_norm"]), "norm.weight"]
    matrices = ["tok_embeddings.weight", *every(config, _LAYER + _FEED_FORWARD)]
    return norms, matrices if config.tied_embeddings else [*matrices, "output.weight"]


def version_1(config: ModelConfig, weights: Weights) -> bytes:
    norms, matrices = _order(config)
    return header(config, 1) + b"".join(floats(weights[name]) for name in norms + matrices)


def version_2(config: ModelConfig, weights: Weights, groups: dict[str, tuple[Any, Any]]) -> bytes:
    """Norms of `weights`, and of each matrix its (integers, scales)."""
    norms, matrices = _order(config)
    data = header(config, 2) + b"".join(floats(weights[name]) for name in norms)
    for name in matrices:
        integers, scales = (np.asarray(part).ravel().tolist() for part in groups[name])
        data += struct.pack(f"<{len(integers)}b", *integers) + struct.pack(f"<{len(scales)}f", *scales)
    return data


def tokenizer_bin(tokens: Sequence[tuple[float, bytes]]) -> bytes:
    data = struct.pack("<I", max(len(text) for _, text in tokens))
    return data + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in tokens)


def llama_tokens(model: bytes) -> list[tuple[float, bytes]]:
    """The tokens of a SentencePiece model as llama2.c's tokenizer.py lists them."""
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_proto=model)
    tokens = []
    for token in range(library.get_piece_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(token, library.id_to_piece(token))
        tokens.append((library.get_score(token), piece.replace("▁", " ").encode()))
    return tokens
