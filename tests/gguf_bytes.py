"""A complete Llama in GGUF written byte by byte, so that a test can put any lie into any place."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models import TokenizerKind, tiny_config, write_tiny_gguf

I16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 3, 4, 5, 6, 7, 8, 9, 10
_CODES = {0: "B", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q"}

DIM, HEADS, HIDDEN, VOCAB = 8, 2, 12, 6


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: float | str) -> bytes:
    """A metadata value with its type."""
    body = string(value) if isinstance(value, str) else struct.pack("<" + _CODES[kind], value)
    return struct.pack("<I", kind) + body


def array(kind: int, values: list[Any], count: int | None = None) -> bytes:
    """An array with its type; `count` may lie about its length."""
    body = b"".join(scalar(kind, value)[4:] for value in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count) + body


@dataclass
class TensorBytes:
    """A tensor's description and data. `dims` are in the file's order: columns first. `offset` may lie."""

    name: str | bytes
    dims: list[int]
    data: bytes
    kind: int = 0
    n_dims: int | None = None
    offset: int | None = None


def _floats(name: str, *dims: int, seed: int = 0) -> TensorBytes:
    values = np.random.default_rng(seed).normal(0, 0.1, dims).astype("<f4")
    return TensorBytes(name, list(dims), values.tobytes())


def _keys() -> list[tuple[str | bytes, bytes]]:
    return [
        ("general.architecture", scalar(STRING, "llama")),
        ("general.alignment", scalar(U32, 32)),
        ("llama.context_length", scalar(U32, 16)),
        ("llama.embedding_length", scalar(U32, DIM)),
        ("llama.block_count", scalar(U32, 1)),
        ("llama.feed_forward_length", scalar(U32, HIDDEN)),
        ("llama.attention.head_count", scalar(U32, HEADS)),
        ("llama.attention.head_count_kv", scalar(U32, 1)),
        ("llama.attention.layer_norm_rms_epsilon", scalar(F32, 1e-5)),
        ("tokenizer.ggml.model", scalar(STRING, "llama")),
        ("tokenizer.ggml.tokens", array(STRING, ["<unk>", "<s>", "</s>", "▁", "a", "▁a"])),
        ("tokenizer.ggml.scores", array(F32, [0, 0, 0, -2, -3, -1])),
        ("tokenizer.ggml.token_type", array(I32, [2, 3, 3, 1, 1, 1])),
        ("tokenizer.ggml.bos_token_id", scalar(U32, 1)),
        ("tokenizer.ggml.eos_token_id", scalar(U32, 2)),
        ("tokenizer.ggml.unknown_token_id", scalar(U32, 0)),
        ("tokenizer.ggml.add_bos_token", scalar(BOOL, True)),
    ]


def _tensors() -> list[TensorBytes]:
    kv = DIM // HEADS
    return [
        _floats("token_embd.weight", DIM, VOCAB),
        _floats("blk.0.attn_norm.weight", DIM),
        _floats("blk.0.attn_q.weight", DIM, DIM),
        _floats("blk.0.attn_k.weight", DIM, kv),
        _floats("blk.0.attn_v.weight", DIM, kv),
        _floats("blk.0.attn_output.weight", DIM, DIM),
        _floats("blk.0.ffn_norm.weight", DIM),
        _floats("blk.0.ffn_gate.weight", DIM, HIDDEN),
        _floats("blk.0.ffn_up.weight", DIM, HIDDEN),
        _floats("blk.0.ffn_down.weight", HIDDEN, DIM),
        _floats("output_norm.weight", DIM),
    ]


@dataclass
class GGUFBytes:
    """The file in parts. Unchanged, `encode` gives a valid Llama with tied embeddings."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    keys: list[tuple[str | bytes, bytes]] = field(default_factory=_keys)
    tensors: list[TensorBytes] = field(default_factory=_tensors)
    alignment: int = 32
    order: str = "<"

    def set(self, key: str, value: bytes | None) -> GGUFBytes:
        """Replace, add or (None) remove a key."""
        if value is None:
            self.keys = [item for item in self.keys if item[0] != key]
        elif any(item[0] == key for item in self.keys):
            self.keys = [(key, value) if item[0] == key else item for item in self.keys]
        else:
            self.keys.append((key, value))
        return self

    def __getitem__(self, name: str) -> TensorBytes:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def encode(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        header = bytearray(self.magic + struct.pack(f"{self.order}IQQ", self.version, n_tensors, n_keys))
        header += b"".join(string(key) + value for key, value in self.keys)
        data = bytearray()
        for tensor in self.tensors:
            data += bytes(-len(data) % self.alignment)
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            offset = len(data) if tensor.offset is None else tensor.offset
            header += string(tensor.name) + struct.pack("<I", n_dims)
            header += struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, tensor.kind, offset)
            data += tensor.data
        return bytes(header + bytes(-len(header) % self.alignment) + data)


def write_seed(tokenizer: TokenizerKind, path: Path) -> None:
    """A small valid model for a fuzz to damage."""
    if tokenizer == "sentencepiece":
        path.write_bytes(GGUFBytes().encode())
    else:
        config = tiny_config(dim=4, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2, hidden_dim=4, vocab_size=288)
        write_tiny_gguf(path, config=config, format="F16", tokenizer="bpe", template="{{ messages }}")
