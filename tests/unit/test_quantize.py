"""Number formats against the `gguf` package, bit for bit, and against hand arithmetic."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from llama2.checkpoint import quantize
from llama2.errors import CheckpointError
from models import random_weights

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WRITABLE = FORMATS[:8]


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8).ravel()


def test_formats_are_gguf_s() -> None:
    assert set(quantize.FORMATS) == set(FORMATS)
    assert set(quantize.WRITABLE) == set(WRITABLE)
    for name, format in quantize.FORMATS.items():
        assert name == format.name
        assert GGMLType(format.ggml_type).name == name
        assert (format.block, format.size) == gguf.GGML_QUANT_SIZES[GGMLType[name]]


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_equals_gguf_bit_for_bit(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_CHUNK", 4096)  # several chunks, the last one short
    rng = np.random.default_rng(1)
    shape = (37, 768)
    rule = quantize.FORMATS[format]
    random = rng.integers(0, 256, quantize.nbytes(format, shape), dtype=np.uint8).view(rule.layout)
    for name in rule.layout.names or ():  # any bytes, but finite scales
        if rule.layout[name].kind == "f":
            random[name] = rng.normal(0, 1, len(random))
    plausible = random_weights(format, shape, rng)
    for data in (random.view(np.uint8), bits(plausible)):
        rows = data.reshape(shape[0], -1)
        expected = gguf.quants.dequantize(rows, GGMLType[format])
        result = quantize.dequantize(data, format, shape)
        assert result.dtype == np.float32
        assert result.shape == shape
        assert np.array_equal(bits(result), bits(expected))


@pytest.mark.parametrize("format", WRITABLE)
def test_quantize_equals_gguf_bit_for_bit(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_CHUNK", 4096)
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (64, 512)) * np.exp(rng.normal(0, 2, (64, 512)))
    x[0] = 0
    x[1] = -3.5
    x[2] = (np.arange(512) % 32 - 16) / 2
    x[2, ::32] = 127  # a scale of 1 in Q8_0, so that halves are ties
    x = x.astype(np.float32)
    assert np.array_equal(quantize.quantize(x, format), bits(gguf.quants.quantize(x, GGMLType[format])))


def test_bf16_keeps_nan_and_infinity() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e-40], np.float32)
    x[0:1].view(np.uint32)[0] = 0x7F800001  # its payload is lost by cutting the low half
    assert np.array_equal(quantize.quantize(x, "BF16"), bits(gguf.quants.quantize(x, GGMLType.BF16)))


def test_hand_arithmetic() -> None:
    # Q4_0: the largest magnitude −4 gives d = 0.5 and code 0; 0 is code 8; 3.5 is code 15.
    x = np.zeros(32, np.float32)
    x[0], x[16] = -4, 3.5
    data = quantize.quantize(x, "Q4_0")
    assert data.tobytes() == np.float16(0.5).tobytes() + bytes([0xF0]) + bytes([0x88] * 15)
    assert np.array_equal(quantize.dequantize(data, "Q4_0", (32,)), x)


@pytest.mark.parametrize(
    ("format", "shape", "expected"),
    [
        ("F32", (7,), 28),
        ("BF16", (3, 5), 30),
        ("Q8_0", (2, 64), 136),
        ("Q4_K", (1, 256), 144),
        ("Q4_0", (1 << 60, 1 << 60), (1 << 120) // 32 * 18),  # no wrap at 64 bits
    ],
)
def test_nbytes(format: str, shape: tuple[int, ...], expected: int) -> None:
    assert quantize.nbytes(format, shape) == expected


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="multiple of 32 weights, and has 33"):
        quantize.nbytes("Q4_0", (2, 33))
    with pytest.raises(CheckpointError, match="Q4_K can be read but not written"):
        quantize.quantize(np.zeros(256, np.float32), "Q4_K")


@pytest.mark.parametrize("format", FORMATS)
def test_is_finite(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_CHUNK", 4096)
    rule = quantize.FORMATS[format]
    shape = (16, 768)
    data = bits(random_weights(format, shape, np.random.default_rng(3))).copy()
    assert quantize.is_finite(data, format)
    assert quantize.is_finite(np.zeros_like(data), format)  # blocks of zeros have scale zero
    fields = [name for name in rule.layout.names or () if rule.layout[name].kind == "f"] or ["bits"]
    for field in fields:
        for value in (np.nan, np.inf, -np.inf):
            damaged = data.copy()
            blocks = damaged.view(rule.layout)
            blocks[field][-1] = 0x7FC0 if field == "bits" else value
            assert not quantize.is_finite(damaged, format)
