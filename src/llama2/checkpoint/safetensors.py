"""A safetensors file ⇄ named tensors (spec 1.4b; the format's description in huggingface/safetensors).

A file is the length of the header in 8 bytes, little-endian, the header, and the tensors, row-major, without gaps. The
header is JSON, from each name to `dtype`, `shape` and `data_offsets`. A file is taken only if its tensors fill it to
the last byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from llama2.checkpoint.tensor import Tensor
from llama2.errors import CheckpointError
from llama2.files import MappedFile, Repeated, create, damaged, parse_json, quote, refuse_overlaps
from llama2.formats import FLOATS, nbytes

_LENGTH = struct.Struct("<Q")
_MAX_AXES = 8
_MAX_HEADER = 1 << 24  # the largest Llama's has 200,000; a trainer's notes may come with it
#: Bytes of the numbers that no weight of a Llama has; of formats that are not here, the offsets say it.
_OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4}
_OTHERS |= {"U32": 4, "I64": 8, "U64": 8, "F64": 8}


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file under its own name, as a view that nobody has touched. Raises CheckpointError.

    Its format may be one that only the file knows: who uses a tensor checks that, and its shape.
    """
    file, start, header = _opened(path)
    header.pop("__metadata__", None)
    for values in (header, *header.values()):
        if isinstance(values, Repeated) and (twice := values.twice - {"__metadata__"}):
            raise damaged(path, f"the header has {quote(min(twice))} twice")
    tensors, spans = {}, []
    for name, info in header.items():
        what = f"tensor {quote(name)}"
        dtype, shape, (begin, end) = _described(path, what, info)
        size = _bytes(dtype, shape)
        if size not in (None, end - begin) or begin > end:
            raise damaged(path, f"{what} has {end - begin} bytes, and {dtype} of shape {list(shape)} needs {size}")
        tensors[name] = Tensor(name, dtype, shape, file.view(start + begin, end - begin, what), (file,))
        spans.append((begin, end, name))
    refuse_overlaps(path, spans)
    if (total := sum(end - begin for begin, end, _ in spans)) != file.size - start:
        raise damaged(path, f"has {file.size - start} bytes for tensors that need {total}")
    return tensors


def _opened(path: Path) -> tuple[MappedFile, int, dict[str, Any]]:
    """A file, where its tensors begin, and its header."""
    file = MappedFile(path)
    file.check(0, _LENGTH.size, "the header's length")
    (length,) = _LENGTH.unpack_from(file.buffer)
    if length > _MAX_HEADER:
        raise damaged(path, f"claims a header of {length} bytes, and the limit is {_MAX_HEADER}")
    header = parse_json(path, file.view(_LENGTH.size, length, "the header").tobytes(), "the header")
    return file, _LENGTH.size + length, header


def _described(path: Path, what: str, info: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """A tensor's format, shape, and offsets from the end of the header."""
    fields = info if isinstance(info, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _numbers(fields.get("shape")), _numbers(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise damaged(path, f"{what} has no format, no shape, or no two offsets")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """What a tensor must have; None for a format that is not known here."""
    if dtype in FLOATS:
        return prod(shape) * nbytes(dtype, (1,))
    return prod(shape) * _OTHERS[dtype] if dtype in _OTHERS else None


def _numbers(values: Any) -> list[int] | None:
    """A list of whole numbers from 0 on, as many as a tensor can have; None for anything else."""
    if isinstance(values, list) and len(values) <= _MAX_AXES:
        return values if all(type(value) is int and value >= 0 for value in values) else None
    return None


def notes(path: Path) -> dict[str, str]:
    """What a file says beside its tensors, as far as that is text. Raises CheckpointError."""
    _, _, header = _opened(path)
    found = header.get("__metadata__")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def write(tensors: Sequence[Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """A file of these tensors, one in memory at a time, perhaps with notes. Raises CheckpointError.

    Wider numbers come first, so that each tensor lies at a multiple of its numbers' size.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.format != "F32")
    for tensor in ordered:
        if tensor.format not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {quote(tensor.name)} has format {tensor.format}, which safetensors does not have; "
                f"convert it to one of {', '.join(FLOATS)} first"
            )
    ends = list(accumulate((tensor.nbytes for tensor in ordered), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}  # transformers takes no other
    for tensor, begin, end in zip(ordered, ends, ends[1:], strict=False):
        header[tensor.name] = {"dtype": tensor.format, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with create(path) as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for tensor in ordered:
            file.write(tensor.data.data)
