"""Importance matrices in llama.cpp's two file formats (its tools/imatrix): how strong the input of each column is.

GGUF holds for each matrix the F32 tensors NAME.in_sum2, sums over a text of the squares of each column's inputs, and
NAME.counts. The older .dat, little-endian: a count of entries; of each the length of its name, the name, how many
calls, how many values, and the values, means times calls.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import gguf
from llama2.checkpoint.mapped import MappedFile, damaged, quote
from llama2.config import ModelConfig
from llama2.errors import CheckpointError

Floats = NDArray[np.float32]


def read(path: Path, config: ModelConfig) -> dict[str, Floats]:
    """Mean squares of each column's inputs (columns,), by Meta's name of the matrix; those that the file has.

    Raises CheckpointError when the file is damaged, is of another model, or knows nothing of this one.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        entries = dict(_gguf(path) if gguf.matches(path) else _dat(path))
    shapes, found = config.tensor_shapes(), {}
    for name, theirs in gguf.names(config).items():
        if theirs not in entries:
            continue
        values = entries[theirs]
        if values.shape != shapes[name][-1:] or len(shapes[name]) != 2:
            raise CheckpointError(
                f"{path}: has {values.size} columns of {theirs}, and the model {shapes[name][-1]}; another model's"
            )
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise damaged(path, f"the squares of {theirs} are not all positive numbers")
        found[name] = values
    if not found:
        raise CheckpointError(f"{path}: has no importance of any matrix of this model; it is of another model")
    return found


def _gguf(path: Path) -> Iterator[tuple[str, Floats]]:
    tensors = gguf.stored(path)
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            matrix = name.removesuffix(".in_sum2")
            counts = tensors.get(f"{matrix}.counts")
            count = 0.0 if counts is None or math.prod(counts.shape) != 1 else counts.dequantize().item()
            if not count > 0:
                raise damaged(path, f"does not tell of how many inputs {quote(name)} is the sum")
            yield matrix, sums.dequantize().reshape(-1) / np.float32(count)


def _dat(path: Path) -> Iterator[tuple[str, Floats]]:
    file, at = MappedFile(path), 0

    def number(what: str) -> int:
        nonlocal at
        (value,) = struct.unpack("<i", file.view(at, 4, what).data)
        at += 4
        if value < 0:
            raise damaged(path, f"{what} is {value}")
        return int(value)

    for _ in range(number("the count of entries")):
        size = number("the length of a name")
        name = file.view(at, size, "a name").tobytes().decode(errors="replace")
        at += size
        calls, count = number(f"the calls of {quote(name)}"), number(f"the values of {quote(name)}")
        values = np.frombuffer(file.view(at, 4 * count, quote(name)), "<f4")
        at += 4 * count
        yield name, (values / max(calls, 1)).astype(np.float32)
