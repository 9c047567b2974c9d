"""llama2.c's files: what struct and the specification write is read, and what is written has the same bytes."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama2 import checkpoint
from llama2.checkpoint import llama2c
from llama2.config import SIZES, ModelConfig, RopeScaling
from llama2.engine.runner import Batch
from llama2.engine.runner_native import NativeRunner
from llama2.engine.runner_numpy import NumpyRunner
from llama2.errors import CheckpointError, TokenizerError
from llama2c_bytes import (
    CONFIG,
    GROUP,
    Weights,
    header,
    llama_tokens,
    random_weights,
    sizes,
    tokenizer_bin,
    version_0,
    version_1,
    version_2,
)
from meta_bytes import random_tensors, tokenizer_model, write_folder
from models import tiny_config, write_tiny_gguf
from texts import strings

CONFIGS = {
    "grouped": CONFIG,
    "tied": replace(CONFIG, tied_embeddings=True),
    "multi-head": replace(CONFIG, n_kv_heads=4, n_layers=3, vocab_size=301, context_length=7),
}


def assert_holds(model: checkpoint.Checkpoint, weights: Weights) -> None:
    assert list(model.tensors) == list(weights)
    for name, expected in weights.items():
        tensor = model.tensors[name]
        assert (tensor.name, tensor.format, tensor.shape) == (name, "F32", expected.shape)
        assert tensor.data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("version", "encode"), [(0, version_0), (1, version_1)])
def test_floats(version: int, encode: Any, config: ModelConfig, tmp_path: Path) -> None:
    weights = random_weights(config)
    path = tmp_path / "stories.bin"
    path.write_bytes(encode(config, weights))
    model = checkpoint.open(path)
    assert model.config == config
    assert_holds(model, weights)
    assert (model.format, model.name, model.path, model.metadata["version"]) == ("llama2c", "stories", path, version)
    assert not any(tensor.data.flags.owndata or tensor.data.flags.writeable for tensor in model.tensors.values())


def quantised(weights: Weights) -> tuple[dict[str, tuple[Any, Any]], Weights]:
    """Integers and scales of each matrix by llama2.c's rule in PyTorch, and all weights as they then are."""
    groups, values = {}, {}
    for name, weight in weights.items():
        if weight.ndim == 1:
            values[name] = weight
            continue
        w = torch.from_numpy(weight).reshape(-1, GROUP)
        scale = torch.abs(w).max(dim=1).values / 127.0
        integers = torch.round(w / scale[:, None]).to(torch.int8)
        groups[name] = integers.numpy(), scale.numpy()
        values[name] = (integers.float() * scale[:, None]).reshape(weight.shape).numpy()
    return groups, values


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_groups_of_integers(config: ModelConfig, tmp_path: Path) -> None:
    weights = random_weights(config)
    groups, values = quantised(weights)
    path = tmp_path / "a.bin"
    path.write_bytes(version_2(config, weights, groups))
    model = checkpoint.open(path)
    assert model.config == config
    assert dict(model.metadata) == {"version": 2, "group_size": GROUP}
    assert_holds(model, values)


@pytest.mark.parametrize(
    ("size", "version", "expected"),
    [  # spec 12.1; 13B: 4 bytes a parameter, which no 32-bit number holds, and the header
        ("7B", 0, 26_954_711_068),
        ("7B", 1, 26_953_662_720),
        ("7B", 2, 7_160_348_928),
        ("13B", 1, 4 * 13_015_864_320 + 256),
        ("70B", 1, 4 * 68_976_648_192 + 256),
    ],
)
def test_exact_sizes(size: str, version: int, expected: int, tmp_path: Path) -> None:
    """On files that are all holes but for their header."""
    config = replace(SIZES[size], context_length=2048)
    start = struct.pack("<7i", *sizes(config, -1)) if version == 0 else bytearray(header(config, version))
    if version == 2:
        struct.pack_into("<i", start, 37, 64)  # type: ignore[arg-type]
    path = tmp_path / "large.bin"
    path.write_bytes(start)
    for nbytes in (expected - 1, expected + 1):
        os.truncate(path, nbytes)
        with pytest.raises(CheckpointError, match=rf"has {nbytes} bytes, and its header makes {expected};"):
            checkpoint.open(path)
    os.truncate(path, expected)
    model = checkpoint.open(path)
    assert model.config == config
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == config.tensor_shapes()


@pytest.fixture
def source(tmp_path: Path) -> checkpoint.Checkpoint:
    """A model of Meta's in float32, whose context is known."""
    config = replace(CONFIG, vocab_size=704)
    params = {"dim": 64, "multiple_of": 32, "ffn_dim_multiplier": 0.5, "n_heads": 4, "n_kv_heads": 2}
    tensors = random_tensors(config, torch.float32)
    return checkpoint.open(write_folder(tmp_path / "meta", tensors, 2, **params, max_seq_len=5000))


def weights_of(model: checkpoint.Checkpoint) -> Weights:
    return {name: tensor.dequantize() for name, tensor in model.tensors.items()}


@pytest.mark.parametrize("version", [0, 1, 2])
def test_what_is_written(version: int, source: checkpoint.Checkpoint, tmp_path: Path) -> None:
    """The bytes of the specification: only the tables of version 0, which struct does not compute, are left out."""
    llama2c.write(source, tmp_path / "a.bin", version=version)
    written, config, weights = (tmp_path / "a.bin").read_bytes(), source.config, weights_of(source)
    if version == 2:
        assert written == version_2(config, weights, quantised(weights)[0])
    elif version == 1:
        assert written == version_1(config, weights)
    else:
        expected = version_0(config, weights)
        at = expected.index(b"\x7f" * 99)
        end = at + 5000 * 16 * 4
        assert (len(written), written[:at], written[end:]) == (len(expected), expected[:at], expected[end:])
        angles = np.outer(np.arange(5000), 10000.0 ** (-np.arange(0, 16, 2) / 16))
        tables = np.frombuffer(written[at:end], "<f4").reshape(2, 5000, 8)
        np.testing.assert_allclose(tables, [np.cos(angles), np.sin(angles)], atol=1e-6)
    assert (tmp_path / "tokenizer.bin").read_bytes() == tokenizer_bin(llama_tokens(tokenizer_model()))
    model = checkpoint.open(tmp_path / "a.bin")
    assert model.config == source.config
    assert_holds(model, quantised(weights)[1] if version == 2 else weights)
    text = "don't, naïve — 12345"
    assert model.tokenizer.encode(text, bos=True) == source.tokenizer.encode(text, bos=True)


@pytest.mark.parametrize("version", [0, 1])
def test_a_tied_model_comes_back_as_it_was(version: int, tmp_path: Path) -> None:
    config = tiny_config(tied_embeddings=True, norm_eps=1e-5)
    weights = write_tiny_gguf(tmp_path / "a.gguf", config=config, format="Q5_0")
    llama2c.write(checkpoint.open(tmp_path / "a.gguf"), tmp_path / "a.bin", version=version)
    model = checkpoint.open(tmp_path / "a.bin")
    assert model.config == config
    assert all(np.array_equal(tensor.dequantize(), weights[name]) for name, tensor in model.tensors.items())


def test_weights_of_zero_stay_zero(tmp_path: Path, source: checkpoint.Checkpoint) -> None:
    tensor = source.tensors["output.weight"]
    source.tensors = {**source.tensors, tensor.name: replace(tensor, source=np.zeros(tensor.nbytes, np.uint8))}
    llama2c.write(source, tmp_path / "a.bin", version=2)
    model = checkpoint.open(tmp_path / "a.bin")
    assert not model.tensors["output.weight"].dequantize().any()
    assert model.tensors["norm.weight"].dequantize().all()


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("runner", [NativeRunner, NumpyRunner])
def test_logits_equal_those_of_gguf(version: int, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA2_HOME", str(tmp_path / "home"))
    weights = write_tiny_gguf(tmp_path / "a.gguf", config=CONFIG)
    (tmp_path / "a.bin").write_bytes((version_0, version_1)[version == 1](CONFIG, weights))
    if version == 2:
        groups, values = quantised(weights)
        (tmp_path / "a.bin").write_bytes(version_2(CONFIG, weights, groups))
        (tmp_path / "b.bin").write_bytes(version_1(CONFIG, values))
    other = tmp_path / ("b.bin" if version == 2 else "a.gguf")
    ids = np.random.default_rng(0).integers(3, 320, 40, dtype=np.int32)
    zeros, places = np.zeros(40, np.int32), np.arange(40, dtype=np.int32)
    batch = Batch(ids, places, zeros, np.array([[0, 1]], np.int32), places)
    logits = [runner(checkpoint.open(path), 2).forward(batch) for path in (other, tmp_path / "a.bin")]
    assert np.ptp(logits[0]) > 1
    assert np.array_equal(logits[0].view(np.uint32), logits[1].view(np.uint32))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": 1e-6},
        {"rope_theta": 500000.0},
        {"rope_scaling": RopeScaling("linear", factor=2.0)},
        {"head_dim": 8},
    ],
)
def test_what_cannot_be_expressed(changes: dict[str, Any], tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf", config=tiny_config(**changes))
    with pytest.raises(CheckpointError, match=r"llama2\.c's files need norm_eps=1e-05, rope_theta=10000 without scal"):
        llama2c.write(checkpoint.open(tmp_path / "a.gguf"), tmp_path / "a.bin")
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_other_refusals_to_write(tmp_path: Path, source: checkpoint.Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"version=3 of llama2\.c's files is not known; choose 0, 1 or 2"):
        llama2c.write(source, tmp_path / "a.bin", version=3)
    write_tiny_gguf(tmp_path / "a.gguf", tokenizer="bpe")
    with pytest.raises(CheckpointError, match="needs a SentencePiece vocabulary with <unk>, <s> and </s> at"):
        llama2c.write(checkpoint.open(tmp_path / "a.gguf"), tmp_path / "a.bin")
    source.tokenizer.bos_id = 7
    with pytest.raises(CheckpointError, match="needs a SentencePiece vocabulary with <unk>, <s> and </s> at"):
        llama2c.write(source, tmp_path / "a.bin")
    source.tokenizer.bos_id = 1
    (tmp_path / "tokenizer.bin").write_bytes(b"another model's")
    with pytest.raises(CheckpointError, match=r"tokenizer\.bin: is another model's tokenizer; choose another folder"):
        llama2c.write(source, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 704 tokens without a tokenizer."""
    config = replace(CONFIG, vocab_size=704, n_layers=1)
    (tmp_path / "a.bin").write_bytes(version_1(config, random_weights(config)))
    return tmp_path / "a.bin"


def test_the_tokenizer_equals_that_of_sentencepiece(model: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model.with_name("tokenizer.bin").write_bytes(tokenizer_bin(llama_tokens(tokenizer_model())))
    library = SentencePieceProcessor(model_proto=tokenizer_model())
    ours = checkpoint.open(model).tokenizer
    assert (ours.kind, ours.vocab_size, ours.add_bos) == ("sentencepiece", 704, True)
    assert (ours.bos_id, ours.eos_id, ours.control) == (1, 2, {"<s>": 1, "</s>": 2})
    for text in strings(200):
        if "<tool>" not in text and "▁▁▁" not in text.replace(" ", "▁"):  # user-defined tokens are ordinary there
            assert ours.encode(text) == library.encode(text), text
        if "▁" not in text:  # which stands for a space
            assert ours.decode(ours.encode(text)) == text


def test_a_tokenizer_from_elsewhere(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer in .*tokenizer\.bin; give its file with --tokenizer"):
        checkpoint.open(model).tokenizer  # noqa: B018
    (tmp_path / "tok704.bin").write_bytes(tokenizer_bin(llama_tokens(tokenizer_model())))
    (tmp_path / "tok704.model").write_bytes(tokenizer_model())
    files = (tmp_path / "tok704.bin", tmp_path / "tok704.model")
    ids = [checkpoint.open(model, tokenizer=file).tokenizer.encode("12 345") for file in files]
    assert ids[0] == ids[1] != []
    with pytest.raises(TokenizerError, match=r"no tokenizer in .*absent; give"):
        checkpoint.open(model, tokenizer=tmp_path / "absent").tokenizer  # noqa: B018
    write_tiny_gguf(tmp_path / "a.gguf")
    with pytest.raises(TokenizerError, match="has 704 tokens, and the model 320; give the model's own tokenizer"):
        checkpoint.open(tmp_path / "a.gguf", tokenizer=tmp_path / "tok704.model").tokenizer  # noqa: B018
