"""Folders of Meta's written by torch.save, and .pth files written operation by operation, so that a test can lie."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama2.config import ModelConfig
from models import tiny_config
from texts import train_sentencepiece

#: Spec 1.4a: along which axis a tensor is split; norms are not.
AXES = {
    "tok_embeddings": 1,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
}

#: Eight key/value heads, so that it can be cut eight ways; a width of its own for each axis.
CONFIG = tiny_config(
    n_heads=16, n_kv_heads=8, dim=64, head_dim=4, hidden_dim=96, vocab_size=704, context_length=4096, norm_eps=1e-5
)
PARAMS = {
    "dim": 64,
    "multiple_of": 32,
    "ffn_dim_multiplier": 0.5,  # int(2 * 256 / 3) = 170, int(170 / 2) = 85, in whole 32s 96
    "n_heads": 16,
    "n_kv_heads": 8,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}

Tensors = dict[str, torch.Tensor]


@cache
def tokenizer_model(vocab_size: int = CONFIG.vocab_size) -> bytes:
    return train_sentencepiece(vocab_size)


def random_tensors(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + (len(shape) == 1)).to(dtype)
        for name, shape in config.tensor_shapes().items()
    }


def cut(tensors: Tensors, shards: int) -> list[Tensors]:
    """What each of the files holds, by the table."""
    files: list[Tensors] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        axis = AXES.get(name.split(".")[-2])
        parts = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for file, part in zip(files, parts, strict=True):
            file[name] = part.clone()
    return files


def write_folder(folder: Path, tensors: Tensors, shards: int, **params: Any) -> Path:
    """A folder as Meta publishes it: also with `rope.freqs`. A parameter of None is left out."""
    folder.mkdir(parents=True)
    freqs = 10000 ** -(torch.arange(0, CONFIG.head_dim, 2) / CONFIG.head_dim)
    for i, file in enumerate(cut(tensors, shards)):
        torch.save(file | {"rope.freqs": freqs.bfloat16()}, folder / f"consolidated.{i:02}.pth")
    values = {key: value for key, value in (PARAMS | params).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(values))
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    """BININT where it fits, else LONG1."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True) if abs(value) >= 1 << 63 else long8(value)


def long8(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tuple_(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return tuple_(*map(whole, values))


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_(*arguments) + b"R"


REBUILD = name("torch._utils", "_rebuild_tensor_v2")
EMPTY = name("collections", "OrderedDict") + b")R"


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 6) -> bytes:
    return tuple_(text("storage"), name("torch", kind), text(key), text("cpu"), whole(count)) + b"Q"


def tensor(
    data: bytes | None = None,
    offset: int = 0,
    shape: bytes = numbers(2, 3),
    strides: bytes = numbers(3, 1),
) -> bytes:
    return call(REBUILD, storage() if data is None else data, whole(offset), shape, strides, b"\x89", EMPTY)


def pickled(*entries: bytes) -> bytes:
    """The pickle of a dict; an entry is a key and a value."""
    return b"\x80\x02}(" + b"".join(entries) + b"u."


@dataclass
class PthBytes:
    """A .pth file in parts. Unchanged, `encode` gives a file with one tensor `a` of shape (2, 3)."""

    program: bytes = pickled(text("a"), tensor())
    members: list[tuple[str, bytes]] = field(default_factory=lambda: [("f/data/0", struct.pack("<6f", *range(6)))])
    compression: int = zipfile.ZIP_STORED
    byteorder: bytes = b"little"

    def encode(self) -> bytes:
        file = io.BytesIO()
        first = [("f/data.pkl", self.program), ("f/version", b"3"), ("f/byteorder", self.byteorder)]
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", self.compression) as archive:
            warnings.simplefilter("ignore")  # of a name that is there already
            for member, data in [*first, *self.members]:
                archive.writestr(zipfile.ZipInfo(member), data, self.compression)
        return file.getvalue()
