"""GGUF files written here, read by the `gguf` package and by the reader."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint, Tensor, gguf_writer, quantization
from llama2.config import BIASED, RopeScaling
from llama2.errors import CheckpointError
from models import TokenizerKind, tiny_config, write_tiny_gguf

#: ggml's number of what most of a file is.
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10} | {
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
}


def contents(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Each key's type and value, but for those that count what is in the file."""
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {name: ([int(kind) for kind in field.types], field.contents()) for name, field in fields.items()}


def rewrite(folder: Path, **options: Any) -> tuple[gguf.GGUFReader, gguf.GGUFReader, Checkpoint]:
    """A random Llama as the package writes it, as it is written here, and that as it is read here."""
    source, path = folder / "source.gguf", folder / "written.gguf"
    write_tiny_gguf(source, **options)
    gguf_writer.write(checkpoint.open(source), path)
    return gguf.GGUFReader(source), gguf.GGUFReader(path), checkpoint.open(path)


@pytest.mark.parametrize("format", FILE_TYPES)
def test_every_format(format: str, tmp_path: Path) -> None:
    theirs, ours, again = rewrite(tmp_path, format=format, template="{{ messages }}")
    before, after = contents(theirs), contents(ours)
    assert before.items() <= after.items()
    size = tiny_config(format).head_dim
    added = {
        "general.type": "model",
        "general.file_type": FILE_TYPES[format],
        "llama.attention.key_length": size,
        "llama.attention.value_length": size,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": True,
    } | ({} if "F" in format else {"general.quantization_version": 2})
    assert {name: value for name, (_, value) in after.items() if name not in before} == added
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert len(ours.tensors) == len(expected) == 21
    for tensor in ours.tensors:
        other = expected[tensor.name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (other.tensor_type, other.shape.tolist())
        assert np.array_equal(tensor.data, other.data)
        assert tensor.data_offset % 32 == 0
    source = checkpoint.open(tmp_path / "source.gguf")
    assert (again.config, again.template, again.licence) == (source.config, source.template, source.licence)
    assert again.name == "Tiny"
    assert again.tokenizer.vocabulary() == source.tokenizer.vocabulary()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.gguf", "written.gguf"]


@pytest.mark.parametrize(
    ("tokenizer", "pre", "theirs"),
    [
        ("sentencepiece", "", "default"),
        ("bpe", "smollm", "smollm"),
        ("bpe", "gpt2", "gpt-2"),
        ("bpe", "llama-v3", "llama-bpe"),
    ],
)
def test_vocabularies(tokenizer: TokenizerKind, pre: str, theirs: str, tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(300)

    before, after, again = rewrite(tmp_path, tokenizer=tokenizer, pre=pre, edit=edit)
    old, new = contents(before), contents(after)
    assert new["tokenizer.ggml.pre"][1] == theirs
    for name in ("model", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id"):
        key = f"tokenizer.ggml.{name}"
        assert new.get(key) == old.get(key), key
    assert again.tokenizer.stop_ids == checkpoint.open(tmp_path / "source.gguf").tokenizer.stop_ids
    text = "the best of it — ☃"
    assert again.tokenizer.decode(again.tokenizer.encode(text)) == text


def test_ends(tmp_path: Path) -> None:
    """Two besides EOS; a third is llama.cpp's by its text, <|endoftext|>."""
    source, path = tmp_path / "source.gguf", tmp_path / "written.gguf"
    write_tiny_gguf(source, tokenizer="bpe")
    model = checkpoint.open(source)
    assert model.tokenizer.stop_ids == {0, 2}
    model.tokenizer.stop_ids |= {300, 301}
    gguf_writer.write(model, path)
    keys = contents(gguf.GGUFReader(path))
    assert keys["tokenizer.ggml.eot_token_id"] == ([4], 300)
    assert keys["tokenizer.ggml.eom_token_id"] == ([4], 301)
    assert checkpoint.open(path).tokenizer.stop_ids == {0, 2, 300, 301}
    model.tokenizer.stop_ids |= {302}
    with pytest.raises(CheckpointError, match=r"tokens \[300, 301, 302\] end an answer, and GGUF has two besides EOS"):
        gguf_writer.write(model, path)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(n_kv_heads=1, tied_embeddings=True),
        tiny_config(head_dim=32, rope_theta=5e5, norm_eps=1e-6, context_length=131072),
        tiny_config(dim=51, n_heads=3, n_kv_heads=3, head_dim=14, hidden_dim=33, vocab_size=299),
        tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
        tiny_config(biases=BIASED, sliding_window=100),
        tiny_config(rope_scaling=RopeScaling("llama3", divisors=(1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0))),
    ],
)
def test_configurations(config: Any, tmp_path: Path) -> None:
    theirs, ours, again = rewrite(tmp_path, config=config)
    assert contents(theirs).items() <= contents(ours).items()
    expected = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == expected.keys()
    for tensor in ours.tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name])
    source = checkpoint.open(tmp_path / "source.gguf").config
    assert replace(again.config, rope_scaling=None) == replace(source, rope_scaling=None)
    np.testing.assert_allclose(again.config.inverse_frequencies(), source.inverse_frequencies(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("ends", "architecture"), [((32.0, 1.0), "llama"), ((16.0, 2.0), "mistral3")])
@pytest.mark.parametrize("attention_factor", [1 + 0.1 * math.log(8), 1.25])
def test_yarn(ends: tuple[float, float], architecture: str, attention_factor: float, tmp_path: Path) -> None:
    """llama.cpp multiplies YaRN's own factor by attn_factor, and reads the ends of its range of mistral3 alone."""
    scaling = RopeScaling(
        "yarn",
        factor=8.0,
        original_context=64,
        beta_fast=ends[0],
        beta_slow=ends[1],
        attention_factor=attention_factor,
    )
    config = tiny_config(rope_scaling=scaling, context_length=512)
    write_tiny_gguf(tmp_path / "source.gguf", config=config)
    model = checkpoint.open(tmp_path / "source.gguf")  # as llama.cpp's converter writes it
    assert model.config.rope_scaling == replace(scaling, attention_factor=float(np.float32(attention_factor)))
    gguf_writer.write(replace(model, config=config), tmp_path / "written.gguf")
    assert checkpoint.open(tmp_path / "written.gguf").config == replace(model.config, rope_scaling=scaling)
    written = {key: value for key, (_, value) in contents(gguf.GGUFReader(tmp_path / "written.gguf")).items()}
    assert written["general.architecture"] == architecture
    relative = written[f"{architecture}.rope.scaling.attn_factor"]
    assert relative * (1 + 0.1 * math.log(8)) == pytest.approx(attention_factor, rel=1e-6)
    open_ended = replace(config, rope_scaling=replace(scaling, truncate=False))
    with pytest.raises(CheckpointError, match="yarn without truncate"):
        gguf_writer.write(replace(model, config=open_ended), tmp_path / "other.gguf")


def test_divisors_of_llama3(tmp_path: Path) -> None:
    """The tensor has what transformers' rule divides the frequencies by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    write_tiny_gguf(tmp_path / "source.gguf", config=tiny_config(rope_theta=5e5, head_dim=64))
    model = checkpoint.open(tmp_path / "source.gguf")
    rule = RopeScaling("llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    model.config = replace(model.config, rope_scaling=rule)
    gguf_writer.write(model, tmp_path / "written.gguf")
    (found,) = (t.data for t in gguf.GGUFReader(tmp_path / "written.gguf").tensors if t.name == "rope_freqs.weight")
    numbers = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64)
    config.rope_parameters = {"rope_type": "llama3", **numbers}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(found, plain / scaled.numpy(), rtol=1e-5)
    assert found.max() == pytest.approx(32)


def test_norms_become_float32(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "source.gguf", format="BF16")
    model = checkpoint.open(tmp_path / "source.gguf")
    norm = model.tensors["norm.weight"]
    halves = quantization.quantize(norm.dequantize(), "F16")
    model.tensors = {**model.tensors, norm.name: Tensor(norm.name, "F16", norm.shape, lambda: halves)}
    gguf_writer.write(model, tmp_path / "written.gguf")
    (found,) = (t for t in gguf.GGUFReader(tmp_path / "written.gguf").tensors if t.name == "output_norm.weight")
    assert found.tensor_type.name == "F32"
    assert np.array_equal(found.data, halves.view("<f2").astype(np.float32))
