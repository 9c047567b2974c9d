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

from llama2.checkpoint.checkpoint import Checkpoint
from llama2.checkpoint.gguf import PREPEND_SCHEME, ROPE_FREQS, names
from llama2.checkpoint.tensor import Tensor
from llama2.config import ModelConfig, yarn_attention_factor
from llama2.errors import CheckpointError
from llama2.files import create
from llama2.formats import FORMATS
from llama2.text.template import check
from llama2.text.tokenizer import Tokenizer

_ALIGNMENT = 32  # the default, so that no key states it
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # GGUF's value types
_STRUCTS = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?"}

#: Tokens of a window of the text that an importance matrix is made of.
IMATRIX_CHUNK = 512

#: Control tokens at which llama.cpp ends an answer because of their texts, and we do too.
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")

Keys = dict[str, bytes]  # each value with its type, as the file has it

#: llama.cpp's name of a pre-tokenizer, where it is not ours.
_PRE = {"gpt2": "gpt-2"}


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a model to `path`, one tensor in memory at a time.

    Tensors keep their format, but norms and biases become F32, as llama.cpp wants them. Raises CheckpointError when
    several tokens end an answer, for rope scaling without keys in GGUF, or when the file system does not allow it.
    Raises TokenizerError as `Tokenizer.vocabulary` does.
    """
    checkpoint.refuse_extras("GGUF")
    tensors = _tensors(checkpoint)
    keys = _general(checkpoint) | _hyperparameters(checkpoint.path, checkpoint.config) | _vocabulary(checkpoint)
    keys |= _templates(checkpoint.templates)
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
        "general.architecture": _text(_architecture(checkpoint.config)),
        "general.type": _text("model"),
        "general.name": _text(checkpoint.name),
        "general.file_type": _number(_U32, FORMATS[most].file_type),
    }
    if checkpoint.licence is not None:
        keys["general.license"] = _text(checkpoint.licence)
    if any(FORMATS[format].block > 1 for format in formats):
        keys["general.quantization_version"] = _number(_U32, 2)
    return keys


def _architecture(c: ModelConfig) -> str:
    """llama; but mistral3, whose arithmetic is the same, where llama.cpp would not read YaRN's ends of llama's keys."""
    scaling = c.rope_scaling
    yarn = scaling is not None and scaling.kind == "yarn"
    return "mistral3" if yarn and scaling and (scaling.beta_fast, scaling.beta_slow) != (32, 1) else "llama"


def _hyperparameters(path: Path, c: ModelConfig) -> Keys:
    """Raises CheckpointError for rope scaling that no key can express."""
    keys = {
        "context_length": _number(_U32, c.context_length),
        "embedding_length": _number(_U32, c.dim),
        "block_count": _number(_U32, c.n_layers),
        "feed_forward_length": _number(_U32, c.hidden_dim),
        "attention.head_count": _number(_U32, c.n_heads),
        "attention.head_count_kv": _number(_U32, c.n_kv_heads),
        "attention.key_length": _number(_U32, c.head_dim),
        "attention.value_length": _number(_U32, c.head_dim),
        "attention.layer_norm_rms_epsilon": _number(_F32, c.norm_eps),
        "rope.dimension_count": _number(_U32, c.head_dim),
        "rope.freq_base": _number(_F32, c.rope_theta),
        "vocab_size": _number(_U32, c.vocab_size),
    }
    if c.sliding_window is not None:
        keys["attention.sliding_window"] = _number(_U32, c.sliding_window)
    scaling = c.rope_scaling
    if scaling and scaling.kind == "dynamic":
        raise CheckpointError(f"{path}: has dynamic rope scaling, which GGUF has no key for; choose hf")
    if scaling and scaling.kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = _text(scaling.kind)
        keys["rope.scaling.factor"] = _number(_F32, scaling.factor)
    if scaling and scaling.kind == "yarn":
        if not scaling.truncate:
            raise CheckpointError(f"{path}: has yarn without truncate, which GGUF has no key for; choose hf")
        keys["rope.scaling.original_context_length"] = _number(_U32, scaling.original_context)
        keys["rope.scaling.attn_factor"] = _number(
            _F32, scaling.attention_factor / yarn_attention_factor(scaling.factor)
        )
        keys["rope.scaling.yarn_beta_fast"] = _number(_F32, scaling.beta_fast)
        keys["rope.scaling.yarn_beta_slow"] = _number(_F32, scaling.beta_slow)
    return {f"{_architecture(c)}.{key}": value for key, value in keys.items()}


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
        "tokenizer.ggml.add_space_prefix": _number(_BOOL, parts.prepend_scheme != "never"),
    }
    if parts.prepend_scheme == "first":
        keys[PREPEND_SCHEME] = _text(parts.prepend_scheme)
    if parts.scores is not None:
        keys["tokenizer.ggml.scores"] = _numbers(_F32, parts.scores)
    if parts.merges is not None:
        keys["tokenizer.ggml.merges"] = _array(_STRING, map(_string, parts.merges), len(parts.merges))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": parts.unk_id}
    ids |= dict(zip(("eot", "eom"), _further_ends(checkpoint.path, tokenizer), strict=False))
    return keys | {f"tokenizer.ggml.{name}_token_id": _number(_U32, id) for name, id in ids.items() if id is not None}


def _templates(templates: Mapping[str, str]) -> Keys:
    """The chat templates; those with names beside the default one as llama.cpp's converter writes them."""
    for template in templates.values():
        check(template)
    names = [name for name in templates if name != "default"]
    keys = {f"tokenizer.chat_template.{name}": _text(templates[name]) for name in names}
    if names:
        keys["tokenizer.chat_templates"] = _array(_STRING, map(_string, names), len(names))
    if "default" in templates:
        keys["tokenizer.chat_template"] = _text(templates["default"])
    return keys


def _further_ends(path: Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer besides EOS and those that do by their name. Raises CheckpointError for several."""
    known = {tokenizer.eos_id, *(tokenizer.control.get(text) for text in _ENDS)}
    others = sorted(tokenizer.stop_ids - known)
    if len(others) > 2:
        raise CheckpointError(
            f"{path}: tokens {others} end an answer, and GGUF has two besides EOS; choose another format"
        )
    return others


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
