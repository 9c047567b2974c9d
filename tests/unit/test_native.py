"""The kernels of every instruction set that runs here, against the NumPy definitions of the number formats."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

import oracle_sampling as oracle
from llama2 import native
from llama2.checkpoint import quantization
from llama2.errors import EngineError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

FLOATS = ["F32", "F16", "BF16"]
QUANTISED = [name for name in quantization.FORMATS if name not in FLOATS]
FORMATS = FLOATS + QUANTISED
SHAPE = (37, 512)  # rows that fill no vector of 4, 8 or 16 lanes; two blocks of 256

#: Halves from zero to NaN in the order of their bits.
HALVES = np.arange(1 << 16, dtype=np.uint16)


@pytest.fixture(params=native.supported())
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return native.module(request.param)


def weights(format: str, shape: tuple[int, int], rng: np.random.Generator, scales: list[float] | None = None) -> Bytes:
    """Random whole numbers, and any bytes of a quantised block, with floating-point scales out of `scales` (normal)."""
    if format in FLOATS:
        return quantization.quantize(rng.integers(-127, 128, shape), format)
    layout = quantization.FORMATS[format].layout
    blocks = rng.integers(0, 256, quantization.nbytes(format, shape), dtype=np.uint8).view(layout)
    for name in layout.names or ():
        if layout[name].kind == "f":
            blocks[name] = rng.choice(scales, len(blocks)) if scales else rng.normal(0, 1, len(blocks))
    return blocks.view(np.uint8)


def product(kernels: ModuleType, format: str, data: Bytes, x: Floats, rows: int = SHAPE[0]) -> Floats:
    y = np.full((len(x), rows), np.nan, np.float32)
    kernels.product(format, data, rows, x.shape[1], np.ascontiguousarray(x), y)
    return y


def assert_same_bits(a: Floats, b: Floats) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_equals_numpy_bit_for_bit(kernels: ModuleType, format: str) -> None:
    data = weights(format, SHAPE, np.random.default_rng(0))
    out = np.full(SHAPE, np.nan, np.float32)
    kernels.dequantize(format, data, *SHAPE, out)
    assert_same_bits(out, quantization.dequantize(data, format, SHAPE))


@np.errstate(invalid="ignore")  # signalling NaNs are among them
def test_every_half(kernels: ModuleType) -> None:
    """All 65,536 halves and bfloat16s: as one weight, as the scale of a block, read by scalar and by vector code."""
    halves = HALVES.view(np.float16).astype(np.float32)
    bfloats = (HALVES.astype(np.uint32) << 16).view(np.float32)
    first = np.zeros((1 << 16, 32), np.uint16)
    first[:, 0] = HALVES
    scaled = np.zeros(1 << 16, quantization.FORMATS["Q8_0"].layout)
    scaled["d"], scaled["q"][:, 0] = HALVES.view(np.float16), 1
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 1
    for format, data, expected in [("F16", first, halves), ("BF16", first, bfloats), ("Q8_0", scaled, halves)]:
        out = np.empty((1 << 16, 32), np.float32)
        kernels.dequantize(format, data.view(np.uint8).ravel(), *out.shape, out)
        np.testing.assert_array_equal(out[:, 0], expected)
    for format, expected in [("F16", halves), ("BF16", bfloats)]:
        y = product(kernels, format, first.view(np.uint8).ravel(), x, 1 << 16)[0]
        np.testing.assert_array_equal(y, expected)
    # A vector 127·(1, 0, …) has scale 1 and q = 127, and 127 times a half is a float. What refines it is zero, and zero
    # times infinity is not a number.
    y = product(kernels, "Q8_0", scaled.view(np.uint8), 127 * x, 1 << 16)[0]
    np.testing.assert_array_equal(y, np.where(np.isinf(halves), np.nan, 127 * halves))


@pytest.mark.parametrize("format", FORMATS)
def test_product_is_exact_where_floats_can_be(kernels: ModuleType, format: str) -> None:
    """Scales are powers of two, activations small whole numbers with one ±127 a group: nothing is rounded."""
    rng = np.random.default_rng(1)
    data = weights(format, SHAPE, rng, [1, 0.5, -0.5])
    x = rng.integers(-31, 32, (19, SHAPE[1] // 32, 32)).astype(np.float32)
    x[..., 5] = rng.choice([-127, 127], x.shape[:2])
    x *= rng.choice([1, 2], (*x.shape[:2], 1))
    x = x.reshape(19, -1)
    expected = x.astype(np.float64) @ quantization.dequantize(data, format, SHAPE).T.astype(np.float64)
    np.testing.assert_array_equal(product(kernels, format, data, x), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_product_within_the_error_of_8_bit_activations(kernels: ModuleType, format: str) -> None:
    """An activation is off by half a step of its group at most, a step being its largest magnitude over 127."""
    rng = np.random.default_rng(2)
    data = weights(format, SHAPE, rng)
    w = quantization.dequantize(data, format, SHAPE).astype(np.float64)
    x = (rng.normal(0, 1, (7, SHAPE[1])) * np.exp(rng.normal(0, 3, (7, SHAPE[1])))).astype(np.float32)
    steps = np.abs(x).reshape(7, -1, 32).max(axis=2) / 127 if format in QUANTISED else np.zeros((7, SHAPE[1] // 32))
    bound = np.repeat(steps / 2, 32, axis=1) @ np.abs(w).T + 1e-5 * np.abs(x) @ np.abs(w).T
    assert (np.abs(product(kernels, format, data, x) - x @ w.T) <= bound).all()


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 17, 31, 33, 253])
@pytest.mark.parametrize("format", FLOATS)
def test_float_weights_of_any_width(kernels: ModuleType, format: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    data = weights(format, (SHAPE[0], columns), rng)
    x = rng.integers(-200, 200, (5, columns)).astype(np.float32)
    expected = x @ quantization.dequantize(data, format, (SHAPE[0], columns)).T
    y = product(kernels, format, data, x)
    np.testing.assert_array_equal(y, expected)
    assert_same_bits(product(kernels, format, data, x[3:]), y[3:])


@pytest.mark.parametrize("format", FORMATS)
def test_a_result_depends_on_its_token_and_its_row_alone(kernels: ModuleType, format: str) -> None:
    rng = np.random.default_rng(3)
    data = weights(format, SHAPE, rng)
    x = rng.normal(0, 1, (19, SHAPE[1])).astype(np.float32)
    y = product(kernels, format, data, x)
    for n in range(1, 20):
        assert_same_bits(product(kernels, format, data, x[:n]), y[:n])
        assert_same_bits(product(kernels, format, data, x[19 - n :]), y[19 - n :])
    for rows in range(1, SHAPE[0]):
        part = data[: quantization.nbytes(format, (rows, SHAPE[1]))]
        assert_same_bits(product(kernels, format, part, x[:1], rows), y[:1, :rows])


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_a_number_is_never_hidden(kernels: ModuleType, format: str) -> None:
    rng = np.random.default_rng(4)
    data = weights(format, SHAPE, rng)
    x = rng.normal(0, 1, (6, SHAPE[1])).astype(np.float32)
    expected = product(kernels, format, data, x)
    x[2, 511], x[3, 0], x[4, 40] = np.nan, np.inf, -np.inf
    y = product(kernels, format, data, x)
    assert np.isnan(y[2] if format in FLOATS else y[2:5]).all()
    assert not np.isfinite(y[3:5]).any()
    clean = [0, 1, 5]
    assert_same_bits(y[clean], expected[clean])


@pytest.mark.parametrize("format", QUANTISED)
def test_groups_of_zeros_and_nearly_zeros_add_nothing(kernels: ModuleType, format: str) -> None:
    data = weights(format, SHAPE, np.random.default_rng(5))
    x = np.random.default_rng(5).normal(0, 1, (2, SHAPE[1])).astype(np.float32)
    x[:, 64:96] = 0
    expected = product(kernels, format, data, x)
    x[1, 64:96] = 1e-38  # 127 / 1e-38 is not a float
    assert_same_bits(product(kernels, format, data, x), expected)
    for nothing in (0.0, -0.0, 1e-45, 9e-37):
        assert not product(kernels, format, data, np.full_like(x, nothing)).any()


@pytest.mark.parametrize("x", [127.0, -127.0])
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0x81, 0xFF])
@pytest.mark.parametrize("format", QUANTISED)
def test_extremes_do_not_saturate(kernels: ModuleType, format: str, byte: int, x: float) -> None:
    """Every weight and every activation at the end of its range, −128 of Q8_0 included."""
    layout = quantization.FORMATS[format].layout
    blocks = np.full(quantization.nbytes(format, SHAPE), byte, np.uint8).view(layout)
    for name in layout.names or ():
        if layout[name].kind == "f":
            blocks[name] = 1
    data = blocks.view(np.uint8)
    signs = np.ones((3, SHAPE[1]), np.float32)
    signs[1, ::2] = signs[2, ::3] = -1
    w = quantization.dequantize(data, format, SHAPE).astype(np.float64)
    y = product(kernels, format, data, x * signs)
    np.testing.assert_allclose(y, x * signs @ w.T, rtol=1e-6, atol=1e-6 * 127 * np.abs(w).sum(axis=1).max())
    if format == "Q8_0":
        np.testing.assert_array_equal(y[0], 512 * x * np.int8(np.uint8(byte)))


@pytest.mark.parametrize("format", QUANTISED)
def test_pack_fills_exactly_its_bytes(kernels: ModuleType, format: str) -> None:
    """Whole panels of `lanes` rows, of whole cache lines, that hold every bit of the weights and little else."""
    rows, columns = SHAPE
    data = weights(format, SHAPE, np.random.default_rng(6))
    size = kernels.packed_bytes(format, rows, columns)
    panels = -(-rows // kernels.lanes)
    assert size % (panels * 64) == 0
    assert (
        size
        == panels * kernels.packed_bytes(format, 1, columns)
        == kernels.packed_bytes(format, panels * kernels.lanes, columns)
    )
    bits = {"Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8, "IQ4_NL": 8}.get(format, 4)
    weight_bytes = panels * kernels.lanes * columns * bits // 8
    assert weight_bytes < size <= 1.5 * weight_bytes + panels * 4 * 64
    packed = [np.full(size, garbage, np.uint8) for garbage in (0x00, 0xA5)]
    for out in packed:
        kernels.pack(format, data, rows, columns, out)
    np.testing.assert_array_equal(packed[0], packed[1])


def test_kernels_refuse_what_does_not_fit(kernels: ModuleType) -> None:
    data, x, y = np.zeros(18 * 2, np.uint8), np.zeros((1, 64), np.float32), np.zeros((1, 1), np.float32)
    calls = [
        ("product", ("Q9_9", data, 1, 64, x, y), "unknown number format Q9_9"),
        ("product", ("Q4_0", data, 1, 33, x, y), "33 columns do not divide into blocks of Q4_0"),
        ("product", ("Q4_0", data[1:], 1, 64, x, y), "size does not fit"),
        ("product", ("Q4_0", data, 1, 64, x[:, 1:].copy(), y), "shapes differ"),
        ("product", ("Q4_0", data, 0, 64, x, y), "must be positive"),
        ("dequantize", ("Q4_0", data, 1, 64, x[:, 1:].copy()), "wrong shape of the output"),
        ("packed_bytes", ("F32", 1, 64), "formats are packed"),
        ("packed_bytes", ("Q4_K", 1, 64), "64 columns do not divide into blocks of Q4_K"),
        ("pack", ("Q4_0", data, 1, 64, data.copy()), "wrong size of the packed output"),
    ]
    for name, arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            getattr(kernels, name)(*arguments)


def test_random_numbers_are_philox_s_at_the_ends_of_64_bits(kernels: ModuleType) -> None:
    ends = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    keys = [(seed, choice, position) for seed in ends for choice in ends for position in ends]
    keys += [tuple(key) for key in np.random.default_rng(7).integers(0, 2**64, (200, 3), np.uint64).tolist()]
    assert [kernels.uniform(*key) for key in keys] == [oracle.uniform(*key) for key in keys]


def test_machine_limits_are_rates(kernels: ModuleType) -> None:
    for measure in (kernels.read_bandwidth, kernels.int8_gemm_rate, kernels.fma_rate):
        assert measure(2, 0.01) > 1e6
        with pytest.raises(ValueError, match="threads 1 to 1024"):
            measure(0, 0.01)


def test_instruction_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = native.supported()
    assert names[-1] == "plain"
    monkeypatch.delenv("LLAMA2_ISA", raising=False)
    assert native.module().isa == names[0]
    for name in names:
        monkeypatch.setenv("LLAMA2_ISA", name)
        assert native.module().isa == name
    monkeypatch.setenv("LLAMA2_ISA", "mmx")
    with pytest.raises(EngineError, match=r"'mmx' does not run here; LLAMA2_ISA may be one of .*plain"):
        native.module()


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA2_THREADS", raising=False)
    assert 1 <= native.default_threads() <= (os.cpu_count() or 1)
    monkeypatch.setattr(native, "processors", lambda: 3)  # as a container's quota may have it
    assert native.default_threads() == 3
    monkeypatch.setenv("LLAMA2_THREADS", "7")
    assert native.default_threads() == 7
    for wrong in ("0", "-1", "1025", "two", "1.5", "²", "9" * 5000):
        monkeypatch.setenv("LLAMA2_THREADS", wrong)
        with pytest.raises(EngineError, match="must be a number from 1 to 1024"):
            native.default_threads()
