"""Damaged and hostile folders of Hugging Face's format: a one-line reason, quickly, in little memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folders import DIM, Folder, safetensors
from llama2 import checkpoint
from llama2.errors import CheckpointError, TokenizerError
from refusals import MB, assert_refused_cheaply, refusal

Edit = Callable[[Folder], object]

NORM = "model.norm.weight"
EMBEDDINGS = "model.embed_tokens.weight"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config(**values: Any) -> Edit:
    return lambda folder: folder.config.update(values)


def without(*keys: str) -> Edit:
    return lambda folder: [folder.config.pop(key) for key in keys]


def file(name: str, content: bytes) -> Edit:
    return lambda folder: folder.files.update({name: content})


def whole(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Edit:
    return file(WHOLE, safetensors(header, data, length))


def tensor(name: str, **values: Any) -> Edit:
    return lambda folder: folder.header.update({name: values})


def index(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Folder) -> None:
        folder.shards()
        content = json.loads(folder.files[INDEX])
        change(content)
        folder.files[INDEX] = json.dumps(content).encode()

    return edit


def placed(place: str) -> Edit:
    return index(lambda content: content["weight_map"].update({NORM: place}))


def twice(folder: Folder) -> None:
    placed(WHOLE)(folder)
    folder.files["a.safetensors"] = folder.part([NORM])
    places = {name: name for name in (*folder.shards(), "a.safetensors")}
    folder.files[INDEX] = json.dumps({"weight_map": places}).encode()


def without_shard(folder: Folder) -> None:
    del folder.files[list(folder.shards())[1]]


def quantised(name: str, **values: Any) -> Edit:
    def edit(folder: Folder) -> None:
        folder.config |= values
        folder.tensors[f"model.layers.0.self_attn.{name}"] = np.zeros(2, "<f4")

    return edit


def rope(**values: Any) -> Edit:
    return config(rope_scaling=values)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEEP = b"[" * 10**5
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

FAULTS: dict[str, tuple[Edit, str]] = {
    # a safetensors file
    "header of no bytes": (whole(b""), "the header is not JSON"),
    "header of 2^63 bytes": (whole({}, length=2**63), "claims a header of 9223372036854775808 bytes"),
    "header of 2^64 - 1 bytes": (whole({}, length=2**64 - 1), "claims a header of 18446744073709551615 bytes"),
    "header of 101 MB": (whole({}, length=101 * MB), "claims a header of 105906176 bytes, and the limit is 16777216"),
    "header beyond the end": (whole({}, length=3), "the header needs bytes 8 to 11, and the file ends at 10"),
    "7 bytes": (file(WHOLE, bytes(7)), "the header's length needs bytes 0 to 8, and the file ends at 7"),
    "no bytes": (file(WHOLE, b""), "is empty"),
    "header that is a list": (whole(b"[]"), "the header is not a JSON object"),
    "header that is not UTF-8": (whole(b'{"\xff": 1}'), "the header is not UTF-8"),
    "deep header": (whole(DEEP), "the header is not JSON"),
    "deep object": (whole(b'{"a":' * 10**5), "the header is not JSON"),
    "name twice": (whole(b'{"a": 1, "a": 2}'), "the header has 'a' twice"),
    "field twice": (whole(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "the header has 'dtype' twice"),
    "NaN": (whole(b'{"a": NaN}'), "tensor 'a' has no format, no shape"),
    "number of 5000 digits": (
        whole(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'),
        "the header has a number of more than 4300 digits",
    ),
    "tensor that is a number": (whole({"a": 1}), "tensor 'a' has no format, no shape"),
    "no dimensions": (tensor(NORM, shape=[]), r"has 32 bytes, and F32 of shape \[\] needs 4"),
    "nine dimensions": (tensor(NORM, shape=[1] * 9), "has no format, no shape"),
    "dimension of 0": (tensor(NORM, shape=[0]), r"has 32 bytes, and F32 of shape \[0\] needs 0"),
    "two dimensions for one": (tensor(NORM, shape=[1, 8]), rf"'{NORM}' has shape \(1, 8\), not \(8,\)"),
    "dimension of -1": (tensor(NORM, shape=[-1]), "has no format, no shape"),
    "dimension that is true": (tensor(NORM, shape=[True]), "has no format, no shape"),
    "dimension of 8.0": (tensor(NORM, shape=[8.0]), "has no format, no shape"),
    "one offset": (tensor(NORM, data_offsets=[0]), "or no two offsets"),
    "offset of -4": (tensor(NORM, data_offsets=[-4, 28]), "or no two offsets"),
    "offsets backwards": (tensor(NORM, data_offsets=[32, 0]), r"has -32 bytes, and F32 of shape \[8\] needs 32"),
    "more bytes than numbers": (
        tensor(NORM, data_offsets=[2176, 2400]),
        r"has 224 bytes, and F32 of shape \[8\] needs 32",
    ),
    "dimensions whose product is 2^64": (
        tensor(NORM, shape=[2**32, 2**32]),
        "F32 of shape .* needs 73786976294838206464",
    ),
    "data beyond the end": (tensor(NORM, data_offsets=[2**40, 2**40 + 32]), "needs bytes .* and the file ends at"),
    "data at 2^64": (tensor(NORM, data_offsets=[2**64, 2**64 + 32]), "needs bytes .* and the file ends at"),
    "overlapping tensors": (tensor(NORM, data_offsets=[0, 32]), f"tensors '{NORM}' and '{EMBEDDINGS}' overlap"),
    "bytes of no tensor": (
        lambda folder: folder.files.update({WHOLE: folder.part([*folder.tensors]) + b"\0"}),
        r"has 2401 bytes for tensors that need 2400",
    ),
    "tensor without bytes": (whole({"a": ONE}), "needs bytes"),
    "format F8": (tensor(NORM, dtype="F8_E4M3"), "has 32 bytes, and F8_E4M3 of shape .* needs 8"),
    "format I32": (tensor(NORM, dtype="I32"), "has format 'I32'; supported are F32, F16, BF16"),
    "format F4": (tensor(NORM, dtype="F4"), "has format 'F4'; supported are F32, F16, BF16"),
    "format of no text": (tensor(NORM, dtype=[1]), "has no format, no shape"),
    "offsets backwards of a format F4": (tensor(NORM, dtype="F4", data_offsets=[32, 0]), "has -32 bytes"),
    "tensor missing": (lambda folder: folder.tensors.pop(NORM), f"lacks tensor '{NORM}'"),
    "output head missing": (lambda folder: folder.tensors.pop("lm_head.weight"), "lacks tensor 'lm_head.weight'"),
    "bias": (
        lambda folder: folder.tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(DIM, "<f4")}),
        "attention_bias is not true, and there is a tensor 'model.layers.0.self_attn.q_proj.bias'",
    ),
    "other shape": (
        lambda folder: folder.tensors.update({"model.layers.0.self_attn.k_proj.weight": np.zeros((8, 8), "<f4")}),
        r"tensor 'model.layers.0.self_attn.k_proj.weight' has shape \(8, 8\), not \(4, 8\)",
    ),
    # the index
    "../ in the index": (placed("../../etc/passwd"), "'../../etc/passwd' is not the name of a file in it"),
    "absolute path in the index": (placed("/etc/passwd"), "'/etc/passwd' is not the name of a file in it"),
    "drive in the index": (placed("C:x"), "'C:x' is not the name of a file in it"),
    "backslash in the index": (placed("a\\b"), "is not the name of a file in it"),
    "NUL in the index": (placed("a\0b"), r"'a\\x00b' is not the name of a file in it"),
    "surrogate in the index": (placed("\ud800"), r"'\\ud800' is not the name of a file in it"),
    "no name in the index": (placed(""), "'' is not the name of a file in it"),
    ".. in the index": (placed(".."), r"'\.\.' is not the name of a file in it"),
    "long name in the index": (placed("a" * 5000), "'a{77}…' is not the name of a file in it"),
    "shard missing": (without_shard, r"model-00002-of-00002\.safetensors: no such file"),
    "tensor of no shard": (
        lambda folder: (folder.shards(), folder.tensors.pop(NORM), folder.shards()),
        f"lacks tensor '{NORM}'",
    ),
    "tensor in two files that the index does not know": (twice, f"has tensor '{NORM}', which another file has"),
    "places that are a list": (index(lambda content: content.update(weight_map=[])), "has no weight_map"),
    "place that is a number": (index(lambda content: content["weight_map"].update(x=1)), "has no weight_map"),
    "no places": (index(lambda content: content.pop("weight_map")), "has no weight_map"),
    "index that is not JSON": (file(INDEX, b"{"), "it is not JSON"),
    "deep index": (file(INDEX, DEEP), "it is not JSON"),
    "tensor twice in the index": (file(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), "has 'a' twice"),
    # config.json
    "no configuration": (file("config.json", b"null"), "it is not a JSON object"),
    "deep configuration": (file("config.json", DEEP), "it is not JSON"),
    "key twice": (
        file("config.json", b'{"model_type": "llama", "model_type": "x"}'),
        "has model_type twice, with diff",
    ),
    "65 MB": (file("config.json", b" " * 65 * MB), "has 68157440 bytes, and the limit is 67108864"),
    "20 MB of lists": (file("config.json", b'{"a": [' + b"[]," * 7 * MB + b"0]}"), "could need .* MB of memory"),
    "huge number for a width": (config(hidden_size=10**4000), "hidden_size has 4001 digits"),
    "huge number for a frequency": (config(rope_theta=10**4000), "rope_theta has 4001 digits"),
    "tiny frequency": (config(rope_theta=1e-320), "rope_theta=1e-320 must be between"),
    "huge factor": (rope(type="linear", factor=1e300), r"factor=1e\+300 must be between"),
    "other model": (config(model_type="gemma"), 'model_type="gemma" is not supported'),
    "no model": (without("model_type"), "lacks model_type"),
    "long model": (config(model_type="x\n" * 9999), r'model_type="x\\nx.*… is not supported'),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        r"is a Llama without the head of a language model \(LlamaForSequenceClassification\)",
    ),
    "Gemma": (config(architectures=["GemmaForCausalLM"]), r"is a Gemma \(GemmaForCausalLM\), whose arithmetic is not"),
    "InternLM": (config(architectures=["InternLMForCausalLM"]), r"is an InternLM \(InternLMForCausalLM\), whose"),
    "Phi": (config(architectures=["PhiMoEForCausalLM"], auto_map={"AutoModel": "x"}), "is a PhiMoE"),
    "architecture of no text": (config(architectures=[{"a": 1}]), "architectures=.* is not supported"),
    "architecture with a line break": (config(architectures=["a\nb"]), "architectures=.* is not supported"),
    "bias of attention": (config(attention_bias=True), "attention_bias is true, and no tensor has such a bias"),
    "bias of the feed-forward part": (config(mlp_bias=True), "mlp_bias is true, and no tensor has such a bias"),
    "sliding window": (config(sliding_window=4), "sliding_window=4 is what no model_type llama has"),
    "no window": (config(model_type="mistral", sliding_window=0), "sliding_window=0 must be at least 1"),
    "a window in some layers": (
        config(model_type="mistral", sliding_window=4, layer_types=["full_attention", "sliding_attention"]),
        "has a sliding window in some layers alone",
    ),
    "GPTQ": (
        quantised("q_proj.qweight", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"holds GPTQ weights of 4 bits \('model.layers.0.self_attn.q_proj.qweight'\), which are not supported; choose",
    ),
    "AWQ, by a file": (
        lambda folder: (quantised("q_proj.qzeros")(folder), file("quant_config.json", b'{"w_bit": 4}')(folder)),
        "holds AWQ weights of 4 bits",
    ),
    "bitsandbytes": (
        quantised("q_proj.SCB", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "holds bitsandbytes weights of 8 bits",
    ),
    "compressed tensors": (
        quantised(
            "q_proj.weight_packed",
            quantization_config={
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
        ),
        "holds compressed-tensors weights of 4 bits",
    ),
    "FP8": (
        lambda folder: (
            config(quantization_config={"quant_method": "fp8"})(folder),
            folder.header.update({"model.layers.0.self_attn.q_proj.weight": {"dtype": "F4"}}),
        ),
        "holds FP8 weights of 8 bits",
    ),
    "quantised in an unknown way": (
        quantised("q_proj.scales", quantization_config="\x1b[2J"),
        "holds quantized weights",
    ),
    "other activation": (config(hidden_act="gelu"), 'hidden_act="gelu" is not supported'),
    "text for a width": (config(hidden_size="8"), "hidden_size must be a whole number"),
    "fraction for a width": (config(hidden_size=8.0), "hidden_size must be a whole number"),
    "truth for a width": (config(hidden_size=True), "hidden_size must be a whole number"),
    "no width": (without("hidden_size"), "lacks hidden_size"),
    "no layers": (config(num_hidden_layers=0), "n_layers=0 must be between"),
    "10^9 layers": (config(num_hidden_layers=10**9), "n_layers=1000000000 must be between"),
    "more layers": (config(num_hidden_layers=4096), r"lacks tensor 'model\.layers\.1\.input_layernorm\.weight'"),
    "no heads": (config(num_attention_heads=0), "n_heads=0 must be between"),
    "heads not a multiple of key heads": (
        config(num_key_value_heads=3),
        "n_heads=2 must be a multiple of n_kv_heads=3",
    ),
    "odd heads": (config(head_dim=3), "head_dim=3 must be even"),
    "negative width": (config(hidden_size=-8), "dim=-8 must be between"),
    "infinite epsilon": (file("config.json", b'{"rms_norm_eps": 1e999}'), "lacks model_type"),
    "epsilon is 0": (config(rms_norm_eps=0), "norm_eps=0.0 must be a positive number"),
    "base frequency is 0": (config(rope_theta=0), "rope_theta=0.0 must be a positive number"),
    "rows of another vocabulary": (config(vocab_size=7), rf"tensor '{EMBEDDINGS}' has shape \(6, 8\), not \(7, 8\)"),
    "BOS out of range": (config(bos_token_id=6), "bos_token_id 6 is not one of its 6 tokens"),
    "EOS that is text": (config(eos_token_id=["</s>"]), 'eos_token_id "</s>" is not one of its 6 tokens'),
    "EOS out of range": (config(eos_token_id=[2, 6]), "eos_token_id 6 is not one of its 6 tokens"),
    "scaling that is text": (config(rope_scaling="linear"), "rope_scaling must be a table"),
    "scaling that is a list": (config(rope_scaling=[1]), "rope_scaling must be a table"),
    "scaling longrope": (rope(type="longrope", factor=2.0), "rope scaling 'longrope' is not supported"),
    "scaling yarn without factor": (rope(type="yarn"), "lacks factor"),
    "scaling yarn by nothing": (
        rope(type="yarn", factor=2.0, attention_factor=0),
        "attention_factor=0.0 must be a pos",
    ),
    "scaling dynamic by half": (rope(rope_type="dynamic", factor=0.5), "factor=0.5 must be at least 1"),
    "scaling without a factor": (rope(type="linear"), "lacks factor"),
    "scaling by 0": (rope(type="linear", factor=0.0), "factor=0.0 must be a positive number"),
    "scaling by text": (rope(type="linear", factor="2"), "factor must be a number"),
    "scaling without its original context": (config(rope_scaling=LLAMA3), "lacks original_max_position_embeddings"),
    "scaling from nothing": (
        rope(**LLAMA3, original_max_position_embeddings=0),
        "original_context=0 must be 1 to",
    ),
    "scaling upside down": (
        rope(**LLAMA3 | {"low_freq_factor": 4.0}, original_max_position_embeddings=8192),
        "high_freq_factor must be larger",
    ),
    "scaling of no kind": (rope(factor=2.0), "lacks rope_type"),
    "scaling by kind of layer": (config(rope_parameters={"full_attention": {"rope_type": "yarn"}}), "lacks rope_type"),
    "two scalings": (
        config(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"type": "linear", "factor": 4.0}),
        "rope_parameters and rope_scaling contradict each other",
    ),
    "part of a head rotated": (
        config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "rotates a part of each head",
    ),
    # beside it
    "template without a text": (
        file("tokenizer_config.json", b'{"chat_template": [{"name": "rag"}]}'),
        "chat_template must be text, or several with names",
    ),
    "template that is a number": (file("tokenizer_config.json", b'{"chat_template": 1}'), "chat_template must be text"),
    "template that is not UTF-8": (file("chat_template.jinja", b"\xff"), "is not UTF-8"),
    "long template": (file("chat_template.jinja", b"x" * (MB + 1)), "has 1048577 bytes, and the limit is"),
}


def test_the_unchanged_folder_is_valid(tmp_path: Path) -> None:
    model = checkpoint.open(Folder().write(tmp_path / "model"))
    model.check_finite()
    assert model.tokenizer.encode("a a") == [5, 5]
    folder = Folder()
    folder.shards()
    assert checkpoint.open(folder.write(tmp_path / "sharded")).tensors.keys() == model.tensors.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str, tmp_path: Path) -> None:
    edit, reason = FAULTS[fault]
    folder = Folder()
    edit(folder)
    assert re.search(reason, refusal(folder.write(tmp_path / "model")))


def test_cut_short_at_every_byte(tmp_path: Path) -> None:
    path = Folder().write(tmp_path / "model") / WHOLE
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    for size in [path.stat().st_size - 1, 8 + header + 100, *reversed(range(8 + header + 1))]:
        os.truncate(path, size)
        refusal(path.parent)


def test_links(tmp_path: Path) -> None:
    """Of weights they may lead to any file, of others to one of the same name, and in the Hub's cache to its blobs."""
    outside = Folder().write(tmp_path / "outside")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in outside.iterdir():
        (linked / path.name).symlink_to(path)
    checkpoint.open(linked).check_finite()
    (linked / WHOLE).unlink()
    (outside / WHOLE).rename(outside / "weights")
    (linked / WHOLE).symlink_to(outside / "weights")
    checkpoint.open(linked).check_finite()
    (outside / "weights").rename(outside / WHOLE)
    assert f"{WHOLE}: is a link to a file that is not there" in refusal(linked)

    for name in ("config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"):
        path = Folder().write(tmp_path / f"linked-{name}")
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("/etc/passwd")
        assert f"{name}: is a link to 'passwd' outside of its folder" in refusal(path)

    inside = Folder().write(tmp_path / "inside")
    (inside / "config.json").rename(inside / "real")
    (inside / "config.json").symlink_to("real")
    checkpoint.open(inside)
    (tmp_path / "short").symlink_to(inside)
    checkpoint.open(tmp_path / "short")

    repository = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(outside.iterdir()):
        shutil.copy(file, repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert checkpoint.open(snapshot).name == "Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["config.json"], r"has config.json, and no weights \(model.safetensors or pytorch_model.bin\); download them"),
        (["config.json", "a.gguf", "b.gguf"], "has no weights but GGUF files; give one, such as 'a.gguf' in it"),
        (["config.json", "model-00001-of-00002.safetensors"], "and no index of such files; download it too"),
        (["config.json", "tf_model.h5"], "has its weights as 'tf_model.h5' alone, a format that is not supported"),
        (
            ["config.json", "quantize_config.json", "gptq_model.safetensors"],
            "holds GPTQ weights, which are not supported",
        ),
        (["config.json", INDEX], "has no weight_map from tensors to files"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin: is not a file of torch.save"),
        ([WHOLE], "has 'model.safetensors', and neither config.json nor params.json; download that too"),
        (["tokenizer.json", "tokenizer_config.json"], r"has a tokenizer \('tokenizer.json'\), and no model"),
        (["x.gguf"], "is a folder of GGUF files; give one, such as 'x.gguf' in it"),
        (["README.md"], "holds no model"),
        ([], "is an empty folder"),
    ],
)
def test_folders_that_lack_a_part(names: list[str], reason: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps(Folder().config if name == "config.json" else {}))
    assert re.search(reason, refusal(tmp_path))


@pytest.mark.parametrize("name", [WHOLE, "config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_is_no_file_or_a_pointer(name: str, tmp_path: Path) -> None:
    """A FIFO would wait for ever."""
    path = Folder().write(tmp_path / "model")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    assert f"{name}: is not a regular file" in refusal(path)
    (path / name).unlink()
    (path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476838400\n")
    assert f"{name}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in {path}" in refusal(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"],
)
def test_a_tokenizer_that_is_no_file_or_a_pointer(name: str, tmp_path: Path) -> None:
    model = checkpoint.open(Folder().write(tmp_path / "model"))
    if name == "tokenizer.model":  # which is not needed beside the other
        (model.path / "tokenizer.json").unlink()
    (model.path / name).unlink(missing_ok=True)
    os.mkfifo(model.path / name)
    with pytest.raises(TokenizerError, match=rf"{re.escape(str(model.path / name))}: is not a regular file"):
        model.tokenizer  # noqa: B018
    (model.path / name).unlink()
    (model.path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476838400\n")
    with pytest.raises(TokenizerError, match="is a pointer of Git LFS, not the file itself"):
        model.tokenizer  # noqa: B018


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers(weight: float, tmp_path: Path) -> None:
    folder = Folder()
    folder.tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = weight
    with pytest.raises(CheckpointError, match=r"'layers\.0\.attention\.wq\.weight' holds weights that are not finite"):
        checkpoint.open(folder.write(tmp_path / "model")).check_finite()


@pytest.mark.parametrize("options", [[], ["-O"]])
def test_time_and_memory(options: list[str], tmp_path: Path) -> None:
    """A second and 64 MB beyond the files' size, for everything above; also where `assert` does nothing."""
    huge: dict[str, Edit] = {
        "lists": whole(b'{"a": [' + b"[]," * 349_000 + b"[]]}"),
        "objects": file("config.json", b'{"a": [' + b"{}," * 349_000 + b"{}]}"),
        "small numbers": file("config.json", b'{"a": [' + b"1.5," * 640_000 + b"1]}"),
        "a long text": file("config.json", b'{"a": "' + b"a" * 60_000_000 + b'"}'),
        "numbers": whole(b'{"a": [' + b"1," * 520_000 + b"1]}"),
        "names": whole(b"{" + b",".join(b'"%d":0' % i for i in range(90_000)) + b"}"),
        "files": file(INDEX, json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(30_000)}}).encode()),
    }
    paths = []
    for i, edit in enumerate([*(edit for edit, _ in FAULTS.values()), *huge.values()]):
        folder = Folder()
        edit(folder)
        paths.append(folder.write(tmp_path / str(i)))
    assert_refused_cheaply(paths, options)


@pytest.mark.parametrize("options", [[], ["-O"]])
@pytest.mark.parametrize("fault", ["header of 2^63 bytes", "../ in the index", "Gemma", "scaling by 0"])
def test_command(fault: str, options: list[str], tmp_path: Path) -> None:
    """The program says why in one line, and ends with 1."""
    folder = Folder()
    FAULTS[fault][0](folder)
    path = folder.write(tmp_path / "model")
    program = "from llama2.cli.main import run; run()"
    run = subprocess.run(
        [sys.executable, *options, "-c", program, "show", str(path)], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(rf"llama2: error: {re.escape(str(path))}.*: .+\n", run.stderr)


def test_time_and_memory_of_tokenizers(tmp_path: Path) -> None:
    """As above; also with a tokenizer.model beside it, when tokenizer.json is read for its added tokens."""
    lists, pieces = b"[" + b"[]," * 20_000_000 + b"[]]", {str(i): i for i in range(100_000)}
    models = [{"merges": "@"}, {"vocab": "@"}, {"unk_token": "@"}, {"vocab": pieces}, {"vocab": {"x" * 200_000: 0}}]
    paths = []
    for i, model in enumerate(models):
        folder = Folder()
        folder.tokenizer["model"] |= model
        folder.files["tokenizer.json"] = json.dumps(folder.tokenizer).encode().replace(b'"@"', lists)
        if i % 2:
            folder.files["tokenizer.model"] = b"\x0a"
        paths.append(folder.write(tmp_path / str(i)))
    assert_refused_cheaply(paths, [])


def tokenizer_json(**values: Any) -> Edit:
    return lambda folder: folder.tokenizer.update(values)


def bpe(**values: Any) -> Edit:
    return lambda folder: folder.tokenizer["model"].update(values)


def merged(*merges: str) -> Edit:
    """A vocabulary in which aaa can be made in two ways."""
    pieces = ["<unk>", "a", "b", "aa", "aaa", "ab"]

    def edit(folder: Folder) -> None:
        folder.tokenizer["added_tokens"] = []
        folder.tokenizer["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [*merges]}

    return edit


def test_merges_that_stand_together(tmp_path: Path) -> None:
    folder = Folder()
    merged("a a", "aa a", "a aa", "a b")(folder)
    folder.config |= {"bos_token_id": None, "eos_token_id": None}
    assert checkpoint.open(folder.write(tmp_path / "model")).tokenizer.encode("aaaaa")[-2:] == [3, 4]  # aa aa a


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (merged("a a", "aa a", "a b", "a aa"), "merges to 'aaa' are not neighbours"),
        (merged("a a", "aa a", "a b"), "'aaa' is not made by all 2 merges"),
        (bpe(merges=[]), "'▁a' is not made by all 1 merges, which scores cannot express; choose hf"),
        (
            tokenizer_json(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}),
            "changes text by rules that only its tokenizer.json can say",
        ),
    ],
)
def test_vocabularies_that_no_other_format_can_say(edit: Edit, reason: str, tmp_path: Path) -> None:
    folder = Folder()
    edit(folder)
    tokenizer = checkpoint.open(folder.write(tmp_path / "model")).tokenizer
    assert tokenizer.encode("aaa")
    with pytest.raises(TokenizerError, match=reason):
        tokenizer.vocabulary()


@pytest.mark.parametrize("content", [b"\n\3abc", b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_tokenizer_model_beside_a_tokenizer_json_is_not_needed(content: bytes, tmp_path: Path) -> None:
    folder = Folder()
    file("tokenizer.model", content)(folder)
    tokenizer = checkpoint.open(folder.write(tmp_path / "model")).tokenizer
    assert tokenizer.encode("a") == [5]
    assert bool(tokenizer.notes) == (content[:1] != b"\n")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (bpe(type="Unigram"), "malformed"),
        (bpe(type="WordLevel", unk_token="<unk>"), "malformed|its model is WordLevel"),
        (bpe(vocab={str(i): i for i in range(7)}, merges=[]), "malformed|has 10 tokens, and the model 6 rows"),
        (bpe(vocab={"<unk>": 0, "▁": 1, "a": 10**9}, merges=[]), "the ids of its .* tokens are not 0 to"),
        (bpe(vocab=[1]), "malformed"),
        (tokenizer_json(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "neither byte-level nor"),
        (tokenizer_json(added_tokens=[{"id": 1}]), "malformed"),
        (file("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'), "malformed"),
        (file("tokenizer_config.json", b'{"added_tokens_decoder": {"-1": {"content": "x"}}}'), "malformed"),
        (tokenizer_json(added_tokens=[{"id": float("inf"), "content": "x"}]), "malformed"),
        (file("tokenizer.json", b"[]"), "is malformed"),
        (file("tokenizer.json", DEEP), "is malformed"),
    ],
)
def test_vocabularies_that_no_tokenizer_takes(edit: Edit, reason: str, tmp_path: Path) -> None:
    folder = Folder()
    edit(folder)
    path = folder.write(tmp_path / "model")
    with pytest.raises(TokenizerError, match=reason) as caught:
        checkpoint.open(path).tokenizer  # noqa: B018
    assert str(caught.value).startswith(f"{path}")
    assert str(caught.value).isprintable()
