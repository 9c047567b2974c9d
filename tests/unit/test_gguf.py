"""The GGUF reader on files written by the `gguf` package."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Kind
from gguf import GGUFWriter
from gguf.gguf_writer import GGUFValue

import llama2.text.tokenizer
from gguf_bytes import GGUFBytes
from llama2 import checkpoint
from llama2.config import ModelConfig, RopeScaling
from llama2.errors import CheckpointError
from models import TokenizerKind, tiny_config, write_tiny_gguf

FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def in_float32(config: ModelConfig) -> ModelConfig:
    """As GGUF stores it: its numbers are float32."""
    return replace(config, norm_eps=float(np.float32(config.norm_eps)), rope_theta=float(np.float32(config.rope_theta)))


def edit_keys(**changes: Any) -> Any:
    """An edit of a writer that sets or (None) drops keys; `__` in a name stands for a dot."""

    def edit(writer: GGUFWriter) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            writer.kv_data[0].pop(key, None)
            if value is not None:
                kind = Kind.FLOAT32 if isinstance(value, float) else Kind.get_type(value)
                writer.kv_data[0][key] = GGUFValue(value, kind)

    return edit


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_tiny_gguf(path, format=format, template="{{ messages }}")
    with checkpoint.open(path) as model:
        assert model.config == in_float32(tiny_config(format))
        assert model.tensors.keys() == weights.keys() == model.config.tensor_shapes().keys()
        for name, tensor in model.tensors.items():
            assert tensor.name == name
            assert tensor.format == ("F32" if tensor.name.endswith("norm.weight") else format)
            assert not tensor.data.flags.writeable
            assert np.array_equal(tensor.dequantize(), weights[name])
        model.check_finite()
        assert (model.path, model.format, model.name, model.licence) == (path, "gguf", "Tiny", "apache-2.0")
        assert model.template == "{{ messages }}"
        assert model.metadata["llama.block_count"] == 2
        assert list(model.metadata["tokenizer.ggml.tokens"][:3]) == ["<unk>", "<s>", "</s>"]
    assert not model.tensors


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(n_kv_heads=4),
        tiny_config(n_kv_heads=1, tied_embeddings=True),
        tiny_config(head_dim=32),
        tiny_config(n_layers=1, rope_theta=500000.0, norm_eps=1e-6, context_length=131072),
        tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
        tiny_config(rope_scaling=RopeScaling("llama3", divisors=(1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0))),
    ],
)
def test_configurations(config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_tiny_gguf(path, config=config)
    model = checkpoint.open(path)
    assert model.config == in_float32(config)
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == config.tensor_shapes()
    assert all(np.array_equal(model.tensors[name].dequantize(), weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edit_keys(llama__rope__freq_base=None), {"rope_theta": 10000.0}),
        (edit_keys(llama__rope__dimension_count=None), {"head_dim": 16}),
        (edit_keys(llama__vocab_size=None), {"vocab_size": 320}),
        (edit_keys(llama__rope__scale_linear=2.0), {"rope_scaling": RopeScaling("linear", factor=2.0)}),
        (edit_keys(llama__rope__scaling__factor=8.0), {"rope_scaling": RopeScaling("linear", factor=8.0)}),
        (edit_keys(llama__rope__scaling__type="none", llama__rope__scaling__factor=8.0), {"rope_scaling": None}),
        (lambda writer: writer.add_custom_alignment(64), {}),
    ],
)
def test_defaults_and_former_keys(edit: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_tiny_gguf(path, edit=edit)
    model = checkpoint.open(path)
    assert model.config == in_float32(tiny_config(**expected))
    assert np.array_equal(model.tensors["norm.weight"].dequantize(), weights["norm.weight"])


def test_heads_that_share_nothing_need_no_key(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    config = tiny_config(n_kv_heads=4)
    write_tiny_gguf(path, config=config, edit=edit_keys(llama__attention__head_count_kv=None))
    assert checkpoint.open(path).config == in_float32(config)


@pytest.mark.parametrize("version", [2, 3])
def test_versions(version: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(GGUFBytes(version=version).encode())
    model = checkpoint.open(path)
    assert model.config.tied_embeddings
    assert model.name == "tiny"
    assert model.licence is model.template is None
    assert gguf.GGUFReader(path).fields["GGUF.version"].contents() == version


@pytest.mark.parametrize(
    ("tokenizer", "pre", "expected"),
    [
        ("sentencepiece", "", {"pre": None, "merges": None, "add_bos": True, "add_space_prefix": True}),
        ("bpe", "smollm", {"pre": "smollm", "scores": None, "add_bos": False, "add_space_prefix": False}),
        ("bpe", "gpt-2", {"pre": "gpt2"}),
        ("bpe", "llama-v3", {"pre": "llama-bpe", "add_bos": True}),
    ],
)
def test_what_the_tokenizer_is_built_from(
    tokenizer: TokenizerKind, pre: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tokenizer=tokenizer, pre=pre, edit=edit_keys(tokenizer__ggml__add_bos_token=None))
    calls: list[dict[str, Any]] = []

    def record(kind: str, pieces: Any, **options: Any) -> str:
        calls.append({"kind": kind, "pieces": pieces, **options})
        return "tokenizer"

    monkeypatch.setattr(llama2.text.tokenizer, "from_vocabulary", record)
    model = checkpoint.open(path)
    assert not calls  # built on first use
    assert str(model.tokenizer) == str(model.tokenizer) == "tokenizer"
    (call,) = calls
    fields = gguf.GGUFReader(path).fields
    assert call.items() >= {"kind": tokenizer, "bos_id": 1, "eos_id": 2, "unk_id": 0, "eot_id": None}.items()
    assert call.items() >= {"add_eos": False, **expected}.items()
    assert list(call["pieces"]) == fields["tokenizer.ggml.tokens"].contents()
    assert call["types"] == fields["tokenizer.ggml.token_type"].contents()
    if tokenizer == "bpe":
        assert list(call["merges"]) == fields["tokenizer.ggml.merges"].contents()
    else:
        assert call["scores"] == fields["tokenizer.ggml.scores"].contents()


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "bpe"])
def test_the_tokenizer_works(tokenizer: TokenizerKind, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tokenizer=tokenizer)
    built = checkpoint.open(path).tokenizer
    assert built.decode(built.encode("the best of it — ☃")) == "the best of it — ☃"


def split(folder: Path) -> list[Path]:
    weights = write_tiny_gguf(folder / "whole.gguf")
    writer = GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=8)
    whole = gguf.GGUFReader(folder / "whole.gguf")
    for field in whole.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(weights) == 21
    return sorted(folder.glob("tiny-*.gguf"))


def test_split_model(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    model, whole = checkpoint.open(first), checkpoint.open(tmp_path / "whole.gguf")
    assert model.config == whole.config
    for name, tensor in whole.tensors.items():
        assert np.array_equal(model.tensors[name].data, tensor.data)

    with pytest.raises(CheckpointError, match=r"is one of 3 parts; open the first, named …-00001-of-00003\.gguf"):
        checkpoint.open(second)
    third.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=r"tiny-00003-of-00003\.gguf: no such file"):
        checkpoint.open(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match="is not part 3 of 3"):
        checkpoint.open(first)


def test_default_model_equals_what_gguf_reads(model_path: Path) -> None:
    model = checkpoint.open(model_path)
    assert model.config.parameters() == 134515008
    assert (model.licence, model.config.tied_embeddings, model.config.context_length) == ("apache-2.0", True, 8192)
    reader = gguf.GGUFReader(model_path)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for ours, name in [("layers.7.attention.wk", "blk.7.attn_k"), ("tok_embeddings", "token_embd")]:
        tensor, expected = model.tensors[f"{ours}.weight"], theirs[f"{name}.weight"]
        assert tensor.format == expected.tensor_type.name
        assert np.array_equal(tensor.data, np.asarray(expected.data).view(np.uint8).ravel())
    assert len(model.tensors) == len(theirs) == 272
    model.check_finite()


def test_default_model_opens_in_50_ms(model_path: Path) -> None:
    seconds = []
    for _ in range(10):
        start = time.process_time()  # of this process alone: the machine may be busy
        checkpoint.open(model_path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def test_other_formats_are_not_imported_for_gguf(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    program = "import sys; from llama2 import checkpoint; checkpoint.open(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", program, str(tmp_path / "tiny.gguf")]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "llama2.checkpoint.gguf" in modules
    assert not {"llama2.checkpoint.meta", "llama2.checkpoint.pth", "llama2.checkpoint.llama2c"} & {*modules}
