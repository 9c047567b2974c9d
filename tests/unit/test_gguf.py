"""The GGUF reader on files written by the `gguf` package."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Kind
from gguf import GGUFWriter
from gguf.gguf_writer import GGUFValue

import llama2.text.tokenizer
from gguf_bytes import U32, GGUFBytes, scalar
from llama2 import checkpoint
from llama2.checkpoint import gguf as reader
from llama2.config import ModelConfig, RopeScaling
from llama2.errors import CheckpointError
from llama2.text.tokenizer import Ends
from models import TokenizerKind, tiny_config, write_tiny_gguf

FORMATS = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
]


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
        ("sentencepiece", "", {"unk_id": 0, "ends": Ends(1, 2, add_bos=True), "prepend_scheme": "always"}),
        ("bpe", "smollm", {"pre": "smollm", "ends": Ends(1, 2)}),
        ("bpe", "gpt-2", {"pre": "gpt2"}),
        ("bpe", "llama-v3", {"pre": "llama-bpe", "ends": Ends(1, 2, add_bos=True)}),
    ],
)
def test_what_the_tokenizer_is_built_from(
    tokenizer: TokenizerKind, pre: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tokenizer=tokenizer, pre=pre, edit=edit_keys(tokenizer__ggml__add_bos_token=None))
    calls: list[dict[str, Any]] = []

    made = SimpleNamespace(stop_ids=frozenset(), notes=())

    def recorded(function: Any) -> Any:
        def record(*given: Any, **named: Any) -> SimpleNamespace:
            calls.append(inspect.signature(function).bind(*given, **named).arguments)
            return made

        return record

    name = "from_merges" if tokenizer == "bpe" else "from_scores"
    monkeypatch.setattr(llama2.text.tokenizer, name, recorded(getattr(llama2.text.tokenizer, name)))
    model = checkpoint.open(path)
    assert not calls  # built on first use
    assert model.tokenizer is model.tokenizer is made
    (call,) = calls
    fields = gguf.GGUFReader(path).fields
    assert {name: call[name] for name in expected} == expected
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


def edit_array(name: str, change: Callable[[list[Any]], list[Any]], kind: Kind | None = None) -> Any:
    """An edit of a writer that changes an array of the vocabulary."""

    def edit(writer: GGUFWriter) -> None:
        keys = writer.kv_data[0]
        old = keys[f"tokenizer.ggml.{name}"]
        keys[f"tokenizer.ggml.{name}"] = GGUFValue(change(list(old.value)), Kind.ARRAY, kind or old.sub_type)

    return edit


def without(*names: str) -> Any:
    return edit_keys(**{f"tokenizer__ggml__{name}": None for name in names})


# Token ids of llama.cpp (llama_tokenize of the release in llama-cpp-python 0.3.36), which opens each of these files.
SNOWMAN = "the best of it ☃\n"
SNOWMAN_IDS = {
    "sentencepiece": [259, 275, 266, 283, 280, 261, 297, 262, 284, 282, 229, 155, 134, 13],
    "bpe": [119, 275, 266, 104, 280, 261, 105, 262, 119, 35, 229, 155, 134, 13],
}
AS_IF_UNCHANGED: dict[str, tuple[TokenizerKind, Any]] = {
    "unchanged": ("sentencepiece", None),
    "padded with unknown tokens": ("sentencepiece", edit_array("token_type", lambda types: types[:310] + [2] * 10)),
    "no token types": ("sentencepiece", without("token_type")),
    "no bytes among the types": (
        "sentencepiece",
        edit_array("token_type", lambda types: [1 if kind == 6 else kind for kind in types]),
    ),
    "types that nobody knows": ("sentencepiece", edit_array("token_type", lambda types: [*types[:318], 0, 9])),
    "no scores": ("sentencepiece", without("scores")),
    "whole scores": ("sentencepiece", edit_array("scores", lambda scores: [int(s) for s in scores], Kind.INT32)),
    "scores behind the last token": ("sentencepiece", edit_array("scores", lambda scores: [*scores, 0.0])),
    "types behind the last token": ("sentencepiece", edit_array("token_type", lambda types: [*types, 1])),
    "empty tokens": ("sentencepiece", edit_array("tokens", lambda tokens: [*tokens[:318], "", ""])),
    "no ids": ("sentencepiece", without("bos_token_id", "eos_token_id", "unknown_token_id")),
    "spaces to remove": ("sentencepiece", edit_keys(tokenizer__ggml__remove_extra_whitespaces=True)),
    "another vocab_size": ("sentencepiece", edit_keys(llama__vocab_size=999)),
    "bpe": ("bpe", None),
    "bpe, padded with unknown tokens": ("bpe", edit_array("token_type", lambda types: types[:310] + [2] * 10)),
    "bpe, no token types": ("bpe", without("token_type")),
    "bpe, an empty token": ("bpe", edit_array("tokens", lambda tokens: [*tokens[:319], ""])),
    "bpe, unknown token out of range": ("bpe", edit_keys(tokenizer__ggml__unknown_token_id=999)),
    "bpe, BOS out of range that is not added": ("bpe", edit_keys(tokenizer__ggml__bos_token_id=999)),
}


@pytest.mark.parametrize("case", AS_IF_UNCHANGED)
def test_vocabularies_as_llama_cpp_reads_them(case: str, tmp_path: Path) -> None:
    kind, edit = AS_IF_UNCHANGED[case]
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tokenizer=kind, edit=edit)
    built = checkpoint.open(path).tokenizer
    assert built.encode(SNOWMAN) == SNOWMAN_IDS[kind]
    assert built.decode(SNOWMAN_IDS[kind]) == SNOWMAN
    assert built.eos_id == 2
    assert built.bos_id == (None if "BOS out of range" in case else 1)
    assert 2 in built.stop_ids
    if "no token types" not in case:
        assert built.token_bytes(319) == b""
    first = "<s>" if kind == "sentencepiece" else "<|im_start|>"
    assert built.encode(first, special=True) == ([] if built.bos_id is None and kind == "sentencepiece" else [1])


@pytest.mark.parametrize(
    ("kind", "edit", "notes"),
    [
        ("sentencepiece", None, []),
        ("sentencepiece", without("scores"), ["has the same score for every token"]),
        ("sentencepiece", edit_array("scores", lambda scores: [-1000.0] * 320), ["has the same score for every token"]),
        ("bpe", without("token_type"), ["has no token types"]),
        ("bpe", without("pre"), ["names no pre-tokenizer"]),
        ("bpe", edit_keys(tokenizer__ggml__pre="default"), ["names no pre-tokenizer"]),
    ],
)
def test_what_is_told_of_a_vocabulary(kind: TokenizerKind, edit: Any, notes: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tokenizer=kind, edit=edit)
    assert [note.partition(":")[0] for note in checkpoint.open(path).tokenizer.notes] == notes


@pytest.mark.parametrize(
    ("edit", "ends"),
    [
        (edit_keys(tokenizer__ggml__eom_token_id=300), {2, 300}),
        (edit_keys(tokenizer__ggml__eot_token_id=301, tokenizer__ggml__eom_token_id=300), {2, 300, 301}),
        (without("eos_token_id"), {2}),  # llama.cpp's default, a control token here
        (edit_array("token_type", lambda types: [2, 3, 1, *types[3:]]), {2}),
    ],
)
def test_ends(edit: Any, ends: set[int], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, edit=edit)
    assert checkpoint.open(path).tokenizer.stop_ids == ends


def test_ordinary_tokens_are_no_defaults(tmp_path: Path) -> None:
    """Where no id is named, and what llama.cpp takes is a word, a text does not begin or end with that."""
    path = tmp_path / "tiny.gguf"

    def edit(writer: GGUFWriter) -> None:
        without("bos_token_id", "eos_token_id")(writer)
        edit_array("token_type", lambda types: [2, 1, 1, *types[3:]])(writer)

    write_tiny_gguf(path, edit=edit)
    built = checkpoint.open(path).tokenizer
    assert (built.bos_id, built.eos_id, built.stop_ids) == (None, None, frozenset())


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    file = GGUFBytes()
    file.tensors = []
    path.write_bytes(file.encode())
    assert reader.read_tokenizer(path).decode([5]) == "a"
    assert reader.header(path)["llama.block_count"] == 1
    with pytest.raises(CheckpointError, match=r"lacks tensor"):
        checkpoint.open(path)
    path.write_bytes(file.set("general.architecture", scalar(8, "falcon")).encode())
    with pytest.raises(CheckpointError, match=r"has architecture 'falcon', and only llama and mistral3 are supported"):
        reader.read_tokenizer(path)
    file = GGUFBytes().set("tokenizer.ggml.unknown_token_id", scalar(U32, 9))
    path.write_bytes(file.encode())
    with pytest.raises(CheckpointError, match=r"unknown token 9 is not one of its 6 tokens; convert the model again"):
        reader.read_tokenizer(path)


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


def test_other_formats_are_not_imported_for_gguf(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    program = "import sys; from llama2 import checkpoint; checkpoint.open(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", program, str(tmp_path / "tiny.gguf")]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "llama2.checkpoint.gguf" in modules
    assert not {"llama2.checkpoint.meta", "llama2.checkpoint.pth", "llama2.checkpoint.llama2c"} & {*modules}


def test_mistral3_is_a_llama(tmp_path: Path) -> None:
    """Its keys begin with its own name; one that scales scores by position changes the arithmetic."""
    for scale in (0.0, 0.1):
        path = tmp_path / f"{scale}.gguf"
        write_tiny_gguf(path, architecture="mistral3", edit=lambda writer: writer.add_attn_temperature_scale(scale))  # noqa: B023
    write_tiny_gguf(tmp_path / "llama.gguf")
    config = checkpoint.open(tmp_path / "0.0.gguf").config
    assert config == checkpoint.open(tmp_path / "llama.gguf").config
    with pytest.raises(CheckpointError, match=r"sets mistral3\.attention\.temperature_scale, which no Llama does"):
        checkpoint.open(tmp_path / "0.1.gguf")
