"""Importance matrices in llama.cpp's two file formats (its tools/imatrix): how strong the input of each column is.

GGUF holds for each matrix the F32 tensors NAME.in_sum2, sums over a text of the squares of each column's inputs, and
NAME.counts. The older .dat is little-endian: a count of entries, then each of them. An entry is the length of its name,
the name, how many calls, how many values, and the values, which are means times calls.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import gguf
from llama2.checkpoint.tensor import Tensor
from llama2.config import ModelConfig
from llama2.errors import CheckpointError
from llama2.files import MappedFile, damaged, quote

Floats = NDArray[np.float32]
Entry = tuple[str, int, Callable[[], Floats]]  # a matrix's name, how many columns it has, and what makes their values

_MAX_NAME = 1 << 8  # bytes that a name of a matrix may have


def read(path: Path, config: ModelConfig) -> dict[str, Floats]:
    """Mean squares of each column's inputs (columns,), by Meta's name of the matrix; those that the file has.

    Raises CheckpointError when the file is damaged, is of another model, or knows nothing of this one.
    """
    shapes, found = config.tensor_shapes(), {}
    wanted = {theirs: name for name, theirs in gguf.names(config).items() if len(shapes[name]) == 2}
    for theirs, columns, values in _gguf(path, wanted) if gguf.matches(path) else _dat(path, wanted):
        name = wanted[theirs]
        if columns != shapes[name][-1]:
            raise CheckpointError(
                f"{path}: has {columns} columns of {theirs}, and the model {shapes[name][-1]}; another model's"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused here
            found[name] = values()
        if not (np.isfinite(found[name]).all() and (found[name] >= 0).all()):
            raise damaged(path, f"the squares of {theirs} are not all positive numbers")
    if not found:
        raise CheckpointError(f"{path}: has no importance of any matrix of this model; it is of another model")
    return found


def _gguf(path: Path, wanted: Container[str]) -> Iterator[Entry]:
    tensors = gguf.stored(path)
    for name, sums in tensors.items():
        matrix = name.removesuffix(".in_sum2")
        if matrix == name or matrix not in wanted:
            continue
        counts = tensors.get(f"{matrix}.counts")
        count = 0.0 if counts is None or math.prod(counts.shape) != 1 else counts.dequantize().item()
        if not count > 0:
            raise damaged(path, f"does not say of how many inputs {quote(name)} is the sum")
        yield matrix, math.prod(sums.shape), partial(_mean, sums, count)


def _mean(sums: Tensor, count: float) -> Floats:
    return sums.dequantize().reshape(-1) / np.float32(count)


def _dat(path: Path, wanted: Container[str]) -> Iterator[Entry]:
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
        name = file.view(at, size, "a name")[:_MAX_NAME].tobytes().decode(errors="replace")
        at += size
        calls, count = number(f"the calls of {quote(name)}"), number(f"the values of {quote(name)}")
        data = file.view(at, 4 * count, quote(name))
        at += 4 * count
        if name in wanted:
            yield name, count, partial(_per_call, data, calls)


def _per_call(data: NDArray[np.uint8], calls: int) -> Floats:
    return (np.frombuffer(data, "<f4") / max(calls, 1)).astype(np.float32)
