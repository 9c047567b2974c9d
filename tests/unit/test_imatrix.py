"""Importance matrices: sums against the NumPy runner's inputs, files against the `gguf` package and hand-made bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from llama2 import checkpoint
from llama2.checkpoint import gguf_writer, imatrix
from llama2.convert import quantize
from llama2.engine import divergence, runner_numpy
from llama2.engine.runner_native import NativeRunner
from llama2.errors import CheckpointError, Llama2Error
from models import tiny_config, write_tiny_gguf

TOKENS = np.array([1, 270, 265, 280, 261, 299, 270, 3], np.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_sums_are_those_of_every_product_s_inputs(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", config=tiny_config(tied_embeddings=tied))
    normed, attended = [], []
    rms_norm, attend = runner_numpy.rms_norm, runner_numpy.attend

    def noted_norm(*arguments: object) -> np.ndarray:
        normed.append(rms_norm(*arguments))  # type: ignore[arg-type]
        return normed[-1]

    def noted_attend(*arguments: object) -> np.ndarray:
        attended.append(attend(*arguments))  # type: ignore[arg-type]
        return attended[-1]

    monkeypatch.setattr(runner_numpy, "rms_norm", noted_norm)
    monkeypatch.setattr(runner_numpy, "attend", noted_attend)
    with checkpoint.open(tmp_path / "m.gguf") as model:
        oracle = runner_numpy.NumpyRunner(model, 1)
        divergence.logits(oracle, TOKENS)
        native = NativeRunner(model, 1)
        sums = native.activation_statistics()
        divergence.logits(native, TOKENS)
    head = "tok_embeddings.weight" if tied else "output.weight"
    expected = {head: normed[-1][:-1]}  # after the last token nothing follows
    for i in range(2):
        x = normed[2 * i + 1]
        w1, w3 = (oracle.weights[f"layers.{i}.feed_forward.{name}"] for name in ("w1", "w3"))
        inputs = {"attention": {"wq": normed[2 * i], "wk": normed[2 * i], "wv": normed[2 * i]}, "feed_forward": {}}
        inputs["attention"]["wo"] = attended[i].reshape(len(TOKENS), -1)
        inputs["feed_forward"] = {"w1": x, "w3": x, "w2": runner_numpy.silu(x @ w1.T) * (x @ w3.T)}
        for room, matrices in inputs.items():
            expected |= {f"layers.{i}.{room}.{name}.weight": value for name, value in matrices.items()}
    assert sums.keys() == expected.keys()
    for name, inputs_of in expected.items():
        assert sums[name] == pytest.approx((inputs_of.astype(np.float64) ** 2).sum(axis=0), rel=0.05), name


def test_gguf_round_trip(tmp_path: Path) -> None:
    config = tiny_config()
    rng = np.random.default_rng(1)
    sums = {
        "layers.1.feed_forward.w2.weight": (rng.uniform(1, 9, config.hidden_dim), 1024),
        "output.weight": (rng.uniform(1, 9, config.dim), 1022),
    }
    gguf_writer.write_imatrix(sums, config, "text.txt", tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert [reader.fields[f"imatrix.chunk_{name}"].contents() for name in ("count", "size")] == [2, 512]
    theirs = {tensor.name: tensor.data for tensor in reader.tensors}
    assert theirs["blk.1.ffn_down.weight.counts"].tolist() == [[1024.0]]
    assert np.array_equal(
        theirs["blk.1.ffn_down.weight.in_sum2"][0], sums["layers.1.feed_forward.w2.weight"][0].astype(np.float32)
    )
    read = imatrix.read(tmp_path / "i.gguf", config)
    assert read.keys() == sums.keys()
    for name, mean in quantize.means(sums).items():
        assert read[name] == pytest.approx(mean, rel=1e-6)


def test_writing_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("mine")
    (tmp_path / "i.gguf.part").symlink_to(tmp_path / "private")
    sums = {"output.weight": (np.ones(tiny_config().dim), 512)}
    gguf_writer.write_imatrix(sums, tiny_config(), "text.txt", tmp_path / "i.gguf")
    assert (tmp_path / "private").read_text() == "mine"
    assert imatrix.read(tmp_path / "i.gguf", tiny_config()).keys() == sums.keys()


def dat(values: list[float], name: bytes = b"blk.0.attn_q.weight", calls: int = 4) -> bytes:
    entry = struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return struct.pack("<i", 1) + entry + struct.pack("<ii", calls, 4) + b"text"


def test_dat_files(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(dat([2.0] * 63 + [8.0]))
    read = imatrix.read(tmp_path / "i.dat", tiny_config())
    assert {name: values.tolist() for name, values in read.items()} == {
        "layers.0.attention.wq.weight": [0.5] * 63 + [2.0]
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dat([1.0] * 63), "has 63 columns of blk.0.attn_q.weight, and the model 64"),
        (dat([1.0] * 64, b"blk.9.attn_q.weight"), "no importance of any matrix of this model"),
        (dat([-1.0] * 64), "not all positive numbers"),
        (dat([float("nan")] * 64), "not all positive numbers"),
        (dat([1.0] * 64)[:100], "damaged or cut short"),
        (struct.pack("<i", -5), "the count of entries is -5"),
        (struct.pack("<ii", 1, 1 << 30), "damaged or cut short"),
    ],
)
def test_refusals(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        imatrix.read(tmp_path / "i.dat", tiny_config())


def test_shapes_are_looked_at_before_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """42 MB of a quantised format would become 500 MB of floats; the model has no layer 9."""
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "imatrix")
    for layer in (9, 0):
        writer.add_tensor(f"blk.{layer}.attn_q.weight.counts", np.ones((1, 1), np.float32))
        writer.add_tensor(f"blk.{layer}.attn_q.weight.in_sum2", np.ones((9, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dequantize, touched = checkpoint.Tensor.dequantize, []
    monkeypatch.setattr(
        checkpoint.Tensor, "dequantize", lambda tensor: touched.append(tensor.name) or dequantize(tensor)
    )
    with pytest.raises(CheckpointError, match=r"has 576 columns of blk\.0\.attn_q\.weight, and the model 64"):
        imatrix.read(tmp_path / "i.gguf", tiny_config())
    assert touched == ["blk.0.attn_q.weight.counts"]


def test_calibration_needs_a_window(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    with pytest.raises(Llama2Error, match="less than 256 tokens"):
        quantize.calibrate(tmp_path / "m.gguf", "too short")
    text = "to be or not to be that is the question " * 40
    sums = quantize.calibrate(tmp_path / "m.gguf", text)
    counts = {count for _, count in sums.values()}
    with checkpoint.open(tmp_path / "m.gguf") as model:
        tokens = 1 + len(model.tokenizer.encode(text))
    assert tokens <= max(counts) <= tokens + 8  # every window begins with BOS
    assert sums["output.weight"][1] == tokens - 1  # nothing is predicted from a window's last token


def test_importance_is_that_of_its_matrix(tmp_path: Path) -> None:
    config, name = tiny_config("Q4_K"), "layers.1.feed_forward.w2.weight"
    write_tiny_gguf(tmp_path / "m.gguf", config=config, format="F32")
    importance = np.exp(np.random.default_rng(2).normal(0, 2, config.hidden_dim)).astype(np.float32)
    quantize.quantize(tmp_path / "m.gguf", tmp_path / "a.gguf", "Q4_K_M")
    quantize.quantize(tmp_path / "m.gguf", tmp_path / "b.gguf", "Q4_K_M", importance={name: importance})
    with (
        checkpoint.open(tmp_path / "m.gguf") as model,
        checkpoint.open(tmp_path / "a.gguf") as alike,
        checkpoint.open(tmp_path / "b.gguf") as weighed,
    ):
        different = [n for n, t in alike.tensors.items() if not np.array_equal(t.data, weighed.tensors[n].data)]
        assert different == [name]
        x = model.tensors[name].dequantize()
        lost = [(importance * (x - each.tensors[name].dequantize()) ** 2).sum() for each in (alike, weighed)]
        assert lost[1] < 0.9 * lost[0]
