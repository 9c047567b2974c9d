"""LoRA adapters: what they are merged to, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from adapters import (
    ATTENTION,
    LINEAR,
    Arrays,
    folder_tensors,
    merged,
    random_parts,
    write_adapter,
    write_gguf_adapter,
    write_merged,
)
from commands import typed
from folders import HEADS, VOCAB, Folder
from llama2 import checkpoint, native
from llama2.checkpoint import Checkpoint
from llama2.checkpoint.adapter import split
from llama2.convert import convert
from llama2.engine import packed
from llama2.errors import CheckpointError, Llama2Error, ParityError, RequestError
from llama2.hub.huggingface import Repository, choose
from models import tiny_config, write_tiny_gguf
from oracle_transformers import rotate_half_order

LAYER = "model.layers.0."
PREFIX = "base_model.model."


#: What the tokenizers library wants of each added token.
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def whole() -> Folder:
    """A tiny Llama whose tokenizer.json is complete."""
    folder = Folder()
    folder.tokenizer["decoder"] = {"type": "Sequence", "decoders": DECODERS}
    folder.tokenizer["added_tokens"] = [token | FLAGS for token in folder.tokenizer["added_tokens"]]
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return whole().write(tmp_path / "base")


def opened(base: Path, *adapters: Path | tuple[Path, float]) -> Checkpoint:
    given = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in adapters]
    return checkpoint.open(base, adapters=given)


def assert_same(model: Checkpoint, folder: Path) -> None:
    """Every tensor is what the folder, merged by hand, holds."""
    expected = checkpoint.open(folder)
    assert model.config == expected.config
    assert [*model.tensors] == [*expected.tensors]
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(model.tensors[name].dequantize(), tensor.dequantize(), rtol=1e-6, atol=1e-6)


def test_every_matrix(base: Path, tmp_path: Path) -> None:
    """W + alpha / r * B A, where rows of q_proj and k_proj stand in transformers' order."""
    weights = folder_tensors(base)
    parts = random_parts(weights)
    adapter = write_adapter(tmp_path / "tuned", parts)
    model = opened(base, adapter)
    assert_same(model, write_merged(base, tmp_path / "by hand", merged(weights, parts, 4 / 2)))
    assert model.name == "base + tuned"
    assert {tensor.format for tensor in model.tensors.values()} == {"F32"}
    [facts] = [adapter.summary() for adapter in model.adapters]
    assert facts == {
        "name": "tuned",
        "path": str(adapter),
        "base": "org/base",
        "scale": 1.0,
        "matrices": 7,
        "ranks": [2],
        "replaced": [],
    }


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.replace("base_model.model.model.", PREFIX),  # of LlamaModel, without an output head
        lambda name: name.replace(".lora_", ".base_layer.lora_"),
    ],
    ids=["default", "bare", "without model", "base_layer"],
)
def test_spellings_of_names(rename: Callable[[str], str], base: Path, tmp_path: Path) -> None:
    weights = folder_tensors(base)
    parts = random_parts(weights)
    adapter = write_adapter(tmp_path / "tuned", {rename(name): value for name, value in parts.items()})
    assert_same(opened(base, adapter), write_merged(base, tmp_path / "by hand", merged(weights, parts)))


def test_scales(base: Path, tmp_path: Path) -> None:
    """alpha / r, with use_rslora alpha / sqrt(r), times the caller's; two adapters are added."""
    weights = folder_tensors(base)
    first = random_parts(weights, ATTENTION, rank=4)
    second = random_parts(weights, LINEAR, rank=2, seed=2)
    adapters = [
        (write_adapter(tmp_path / "first", first, r=4, lora_alpha=6, use_rslora=True), 1.0),
        (write_adapter(tmp_path / "second", second, lora_alpha=1.5), -0.5),
    ]
    expected = merged(merged(weights, first, 6 / 2), second, -0.5 * 1.5 / 2)
    assert_same(opened(base, *adapters), write_merged(base, tmp_path / "by hand", expected))


@pytest.mark.parametrize(
    "key", ["k_proj", "self_attn.k_proj", "^model.layers.0.self_attn.k_proj", r"layers\.0\.self_attn\.k_proj$"]
)
def test_patterns(key: str, base: Path, tmp_path: Path) -> None:
    """A key is a module's name or its end, and counts for that module alone; the first that fits does."""
    weights = folder_tensors(base)
    parts = random_parts(weights, ["q_proj", "down_proj"]) | random_parts(weights, ["k_proj"], rank=3)
    settings = {"rank_pattern": {"proj": 9, key: 3, "_proj": 9}, "alpha_pattern": {"down_proj": 8, key: 7.5}}
    adapter = write_adapter(tmp_path / "tuned", parts, **settings)
    own = {
        part: {name: value for name, value in parts.items() if part in name}
        for part in ("q_proj", "down_proj", "k_proj")
    }
    expected = merged(merged(merged(weights, own["q_proj"], 2), own["down_proj"], 4), own["k_proj"], 2.5)
    assert_same(opened(base, adapter), write_merged(base, tmp_path / "by hand", expected))


def test_magnitudes(base: Path, tmp_path: Path) -> None:
    """DoRA: each row of the sum has the length that the magnitude says, in q_proj's order of rows too."""
    weights = folder_tensors(base)
    parts = random_parts(weights)
    expected = merged(weights, parts)
    for name in [name for name in parts if name.endswith("lora_A.weight")]:
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        table = expected[f"{module}.weight"]
        lengths = np.linspace(0.5, 2, len(table), dtype=np.float32)
        parts[f"{PREFIX}{module}.lora_magnitude_vector"] = lengths
        expected[f"{module}.weight"] = lengths[:, None] * table / np.linalg.norm(table, axis=1, keepdims=True)
    adapter = write_adapter(tmp_path / "tuned", parts, use_dora=True)
    assert_same(opened(base, adapter), write_merged(base, tmp_path / "by hand", expected))


def test_embeddings_and_whole_modules(base: Path, tmp_path: Path) -> None:
    """lora_embedding_A is (r, V), so its transpose times that of B is added; whole modules replace the base's."""
    weights, rng = folder_tensors(base), np.random.default_rng(3)
    a, b = rng.normal(size=(2, VOCAB)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    whole = {name: rng.normal(size=weights[name].shape).astype(np.float32) for name in WHOLE}
    parts = random_parts(weights, ["lm_head"])
    tensors = parts | {f"{PREFIX}{name}": value for name, value in whole.items()}
    tensors |= {f"{PREFIX}model.embed_tokens.lora_embedding_A": a, f"{PREFIX}model.embed_tokens.lora_embedding_B": b}
    expected = merged(weights | whole, parts)
    expected["model.embed_tokens.weight"] = expected["model.embed_tokens.weight"] + 2 * (b @ a).T
    adapter = write_adapter(tmp_path / "tuned", tensors)
    model = opened(base, adapter)
    assert_same(model, write_merged(base, tmp_path / "by hand", expected))
    assert model.adapters[0].summary()["replaced"] == sorted(
        ["norm.weight", "output.weight", "layers.0.attention.wk.weight"]
    )


WHOLE = ("model.norm.weight", "lm_head.weight", LAYER + "self_attn.k_proj.weight")


def test_a_pickle(base: Path, tmp_path: Path) -> None:
    weights = folder_tensors(base)
    parts = random_parts(weights)
    adapter = write_adapter(tmp_path / "tuned", parts)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in parts.items()}, adapter / "adapter_model.bin")
    assert_same(opened(base, adapter), write_merged(base, tmp_path / "by hand", merged(weights, parts)))


def test_an_adapter_of_llamacpp(base: Path, tmp_path: Path) -> None:
    """Its lora_b has Meta's order of rows, and its embeddings' lora_a a row for each token."""
    weights, rng = folder_tensors(base), np.random.default_rng(3)
    parts = random_parts(weights, ["q_proj", "k_proj", "down_proj"])
    theirs: Arrays = {}
    for part, name, heads in (
        ("self_attn.q_proj", "attn_q", HEADS),
        ("self_attn.k_proj", "attn_k", 1),
        ("mlp.down_proj", "ffn_down", 0),
    ):
        a, b = (parts[f"{PREFIX}{LAYER}{part}.lora_{which}.weight"] for which in "AB")
        order = _pairs(len(b), heads) if heads else np.arange(len(b))
        theirs |= {f"blk.0.{name}.weight.lora_a": a, f"blk.0.{name}.weight.lora_b": b[order]}
    a, b = rng.normal(size=(VOCAB, 2)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    theirs |= {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}
    expected = merged(weights, parts)
    expected["model.embed_tokens.weight"] = expected["model.embed_tokens.weight"] + 2 * a @ b.T
    adapter = write_gguf_adapter(tmp_path / "tuned.gguf", theirs)
    model = opened(base, adapter)
    assert_same(model, write_merged(base, tmp_path / "by hand", expected))
    assert model.name == "base + tuned"


def _pairs(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """Where transformers has each of Meta's rows: two heads of 4 have 0 2 1 3 and 4 6 5 7."""
    half = rows // heads // 2
    return np.array([head * 2 * half + i % 2 * half + i // 2 for head in range(heads) for i in range(2 * half)])


@pytest.mark.parametrize("format", ["BF16", "F16"])
def test_floats_keep_their_format(format: str, base: Path, tmp_path: Path) -> None:
    """The sum of float32 is rounded once, to the nearest."""
    convert(base, tmp_path / "short", "hf", format=format, run=False)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[format]
    weights = folder_tensors(base)
    short = {name: torch.from_numpy(value).to(dtype).float().numpy() for name, value in weights.items()}
    parts = random_parts(weights)
    model = opened(tmp_path / "short", write_adapter(tmp_path / "tuned", parts))
    wq = model.tensors["layers.0.attention.wq.weight"]
    assert wq.format == format
    exact = merged(short, parts)[LAYER + "self_attn.q_proj.weight"]
    rounded = torch.from_numpy(exact).to(dtype).float().numpy()
    np.testing.assert_array_equal(rotate_half_order(wq.dequantize(), HEADS), rounded)
    assert model.tensors["layers.0.attention_norm.weight"].format == format


def write_gguf_base(path: Path, format: str, **changes: Any) -> Arrays:
    """A tiny model in GGUF; its weights by transformers' names, but with Meta's order of rows."""
    weights = write_tiny_gguf(path, format=format, config=tiny_config(format, **changes))
    names = {"attention.wv": "self_attn.v_proj", "feed_forward.w2": "mlp.down_proj", "attention.wo": "self_attn.o_proj"}
    found = {}
    for name, value in weights.items():
        for ours, theirs in names.items():
            if f".{ours}." in name:
                found[f"model.{name.replace(ours, theirs)}"] = value
    return found


@pytest.mark.parametrize("format", ["Q4_0", "Q4_K", "Q8_0"])
def test_quantised_matrices_become_q8_0(format: str, tmp_path: Path) -> None:
    """Rounded as the gguf package rounds; what is not changed stays as it is."""
    weights = write_gguf_base(tmp_path / "base.gguf", format)
    parts = random_parts(weights, LINEAR)
    model = opened(tmp_path / "base.gguf", write_adapter(tmp_path / "tuned", parts))
    changed = model.tensors["layers.1.feed_forward.w2.weight"]
    assert changed.format == "Q8_0"
    exact = merged(weights, parts)["model.layers.1.mlp.down_proj.weight"]
    theirs = gguf.quants.quantize(exact, gguf.GGMLQuantizationType.Q8_0)
    difference = changed.dequantize() - gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q8_0)
    assert np.mean(difference != 0) < 1e-3  # where float32 sums differ in their last bit at the middle of two codes
    assert np.abs(difference).max() <= np.abs(exact).max() / 127
    assert model.tensors["layers.1.attention.wq.weight"].format == format
    assert model.base is not None
    wq, before = (each.tensors["layers.1.attention.wq.weight"] for each in (model, model.base))
    assert wq.data is before.data


@pytest.mark.parametrize("target", ["model.embed_tokens", "lm_head"])
def test_a_tied_base_is_untied_where_only_one_side_changes(target: str, base: Path, tmp_path: Path) -> None:
    folder = whole()
    folder.config["tie_word_embeddings"] = True
    head = folder.tensors.pop("lm_head.weight")
    base = folder.write(tmp_path / "tied")
    weights = folder_tensors(base)
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    replaced = {f"{target}.weight": head}
    adapter = write_adapter(tmp_path / "tuned", {f"{PREFIX}{name}": value for name, value in replaced.items()})
    expected = write_merged(base, tmp_path / "by hand", both | replaced)
    config = json.loads((expected / "config.json").read_text()) | {"tie_word_embeddings": False}
    (expected / "config.json").write_text(json.dumps(config))
    model = opened(base, adapter)
    assert not model.config.tied_embeddings
    assert_same(model, expected)
    with pytest.raises(CheckpointError, match="ensure_weight_tying=true is not supported"):
        opened(base, write_adapter(tmp_path / "tuned", {f"{PREFIX}lm_head.weight": head}, ensure_weight_tying=True))


def grown(base: Path, tmp_path: Path, tensors: Arrays | None = None) -> Path:
    """An adapter with a token more than the base, which ends its answers, and a chat template."""
    folder, weights = whole(), folder_tensors(base)
    folder.tokenizer["added_tokens"].append({"id": VOCAB, "content": "<end>", **FLAGS})
    rng = np.random.default_rng(4)
    larger = {f"{PREFIX}{name}": rng.normal(size=(VOCAB + 1, 8)).astype(np.float32) for name in EMBEDDINGS}
    adapter = write_adapter(tmp_path / "grown", larger | random_parts(weights) if tensors is None else tensors)
    (adapter / "tokenizer.json").write_text(json.dumps(folder.tokenizer))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": "hello"}))
    return adapter


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def test_a_grown_vocabulary(base: Path, tmp_path: Path) -> None:
    adapter = grown(base, tmp_path)
    with opened(base, adapter) as model:
        assert model.config.vocab_size == VOCAB + 1
        assert model.tensors["output.weight"].shape == (VOCAB + 1, 8)
        assert model.tokenizer.vocab_size == VOCAB + 1
        assert model.tokenizer.eos_id == VOCAB
        assert model.tokenizer.stop_ids >= {2, VOCAB}  # the base's end is one still
        assert model.template == "hello"
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"grown: has embeddings of 7 tokens and no tokenizer, .* 6 tokens"):
        opened(base, adapter)


def test_tokens_without_embeddings(base: Path, tmp_path: Path) -> None:
    """A token of padding is never computed with; any other is refused, unless another tokenizer is given."""
    adapter = grown(base, tmp_path, random_parts(folder_tensors(base)))
    with pytest.raises(CheckpointError, match=r"grown: its tokenizer has token '<end>' beyond the 6"):
        _ = opened(base, adapter).tokenizer
    (adapter / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<end>"}))
    tokenizer = opened(base, adapter).tokenizer
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.notes == ("the tokenizer of grown has padding without embeddings, so the base's is used",)


def test_half_of_the_embeddings(base: Path, tmp_path: Path) -> None:
    larger = np.zeros((VOCAB + 1, 8), np.float32)
    adapter = write_adapter(tmp_path / "tuned", {f"{PREFIX}lm_head.weight": larger})
    with pytest.raises(
        CheckpointError, match="leaves 6 rows of embeddings and 7 of the output head; save it again with both"
    ):
        opened(base, adapter)


def drop(name: str) -> Callable[[Arrays], object]:
    return lambda tensors: tensors.pop(f"{PREFIX}{LAYER}{name}.weight")


def put(name: str, *shape: int) -> Callable[[Arrays], object]:
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


def nothing(_: Arrays) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"peft_type": "IA3"}, nothing, "peft_type=IA3 is not supported; merge it with peft"),
        ({"peft_type": None}, nothing, "lacks peft_type, so it is not peft's"),
        ({"r": None}, nothing, "r is missing, or no number"),
        ({"lora_alpha": "16"}, nothing, "lora_alpha is missing, or no number"),
        ({"r": 3}, nothing, r"have shapes \(2, \d+\) and \(\d+, 2\), and adapter_config\.json says rank 3"),
        ({"r": 0}, nothing, "r=0 of .* gives no scale"),
        ({"alpha_pattern": {"q_proj|k_proj": 3}}, nothing, r"the regular expression 'q_proj\|k_proj' in alpha_pattern"),
        ({"rank_pattern": {"q_proj": "3"}}, nothing, "rank_pattern of 'q_proj' is missing, or no number"),
        ({"layer_replication": [[0, 1]]}, nothing, "layer_replication is not supported"),
        ({"alora_invocation_tokens": [1]}, nothing, "alora_invocation_tokens is not supported"),
        ({"lora_bias": True}, nothing, "lora_bias is not supported"),
        ({"use_qalora": True}, nothing, "use_qalora is not supported"),
        ({"trainable_token_indices": [1]}, nothing, "trainable_token_indices is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, nothing, "init_lora_weights='pissa_niter_4' changed the base"),
        ({}, drop("mlp.up_proj.lora_B"), r"safetensors: lacks lora_B of 'model\.layers\.0\.mlp\.up_proj'"),
        ({}, put(f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight", 2, 8), r"changes 'transformer\.h\.0\.attn"),
        ({}, put(f"{PREFIX}score.weight", 2, 8), r"base \(Llama, 1 layers\) does not have; it was trained on org/base"),
        ({}, put(f"{PREFIX}{LAYER}self_attn.q_proj.lora_B.bias", 8), "lora_B.bias', which"),
        ({}, put(f"{PREFIX}{LAYER}self_attn.q_proj.lora_embedding_A", 2, 6), "lacks lora_embedding_B"),
        ({}, put(f"{PREFIX}{LAYER}self_attn.q_proj.lora_magnitude_vector", 7), "lora_magnitude_vector of .* has shape"),
        ({}, put(f"{LAYER}self_attn.q_proj.lora_A.weight", 2, 8), "twice, under two names"),
        ({}, put(f"{PREFIX}model.norm.weight", 9), r"model\.norm\.weight' of shape \(9,\), and .*base has \(8,\)"),
    ],
)  # fmt: skip
def test_what_is_refused(
    settings: dict[str, Any], change: Callable[[Arrays], object], message: str, base: Path, tmp_path: Path
) -> None:
    tensors = random_parts(folder_tensors(base))
    change(tensors)
    adapter = write_adapter(tmp_path / "tuned", tensors, **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(base, adapter)
    assert str(caught.value).startswith(str(adapter))
    assert str(caught.value).isprintable()


def test_settings_of_any_kind(base: Path, tmp_path: Path) -> None:
    """Whatever stands in adapter_config.json: it opens, or one line says why not."""
    keys = "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules modules_to_save bias use_dora "
    keys += "base_model_name_or_path init_lora_weights layers_to_transform exclude_modules lora_bias"
    values = [None, True, 0, -1, 2**70, 10**400, 1e308, float("inf"), float("nan"), "", "\x1b[2J", [], [None], {}]
    values += [{"q_proj": value} for value in values[3::2]] + [{"(a+)+$": 2}, ["q_proj", 3], "a" * 10**5]
    adapter, reasons = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base), ["q_proj"])), []
    for key in keys.split():
        for value in values:
            (adapter / "adapter_config.json").write_text(json.dumps(PLAIN | {key: value}))
            reasons += [_reason(base, [(adapter, 1.0)]), _reason(adapter, [])]
    assert reasons.count(None) > 50
    assert all(reason.isprintable() and len(reason) < 1000 for reason in reasons if reason is not None)


def _reason(path: Path, adapters: list[tuple[Path, float]]) -> str | None:
    try:
        checkpoint.open(path, adapters=adapters).tensors["layers.0.attention.wq.weight"].dequantize()
    except Llama2Error as error:
        return str(error)
    return None


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}


def test_another_base(base: Path, tmp_path: Path) -> None:
    """Other widths, and other numbers of layers, unless the adapter says that it leaves layers out."""
    write_tiny_gguf(tmp_path / "other.gguf")  # 64 wide, two layers
    adapter = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base)), target_modules=["q_proj"])
    with pytest.raises(
        CheckpointError,
        match=r"changes 1 layers, and .*other\.gguf has 2; give the base that it was trained on, org/base",
    ):
        opened(tmp_path / "other.gguf", adapter)
    write_adapter(adapter, random_parts(folder_tensors(base)), target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(
        CheckpointError, match=r"of shape \(\d+, \d+\), and .*other.gguf has \(\d+, \d+\); give the base"
    ):
        opened(tmp_path / "other.gguf", adapter)
    deep = {name.replace("layers.0", "layers.1"): value for name, value in random_parts(folder_tensors(base)).items()}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp.*base \(Llama, 1 layers\) does not have"):
        opened(base, write_adapter(adapter, deep))


def test_files_that_are_not_there(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base)))
    weights = adapter / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match="is a file of an adapter; give its folder"):
        opened(base, weights)
    for path in (weights, adapter / "adapter_config.json"):
        whole = path.read_bytes()
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(
            CheckpointError, match=f"{path.name}: is a pointer of Git LFS, not the file itself; run `git lfs pull`"
        ):
            opened(base, adapter)
        path.write_bytes(whole)
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=r"has adapter_config.json and neither adapter_model.safetensors nor adapter_model.bin"
    ):
        opened(base, adapter)
    for path, message in (
        (base, "is a model, not an adapter; give it with -m"),
        (tmp_path, "is not an adapter: it has no adapter_config"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opened(base, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "model"}, "is a model, not an adapter"),
        ({"architecture": "gemma"}, "is a lora adapter of gemma"),
        ({"adapter": "control"}, "is a control adapter"),
    ],
)
def test_other_gguf_files(changes: dict[str, str], message: str, base: Path, tmp_path: Path) -> None:
    path = write_gguf_adapter(
        tmp_path / "tuned.gguf", {"blk.0.attn_q.weight.lora_a": np.ones((2, 8), np.float32)}, **changes
    )
    with pytest.raises(CheckpointError, match=message):
        opened(base, path)
    with pytest.raises(CheckpointError, match=r"lacks lora_b of layers\.0\.attention\.wq\.weight"):
        opened(
            base,
            write_gguf_adapter(tmp_path / "half.gguf", {"blk.0.attn_q.weight.lora_a": np.ones((2, 8), np.float32)}),
        )


def test_an_adapter_in_the_place_of_a_model(base: Path, tmp_path: Path) -> None:
    """The message has the command. Beside weights it is not merged, and that is said."""
    adapter = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base)))
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.open(adapter)
        assert (
            str(caught.value)
            == f"{adapter}: is an adapter of org/base, not a model; give both: -m org/base --adapter {adapter}"
        )
        with pytest.raises(CheckpointError, match="tuned: is an adapter of org/base, not a model"):
            checkpoint.open(adapter / "adapter_model.safetensors")
        (adapter / "config.json").write_bytes((base / "config.json").read_bytes())  # which trainers save with it
    for name in ("/content/model", "", None, "a\x1b[31m/b"):
        write_adapter(adapter, random_parts(folder_tensors(base)), base_model_name_or_path=name)
        with pytest.raises(
            CheckpointError, match="not a model; give its base with -m, and this with --adapter"
        ) as caught:
            checkpoint.open(adapter)
        assert str(caught.value).isprintable()
    path = write_gguf_adapter(tmp_path / "tuned.gguf", {"blk.0.attn_q.weight.lora_a": np.ones((2, 8), np.float32)})
    with pytest.raises(
        CheckpointError, match="is an adapter, not a model; give its base with -m, and this with --adapter"
    ):
        checkpoint.open(path)
    write_adapter(base, random_parts(folder_tensors(base)))
    model = checkpoint.open(base)
    assert not model.adapters
    assert model.notes == (f"{base}: holds a LoRA adapter too, which is not merged; --adapter {base} merges it",)
    assert opened(base, base).adapters


@pytest.mark.parametrize("format", ["F16", "Q8_0"])
def test_sums_that_are_not_finite(format: str, tmp_path: Path) -> None:
    """The adapter is named, not the base."""
    path = tmp_path / "base.gguf"
    adapter = write_adapter(tmp_path / "tuned", random_parts(write_gguf_base(path, format), ["o_proj"]))
    with pytest.raises(
        CheckpointError, match=r"attention\.wo\.weight.*not finite.*tuned changed it, give it a smaller scale"
    ):
        packed.pack(opened(path, (adapter, 1e8 if format == "F16" else 1e38)), native.module())


def test_names_with_a_scale(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert split("tuned") == ("tuned", 1.0)
    assert split("org/name:0.5") == ("org/name", 0.5)
    assert split("tuned:-1e-1") == ("tuned", -0.1)
    assert split("C:\\tuned") == ("C:\\tuned", 1.0)
    assert split(tmp_path / "a:2") == (str(tmp_path / "a:2"), 1.0)
    assert split(f"{tmp_path}/a:2:3") == (str(tmp_path / "a:2"), 3.0)
    for word in ("tuned:nan", "tuned:inf"):
        with pytest.raises(RequestError, match="the scale must be a finite number"):
            split(word)


def test_packed_weights_are_not_mistaken(tmp_path: Path) -> None:
    """Base, merged models of two scales, and another adapter at the same place: each has its own."""
    path = tmp_path / "base.gguf"
    weights = write_gguf_base(path, "Q8_0")
    adapter = write_adapter(tmp_path / "tuned", random_parts(weights, ["o_proj"]))

    def matrix(*adapters: tuple[Path, float]) -> bytes:
        model = checkpoint.open(path, adapters=adapters)
        found = packed.pack(model, native.module())["layers.0.attention.wo.weight"]
        tensor = model.tensors["layers.0.attention.wo.weight"]
        expected = np.empty(native.module().packed_bytes(tensor.format, *tensor.shape), np.uint8)
        native.module().pack(tensor.format, tensor.data, *tensor.shape, expected)
        assert np.array_equal(found, expected)
        return found.tobytes()

    seen = [matrix(), matrix((adapter, 1.0)), matrix((adapter, 0.5)), matrix((adapter, 1.0), (adapter, 0.5))]
    assert [matrix(), matrix((adapter, 1.0))] == seen[:2]
    before = (adapter / "adapter_model.safetensors").stat()
    write_adapter(adapter, random_parts(weights, ["o_proj"], seed=9))
    os.utime(adapter / "adapter_model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.append(matrix((adapter, 1.0)))
    assert len(set(seen)) == 5


def test_an_untouched_start_reads_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With packed weights at hand, no quantised matrix is merged again."""
    path = tmp_path / "base.gguf"
    adapter = write_adapter(tmp_path / "tuned", random_parts(write_gguf_base(path, "Q4_0"), ["o_proj"]))
    first = packed.pack(opened(path, adapter), native.module())
    monkeypatch.setattr("llama2.checkpoint.adapter._merged", lambda *_: pytest.fail("merged again"))
    assert packed.pack(opened(path, adapter), native.module()).keys() == first.keys()


@pytest.mark.parametrize(
    ("kind", "compared"),
    [("hf", "full"), ("meta", "tensors"), ("gguf", "tensors"), ("llama2c", "tensors")],
)
def test_a_merged_model_is_written(
    kind: str, compared: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`llama2 convert --adapter`, of every format; the receipt computes each merged matrix a second time."""
    source = sources[kind]
    base = checkpoint.open(source)
    c = base.config
    q, kv, n = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_layers
    shapes = {"q_proj": (q, c.dim), "k_proj": (kv, c.dim), "o_proj": (c.dim, q)}
    named = {
        f"model.layers.{i}.self_attn.{name}.weight": np.empty(shape) for i in range(n) for name, shape in shapes.items()
    }
    adapter = write_adapter(tmp_path / "tuned", random_parts(named, ATTENTION))
    status, out, err = typed(
        capsys,
        "convert",
        source,
        tmp_path / "out",
        "--to",
        "hf",
        "--adapter",
        f"{adapter}:0.5",
        "--receipt",
        compared,
        "--json",
    )
    assert (status, err) == (0, "")
    receipt = json.loads(out)
    assert receipt["adapters"] == [
        {
            "name": "tuned",
            "path": "tuned",
            "base": "org/base",
            "scale": 0.5,
            "matrices": 3 * n,
            "ranks": [2],
            "replaced": [],
        }
    ]
    assert compared == "tensors" or receipt["answers"]["bitwise_equal"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file["name"] for file in receipt["source"]["files"]}
    assert sum(each.get("merged", False) for each in receipt["tensors"]["each"].values()) == 3 * n
    expected = checkpoint.open(source, adapters=[(adapter, 0.5)])
    for name, tensor in checkpoint.open(tmp_path / "out").tensors.items():
        np.testing.assert_array_equal(tensor.dequantize(), expected.tensors[name].dequantize())


def test_a_quantised_base_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, merged matrices stay Q8_0; quantised, they have the format that is asked for."""
    path = tmp_path / "base.gguf"
    weights = write_gguf_base(path, "Q4_0", vocab_size=308)  # without unused tokens
    adapter = write_adapter(tmp_path / "tuned", random_parts(weights, ["o_proj", "down_proj"]))
    words = ["--adapter", adapter, "--json"]
    status, out, err = typed(capsys, "convert", path, tmp_path / "out.gguf", "--to", "gguf", *words)
    assert (status, err) == (0, "")
    receipt = json.loads(out)
    assert receipt["answers"]["bitwise_equal"]
    assert receipt["tensors"]["each"]["layers.1.feed_forward.w2.weight"] == {
        "source": "Q8_0",
        "output": "Q8_0",
        "merged": True,
    }
    status, out, _ = typed(capsys, "quantize", path, tmp_path / "q.gguf", "-f", "Q8_0", "--report", "none", *words)
    assert status == 0
    merged_once = checkpoint.open(path, adapters=[(adapter, 1.0)]).tensors["layers.1.feed_forward.w2.weight"]
    for name in ("out.gguf", "q.gguf"):
        written = checkpoint.open(tmp_path / name).tensors["layers.1.feed_forward.w2.weight"]
        np.testing.assert_array_equal(written.data, merged_once.data)


def test_a_wrong_sum_is_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receipt has an opinion of its own on the order of rows."""
    adapter = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base)))
    monkeypatch.setattr("llama2.checkpoint.adapter.in_pairs", lambda update, *_: update)
    with pytest.raises(
        ParityError,
        match=r"layers\.0\.attention\.w[qk]\.weight has \d+ of \d+ numbers that are not the base's with its adapters",
    ):
        convert(base, tmp_path / "out", "hf", adapters=[(adapter, 1.0)], run=False)
    assert not (tmp_path / "out").exists()


def test_commands(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base)))
    status, out, _ = typed(capsys, "show", base, "--adapter", f"{adapter}:0.5")
    assert status == 0
    assert "adapters      tuned × 0.5: 7 matrices of rank 2, made for org/base" in out.splitlines()
    write_adapter(base, random_parts(folder_tensors(base)))
    status, out, _ = typed(capsys, "show", base)
    assert (
        f"note          {base}: holds a LoRA adapter too, which is not merged; --adapter {base} merges it"
        in out.splitlines()
    )
    answers = []
    for words in ([], ["--adapter", adapter], ["--adapter", f"{adapter}:0"]):
        status, out, _ = typed(
            capsys,
            "generate",
            "-m",
            base,
            *words,
            "a",
            "--max-tokens",
            8,
            "--temperature",
            0,
            "--logprobs",
            0,
            "--json",
        )
        assert status == 0
        answers.append(json.loads(out)["logprobs"])
    assert answers[0] != answers[1]
    assert answers[0] == answers[2]
    status, _, err = typed(capsys, "serve", "-m", base, "-m", adapter, "--adapter", adapter)
    assert (status, "--adapter is merged into one model" in err) == (2, True)
    status, _, err = typed(capsys, "chat", "-m", base, "--adapter", "nowhere/to/be/found", "hello")
    assert (status, "nowhere/to/be/found: no such file" in err) == (1, True)


def test_vllm_is_given_no_adapter(base: Path, tmp_path: Path) -> None:
    import llama2

    adapter = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base)))
    with pytest.raises(Llama2Error, match="write the merged model first, with `llama2 convert"):
        llama2.load(base, adapter=adapter, engine="vllm")


def test_a_server_with_an_adapter_says_so(base: Path, tmp_path: Path) -> None:
    """The fingerprint of answers is another one for each scale."""
    import llama2
    from llama2.serve.service import _fingerprint

    adapter, seen = write_adapter(tmp_path / "tuned", random_parts(folder_tensors(base))), set()
    for given in ((), adapter, f"{adapter}:0.5"):
        with llama2.load(base, adapter=given) as model:
            seen.add(_fingerprint(model, None))
    assert len(seen) == 3


def test_a_repository_with_an_adapter() -> None:
    files = [
        "README.md",
        "adapter_config.json",
        "adapter_model.bin",
        "adapter_model.safetensors",
        "optimizer.pt",
        "tokenizer.json",
    ]
    assert choose(Repository("org/tuned"), files) == [
        "adapter_config.json",
        "tokenizer.json",
        "adapter_model.safetensors",
    ]
