"""Number formats against the `gguf` package, bit for bit, and against hand arithmetic."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType

from llama2 import native
from llama2.checkpoint import quantization
from llama2.errors import CheckpointError
from models import random_weights

WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
FORMATS = [*WRITTEN, "IQ4_NL"]
ROUNDED = WRITTEN[:8]
SEARCHED = WRITTEN[4:]


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8).ravel()


def test_formats_are_gguf_s() -> None:
    assert set(quantization.FORMATS) == set(FORMATS)
    for name, format in quantization.FORMATS.items():
        assert name == format.name
        assert GGMLType(format.ggml_type).name == name
        assert (format.block, format.size) == gguf.GGML_QUANT_SIZES[GGMLType[name]]
        assert format.size == format.layout.itemsize
        file_type = gguf.LlamaFileType(format.file_type).name
        assert file_type in ("ALL_F32" if name == "F32" else f"MOSTLY_{name}", f"MOSTLY_{name}_M")


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_equals_gguf_bit_for_bit(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_CHUNK", 4096)  # several chunks, the last one short
    rng = np.random.default_rng(1)
    shape = (37, 768)
    rule = quantization.FORMATS[format]
    random = rng.integers(0, 256, quantization.nbytes(format, shape), dtype=np.uint8).view(rule.layout)
    for name in rule.layout.names or ():  # any bytes, but finite scales
        if rule.layout[name].kind == "f":
            random[name] = rng.normal(0, 1, len(random))
    plausible = random_weights(format, shape, rng)
    for data in (random.view(np.uint8), bits(plausible)):
        rows = data.reshape(shape[0], -1)
        expected = gguf.quants.dequantize(rows, GGMLType[format])
        result = quantization.dequantize(data, format, shape)
        assert result.dtype == np.float32
        assert result.shape == shape
        assert np.array_equal(bits(result), bits(expected))


@pytest.mark.parametrize("format", ROUNDED)
def test_quantize_equals_gguf_bit_for_bit(format: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (64, 512)) * np.exp(rng.normal(0, 2, (64, 512)))
    x[0] = 0
    x[1] = -3.5
    x[2] = (np.arange(512) % 32 - 16) / 2
    x[2, ::32] = 127  # a scale of 1 in Q8_0, so that halves are ties
    x = x.astype(np.float32)
    assert np.array_equal(quantization.quantize(x, format), bits(gguf.quants.quantize(x, GGMLType[format])))


def test_bf16_keeps_nan_and_infinity() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e-40], np.float32)
    x[0:1].view(np.uint32)[0] = 0x7F800001  # its payload is lost by cutting the low half
    assert np.array_equal(quantization.quantize(x, "BF16"), bits(gguf.quants.quantize(x, GGMLType.BF16)))


def test_hand_arithmetic() -> None:
    # Q4_0: the largest magnitude −4 gives d = 0.5 and code 0; 0 is code 8; 3.5 is code 15.
    x = np.zeros(32, np.float32)
    x[0], x[16] = -4, 3.5
    data = quantization.quantize(x, "Q4_0")
    assert data.tobytes() == np.float16(0.5).tobytes() + bytes([0xF0]) + bytes([0x88] * 15)
    assert np.array_equal(quantization.dequantize(data, "Q4_0", (32,)), x)


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
    assert quantization.nbytes(format, shape) == expected


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="multiple of 32 weights, and the tensor has 33"):
        quantization.nbytes("Q4_0", (2, 33))
    with pytest.raises(CheckpointError, match="Q4_K needs rows of a multiple of 256 weights, and the tensor has 32"):
        quantization.quantize(np.zeros(32, np.float32), "Q4_K")


@pytest.mark.parametrize("format", FORMATS)
def test_is_finite(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_CHUNK", 4096)
    rule = quantization.FORMATS[format]
    shape = (16, 768)
    data = bits(random_weights(format, shape, np.random.default_rng(3))).copy()
    assert quantization.is_finite(data, format)
    assert quantization.is_finite(np.zeros_like(data), format)  # blocks of zeros have scale zero
    fields = [name for name in rule.layout.names or () if rule.layout[name].kind == "f"] or ["bits"]
    for field in fields:
        for value in (np.nan, np.inf, -np.inf):
            damaged = data.copy()
            blocks = damaged.view(rule.layout)
            blocks[field][-1] = 0x7FC0 if field == "bits" else value
            assert not quantization.is_finite(damaged, format)


#: Bits of a weight, and whether a group has a minimum.
SHAPES = {
    "Q4_0": (4, False), "Q5_0": (5, False), "Q3_K": (3, False), "Q6_K": (6, False),
    "Q4_1": (4, True), "Q5_1": (5, True), "Q2_K": (2, True), "Q4_K": (4, True), "Q5_K": (5, True),
}  # fmt: skip


def weights(rows: int = 8, columns: int = 768) -> np.ndarray:
    """Long-tailed weights, and rows that a search for scales may stumble over."""
    x = np.random.default_rng(4).standard_t(4, (rows, columns)).astype(np.float32) * np.float32(0.02)
    x[0] = 0
    x[1, 300:] = 0.5
    x[2] = -0.25
    x[3] = np.abs(x[3])
    x[4] *= np.float32(1e3)
    x[5, ::32] = 5
    return x


def relative(x: np.ndarray, y: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(np.sqrt((importance * (x - y) ** 2).sum() / (importance * x**2).sum()))


@pytest.mark.parametrize("format", SEARCHED)
def test_written_bytes_mean_what_gguf_reads(format: str) -> None:
    x = weights()
    data, error = quantization.requantize(
        x.view(np.uint8).ravel(), "F32", x.shape, format, np.ones(x.shape[1], np.float32)
    )
    y = gguf.quants.dequantize(data.reshape(len(x), -1), GGMLType[format])
    assert not y[0].any()
    assert error == pytest.approx(relative(x, y), rel=1e-6)


@pytest.mark.parametrize("format", SEARCHED)
def test_search_is_as_good_as_trying_everything(format: str) -> None:
    """One group of a block is not zero, so that in K formats too its scale and minimum are free.

    What is least is Σ √(1 + x² / mean x²) (x − y)².
    """
    bits, has_min = SHAPES[format]
    block = quantization.FORMATS[format].block
    group = 32 if block == 32 or format in ("Q4_K", "Q5_K") else 16
    rng = np.random.default_rng(5)
    x = np.zeros((12, block), np.float32)
    x[:, :group] = rng.normal(0, 1, (12, group)).astype(np.float32)
    y = quantization.dequantize(quantization.quantize(x, format, np.ones(block, np.float32)), format, x.shape)
    top = 2**bits - 1 if has_min else 2 ** (bits - 1) - 1
    low = 0 if has_min else -top - 1
    ours = best = 0.0
    for row, found in zip(x[:, :group].astype(float), y[:, :group], strict=True):
        least, w = np.inf, np.sqrt(1 + row**2 / (row**2).mean())
        spans = np.linspace(0.6, 1.3, 61)
        for d in np.ptp(row) * spans / top if has_min else np.outer([1, -1], np.abs(row).max() * spans / -low).ravel():
            for m in row.min() * np.linspace(0.6, 1.2, 31) if has_min else [0.0]:
                q = np.clip(np.round((row - m) / d), low, top)
                least = min(least, (w * (row - (d * q + m)) ** 2).sum())
        best += least
        ours += (w * (row - found) ** 2).sum()
    assert ours <= 1.02 * best, ours / best


@pytest.mark.parametrize("format", SEARCHED)
def test_important_columns_lose_less(format: str) -> None:
    rng = np.random.default_rng(6)
    x = weights()[3:]
    importance = np.exp(rng.normal(0, 2, x.shape[1])).astype(np.float32)
    alike = np.ones(x.shape[1], np.float32)
    losses = [
        relative(x, quantization.dequantize(quantization.quantize(x, format, w), format, x.shape), importance)
        for w in (importance, alike)
    ]
    assert losses[0] < 0.95 * losses[1]


@pytest.mark.parametrize(
    ("format", "theirs"),
    [("Q2_K", 0.29635), ("Q3_K", 0.15084), ("Q4_K", 0.07134), ("Q5_K", 0.03609), ("Q6_K", 0.01772)],
)
def test_normal_weights_lose_less_than_by_llama_quantize(format: str, theirs: float) -> None:
    """`theirs` is what llama-quantize --pure lost of 9 matrices of such weights, read back from its file."""
    x = np.random.default_rng(10).standard_normal((512, 1024), np.float32)
    assert quantization.requantize(x.view(np.uint8).ravel(), "F32", x.shape, format)[1] < theirs


@pytest.mark.parametrize("format", SEARCHED)
def test_large_weights_count_more(format: str) -> None:
    """Importance that cancels what large weights of a single row count more makes them lose more, and the rest less."""
    x = np.random.default_rng(9).standard_t(4, (1, 256 * 64)).astype(np.float32)
    group = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}.get(format, 32)
    squares = (x.reshape(-1, group) ** 2).astype(np.float64)
    counts = np.sqrt(1 + squares / squares.mean(axis=1, keepdims=True)).reshape(-1)
    usual, cancelled = (
        quantization.dequantize(quantization.quantize(x, format, w.astype(np.float32)), format, x.shape)
        for w in (np.ones_like(counts), 1 / counts)
    )
    assert relative(x, usual, counts) < relative(x, cancelled, counts)
    assert relative(x, usual) > relative(x, cancelled)


@pytest.mark.parametrize("format", SEARCHED)
def test_same_bytes_on_every_instruction_set(format: str) -> None:
    x = weights()
    importance = np.exp(np.random.default_rng(7).normal(0, 1, x.shape[1])).astype(np.float32)
    data = quantization.quantize(x, format, importance)
    for isa in native.supported():
        for threads in (1, 3):
            out = np.empty_like(data)
            native.module(isa).quantize("F32", x.view(np.uint8).ravel(), *x.shape, format, importance, out, threads)
            assert np.array_equal(out, data), (isa, threads)


def test_requantize_reads_every_format() -> None:
    rng = np.random.default_rng(8)
    for format in FORMATS:
        data = bits(random_weights(format, (5, 512), rng))
        floats = quantization.dequantize(data, format, (5, 512))
        same, _ = quantization.requantize(data, format, (5, 512), "Q4_K")
        assert np.array_equal(same, quantization.quantize(floats, "Q4_K"))
        assert quantization.requantize(data, format, (5, 512), "F32")[1] == 0


def test_iq4_nl_is_read_alone() -> None:
    with pytest.raises(CheckpointError, match="IQ4_NL is a format that is read, and not written"):
        quantization.quantize(np.zeros(32, np.float32), "IQ4_NL")


def test_an_error_that_is_not_finite_tells_of_weights_that_are_not() -> None:
    for value, format in ((np.nan, "Q4_K"), (np.inf, "Q6_K"), (1e30, "F16"), (1e30, "Q4_0")):
        x = np.ones((1, 256), np.float32)
        x[0, 77] = value
        assert not np.isfinite(quantization.requantize(x.view(np.uint8).ravel(), "F32", x.shape, format)[1])
