"""Checkpoint → GGUF version 3 (spec 1.4c): every key that llama.cpp needs of a Llama, tensors as they are."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint.checkpoint import Checkpoint, Tensor
from llama2.checkpoint.gguf import ROPE_FREQS, names
from llama2.checkpoint.output import create
from llama2.checkpoint.quantize import FORMATS
from llama2.config import ModelConfig
from llama2.errors import CheckpointError
from llama2.text.tokenizer import END_OF_TURN, Tokenizer

_ALIGNMENT = 32  # the default, so that no key tells it
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # GGUF's value types
_STRUCTS = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?"}

#: Tokens of a window of the text that an importance matrix is made of.
IMATRIX_CHUNK = 512

Keys = dict[str, bytes]  # each value with its type, as the file has it

#: general.file_type by the format that most matrices have, of K formats the mixture named M.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip

#: llama.cpp's name of a pre-tokenizer, where it is not ours.
_PRE = {"gpt2": "gpt-2"}


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a model to `path`, one tensor in memory at a time.

    Tensors keep their format, but norms become F32, as llama.cpp wants them. Raises CheckpointError when several tokens
    end an answer or the file system does not allow it, and TokenizerError as `Tokenizer.vocabulary` does.
    """
    tensors = _tensors(checkpoint)
    keys = _general(checkpoint) | _hyperparameters(checkpoint.config) | _vocabulary(checkpoint)
    if checkpoint.template is not None:
        keys["tokenizer.chat_template"] = _text(checkpoint.template)
    _write(path, keys, tensors)


def write_imatrix(
    sums: Mapping[str, tuple[NDArray[np.float64], int]], config: ModelConfig, text: str, path: Path
) -> None:
    """Write an importance matrix as llama.cpp does: by Meta's name of a matrix, what checkpoint/imatrix.py reads.

    `sums` are those of the squares of each column's inputs, and of how many inputs; `text` is named as their source.
    """
    tensors = []
    for name, theirs in names(config).items():
        if name in sums:
            values, count = sums[name]
            for what, numbers in (("in_sum2", values[None]), ("counts", np.array([[count]]))):
                data = np.ascontiguousarray(numbers, "<f4")
                tensors.append(Tensor(f"{theirs}.{what}", "F32", data.shape, data.view(np.uint8).reshape(-1)))
    keys = {
        "general.type": _text("imatrix"),
        "imatrix.datasets": _array(_STRING, [_string(text)], 1),
        "imatrix.chunk_count": _number(_U32, max((count for _, count in sums.values()), default=0) // IMATRIX_CHUNK),
        "imatrix.chunk_size": _number(_U32, IMATRIX_CHUNK),
    }
    _write(path, keys, tensors)


def _write(path: Path, keys: Keys, tensors: Sequence[Tensor]) -> None:
    ends = list(accumulate((_aligned(tensor.nbytes) for tensor in tensors), initial=0))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    header += b"".join(_string(key) + value for key, value in keys.items())
    for tensor, offset in zip(tensors, ends, strict=False):
        dims = tensor.shape[::-1]  # columns first
        header += _string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", FORMATS[tensor.format].ggml_type, offset)
    with create(path) as file:
        file.write(header + bytes(_aligned(len(header)) - len(header)))
        for tensor in tensors:
            file.write(tensor.data.data)
            file.write(bytes(_aligned(tensor.nbytes) - tensor.nbytes))


def _tensors(checkpoint: Checkpoint) -> list[Tensor]:
    """The tensors under GGUF's names, and Llama 3.1's rotary divisors as one."""
    tensors = []
    for name, theirs in names(checkpoint.config).items():
        tensor = replace(checkpoint.tensors[name], name=theirs)
        tensors.append(tensor.in_float32() if len(tensor.shape) == 1 else tensor)
    scaling = checkpoint.config.rope_scaling
    if scaling and scaling.kind == "llama3":
        divisors = np.array(checkpoint.config.rope_divisors(), "<f4")
        tensors.insert(0, Tensor(ROPE_FREQS, "F32", divisors.shape, divisors.view(np.uint8)))
    return tensors


def _general(checkpoint: Checkpoint) -> Keys:
    formats = Counter(tensor.format for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2)
    ((most, _),) = formats.most_common(1)
    keys = {
        "general.architecture": _text("llama"),
        "general.type": _text("model"),
        "general.name": _text(checkpoint.name),
        "general.file_type": _number(_U32, _FILE_TYPES[most]),
    }
    if checkpoint.licence is not None:
        keys["general.license"] = _text(checkpoint.licence)
    if any(FORMATS[format].block > 1 for format in formats):
        keys["general.quantization_version"] = _number(_U32, 2)
    return keys


def _hyperparameters(c: ModelConfig) -> Keys:
    keys = {
        "llama.context_length": _number(_U32, c.context_length),
        "llama.embedding_length": _number(_U32, c.dim),
        "llama.block_count": _number(_U32, c.n_layers),
        "llama.feed_forward_length": _number(_U32, c.hidden_dim),
        "llama.attention.head_count": _number(_U32, c.n_heads),
        "llama.attention.head_count_kv": _number(_U32, c.n_kv_heads),
        "llama.attention.key_length": _number(_U32, c.head_dim),
        "llama.attention.value_length": _number(_U32, c.head_dim),
        "llama.attention.layer_norm_rms_epsilon": _number(_F32, c.norm_eps),
        "llama.rope.dimension_count": _number(_U32, c.head_dim),
        "llama.rope.freq_base": _number(_F32, c.rope_theta),
        "llama.vocab_size": _number(_U32, c.vocab_size),
    }
    if c.rope_scaling and c.rope_scaling.kind == "linear":
        keys["llama.rope.scaling.type"] = _text("linear")
        keys["llama.rope.scaling.factor"] = _number(_F32, c.rope_scaling.factor)
    return keys


def _vocabulary(checkpoint: Checkpoint) -> Keys:
    tokenizer = checkpoint.tokenizer
    with checkpoint.naming():
        parts = tokenizer.vocabulary()
    bpe = parts.kind == "bpe"
    keys = {
        "tokenizer.ggml.model": _text("gpt2" if bpe else "llama"),
        "tokenizer.ggml.pre": _text(_PRE.get(parts.pre, parts.pre) if parts.pre else "default"),
        "tokenizer.ggml.tokens": _array(_STRING, map(_string, parts.pieces), len(parts.pieces)),
        "tokenizer.ggml.token_type": _numbers(_I32, parts.types),
        "tokenizer.ggml.add_bos_token": _number(_BOOL, tokenizer.add_bos),
        "tokenizer.ggml.add_eos_token": _number(_BOOL, tokenizer.add_eos),
        "tokenizer.ggml.add_space_prefix": _number(_BOOL, parts.add_space_prefix),
    }
    if parts.scores is not None:
        keys["tokenizer.ggml.scores"] = _numbers(_F32, parts.scores)
    if parts.merges is not None:
        keys["tokenizer.ggml.merges"] = _array(_STRING, map(_string, parts.merges), len(parts.merges))
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unknown": parts.unk_id,
        "eot": _end_of_turn(checkpoint.path, tokenizer),
    }
    return keys | {f"tokenizer.ggml.{name}_token_id": _number(_U32, id) for name, id in ids.items() if id is not None}


def _end_of_turn(path: Path, tokenizer: Tokenizer) -> int | None:
    """The token that ends an answer besides EOS and those that do by their name. Raises CheckpointError for several."""
    known = {tokenizer.eos_id, *(tokenizer.control.get(text) for text in END_OF_TURN)}
    others = sorted(tokenizer.stop_ids - known)
    if len(others) > 1:
        raise CheckpointError(
            f"{path}: tokens {others} end an answer, and GGUF has one besides EOS; choose another format"
        )
    return others[0] if others else None


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _text(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _string(text)


def _number(kind: int, value: float) -> bytes:
    return struct.pack(f"<I{_STRUCTS[kind]}", kind, value)


def _numbers(kind: int, values: Sequence[float]) -> bytes:
    return _array(kind, [struct.pack(f"<{len(values)}{_STRUCTS[kind]}", *values)], len(values))


def _array(kind: int, parts: Iterable[bytes], count: int) -> bytes:
    return struct.pack("<IIQ", _ARRAY, kind, count) + b"".join(parts)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
