"""Weights in the number formats of `formats.py` ⇄ float32: what a block's bytes mean, in NumPy.

The kernels, and what writes the formats (native/quantize.h), are checked against the functions here. Within a block of
256 weights, groups of 16 or 32 have their own small integer scale. Layouts are those of ggml (ggml-common.h,
ggml-quants.c).

Shapes: n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama2.errors import CheckpointError
from llama2.formats import FORMATS, Format, nbytes

Blocks = NDArray[np.void]  # (n,) records of a format's layout
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

#: What the sixteen codes of IQ4_NL stand for.
_CODES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

_CHUNK = 1 << 17  # weights converted at a time, so that temporary arrays stay in the cache


def dequantize(data: Bytes, format: str, shape: tuple[int, ...]) -> Floats:
    """The float32 values of a tensor's bytes, in `shape`."""
    rule = FORMATS[format]
    out = np.empty((prod(shape) // rule.block, rule.block), np.float32)
    for rows, blocks in _chunks(data, rule):
        out[rows] = _DEQUANTIZE[format](blocks)
    return out.reshape(shape)


def quantize(values: ArrayLike, format: str, importance: Floats | None = None) -> Bytes:
    """The bytes of float32 values (…, columns), flat. `importance` as in `requantize`. Raises CheckpointError."""
    x = np.ascontiguousarray(values, np.float32)
    return requantize(x.reshape(-1).view(np.uint8), "F32", x.shape, format, importance)[0]


def requantize(
    data: Bytes,
    source: str,
    shape: tuple[int, ...],
    format: str,
    importance: Floats | None = None,
    *,
    threads: int | None = None,
) -> tuple[Bytes, float]:
    """A tensor's bytes in another format, and the relative error: the root of Σ (x − y)² / Σ x².

    Scales and minima are searched for that leave the least squared error. `importance` (columns,) is how much each
    column counts in it. Q8_0 always rounds as ggml does, and so do other formats of 32 weights where it is None. The
    bytes are the same on every processor and with any number of threads. The error is NaN or infinite when a weight is
    not finite, or not so in the new format. Raises CheckpointError when rows are not whole blocks of either format, and
    for IQ4_NL, which is read alone.
    """
    from llama2 import native

    if format == "IQ4_NL":
        raise CheckpointError("IQ4_NL is a format that is read, and not written; choose Q4_0, Q4_1 or Q4_K_M")
    columns = shape[-1]
    out = np.empty(nbytes(format, shape), np.uint8)
    weights = np.empty(0, np.float32) if importance is None else np.ascontiguousarray(importance, np.float32)
    lost, total = native.module().quantize(
        source, data, prod(shape) // columns, columns, format, weights, out, threads or native.default_threads()
    )
    return out, math.sqrt(lost / total) if total else lost


def is_finite(data: Bytes, format: str) -> bool:
    """Whether no weight is NaN or infinite. In a quantized block that is decided by its floating-point scales alone."""
    rule = FORMATS[format]
    scales = [name for name in rule.layout.names or () if rule.layout[name].kind == "f"]
    for _, blocks in _chunks(data, rule):
        for part in [blocks[name] for name in scales] or [_DEQUANTIZE[format](blocks)]:
            if not np.isfinite(part).all():
                return False
    return True


def _chunks(data: Bytes, rule: Format) -> Iterator[tuple[slice, Blocks]]:
    blocks: Blocks = data.view(rule.layout)
    step = _CHUNK // rule.block
    for start in range(0, len(blocks), step):
        yield slice(start, start + step), blocks[start : start + step]


def _column(scale: NDArray[Any]) -> Floats:
    return scale.astype(np.float32)[:, None]  # (n, 1)


def _bits(packed: Bytes, width: int, run: int) -> Bytes:
    """Unpack fields of `width` bits: every run of `run` bytes gives its lowest fields, then the next higher ones."""
    runs = packed.reshape(len(packed), -1, run)
    planes = [(runs >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)]
    return np.concatenate(planes, axis=-1).reshape(len(packed), -1)


def _scaled(q: NDArray[Any], scale: Floats, minimum: Floats | None = None) -> Floats:
    """`scale * q − minimum` in groups: q (n, block), scale and minimum (n, groups)."""
    x = scale[:, :, None] * q.reshape(*scale.shape, -1).astype(np.float32)
    if minimum is not None:
        x -= minimum[:, :, None]
    return x.reshape(q.shape)


def _scale_min(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and minima of a Q4_K or Q5_K block from 12 bytes: (n, 8) each.

    Bytes 0–3 and 4–7 hold the first four of each. Their top two bits are those of the last four, whose low nibbles are
    in bytes 8–11.
    """
    a, b, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, (low & 15) | (a >> 6 << 4)], axis=1)
    minima = np.concatenate([b & 63, (low >> 4) | (b >> 6 << 4)], axis=1)
    return scales, minima


def _from_float(b: Blocks) -> Floats:
    return _column(b["x"])


def _from_bf16(b: Blocks) -> Floats:
    values: Floats = (b["bits"].astype(np.uint32) << 16).view(np.float32)
    return values[:, None]


def _from_q8_0(b: Blocks) -> Floats:
    return _column(b["d"]) * b["q"].astype(np.float32)


def _from_q4_0(b: Blocks) -> Floats:
    return _column(b["d"]) * (_bits(b["q"], 4, 16).astype(np.float32) - 8)


def _from_q4_1(b: Blocks) -> Floats:
    return _column(b["d"]) * _bits(b["q"], 4, 16) + _column(b["m"])


def _from_iq4_nl(b: Blocks) -> Floats:
    return _column(b["d"]) * _CODES[_bits(b["q"], 4, 16)]


def _five_bits(b: Blocks) -> Floats:
    return (_bits(b["q"], 4, 16) | _bits(b["high"], 1, 1) << 4).astype(np.float32)  # (n, 32)


def _from_q5_0(b: Blocks) -> Floats:
    return _column(b["d"]) * (_five_bits(b) - 16)


def _from_q5_1(b: Blocks) -> Floats:
    return _column(b["d"]) * _five_bits(b) + _column(b["m"])


def _from_q2_k(b: Blocks) -> Floats:
    scale, minimum = b["scales"] & 15, b["scales"] >> 4
    return _scaled(_bits(b["q"], 2, 32), _column(b["d"]) * scale, _column(b["m"]) * minimum)


def _from_q3_k(b: Blocks) -> Floats:
    packed = b["scales"]
    scales = (_bits(packed[:, :8], 4, 8) | _bits(packed[:, 8:], 2, 4) << 4).astype(np.float32) - 32
    q = (_bits(b["q"], 2, 32) | _bits(b["high"], 1, 32) << 2).astype(np.float32) - 4
    return _scaled(q, _column(b["d"]) * scales)


def _from_q4_k(b: Blocks) -> Floats:
    scale, minimum = _scale_min(b["scales"])
    return _scaled(_bits(b["q"], 4, 32), _column(b["d"]) * scale, _column(b["m"]) * minimum)


def _from_q5_k(b: Blocks) -> Floats:
    scale, minimum = _scale_min(b["scales"])
    q = _bits(b["q"], 4, 32) | _bits(b["high"], 1, 32) << 4
    return _scaled(q, _column(b["d"]) * scale, _column(b["m"]) * minimum)


def _from_q6_k(b: Blocks) -> Floats:
    q = (_bits(b["q"], 4, 64) | _bits(b["high"], 2, 32) << 4).astype(np.float32) - 32
    return _scaled(q, _column(b["d"]) * b["scales"])


#: A block of each format as float32: (n,) → (n, block).
_DEQUANTIZE: dict[str, Callable[[Blocks], Floats]] = {
    "F32": _from_float,
    "F16": _from_float,
    "BF16": _from_bf16,
    "Q8_0": _from_q8_0,
    "Q5_1": _from_q5_1,
    "Q5_0": _from_q5_0,
    "Q4_1": _from_q4_1,
    "Q4_0": _from_q4_0,
    "IQ4_NL": _from_iq4_nl,
    "Q6_K": _from_q6_k,
    "Q5_K": _from_q5_k,
    "Q4_K": _from_q4_k,
    "Q3_K": _from_q3_k,
    "Q2_K": _from_q2_k,
}
