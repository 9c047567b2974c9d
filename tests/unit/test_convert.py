"""Conversions from any format to any other, and what their receipts say."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library

import llama2
from commands import typed
from conversions import Sources, plain_vocabulary
from llama2 import checkpoint
from llama2.checkpoint import hf_folder, quantization
from llama2.config import RopeScaling
from llama2.convert import bounds, convert, samples
from llama2.errors import RequestError
from llama2.hub import store
from meta_bytes import random_tensors, write_folder
from models import write_tiny_gguf


@pytest.mark.parametrize("version", [None, "Q8_0"])
def test_ring(version: str | None, tmp_path: Path) -> None:
    """Meta in 8 files, grouped queries → Hugging Face → GGUF → llama2.c → Meta in 2 files, each with a full receipt."""
    tensors = random_tensors(dtype=torch.float32)
    path = write_folder(tmp_path / "first", tensors, 8)
    (path / "tokenizer.model").write_bytes(plain_vocabulary())
    for text, name in (("a", "LICENSE"), ("b", "USE_POLICY.md"), ("c", "Notice"), ("d", "README.md"), ("e", "notes")):
        (path / name).write_text(text)
    steps: list[tuple[Path, Any, dict[str, Any]]] = [
        (tmp_path / "second", "hf", {}),
        (tmp_path / "third.gguf", "gguf", {}),
        (tmp_path / "fourth.bin", "llama2c", {"format": version}),
        (tmp_path / "last", "meta", {"shards": 2}),
    ]
    for target, to, options in steps:
        receipt = convert(path, target, to, **options)
        exact = to != "llama2c" or version is None
        assert receipt["answers"]["bitwise_equal"] == exact
        assert len(receipt["answers"]["tokens"]) == 200
        assert receipt["answers"]["same_tokens"] == 200 if exact else receipt["answers"]["same_tokens"] > 150
        assert len(set(receipt["answers"]["tokens"])) > 50  # no answer that repeats one token proves much
        assert receipt["tensors"]["bitwise_equal"] == receipt["tensors"]["count"] if exact else 5
        assert receipt["tokenizer"]["strings"] == 1000
        assert receipt["tokenizer"]["tokens"] > 10000
        assert receipt["chat_template"] == {
            "kept": True,
            "dialogs": 50,
            "tokens": receipt["chat_template"]["tokens"],
            "refused": 0,
        }
        whole = target.is_dir()
        place = target / "receipt.json" if whole else target.with_name(f"{target.name}.receipt.json")
        assert json.loads(place.read_text()) == receipt
        for file in receipt["output"]["files"]:
            found = (target if whole else target.parent) / file["name"]
            assert (found.stat().st_size, sha256(found.read_bytes()).hexdigest()) == (file["bytes"], file["sha256"])
        assert {file["name"] for file in receipt["source"]["files"]} >= {
            path.name if path.is_file() else "tokenizer.model"
        }
        prefix = target / "" if whole else target
        for name, text in (("LICENSE", "a"), ("USE_POLICY.md", "b"), ("Notice", "c")):
            assert Path(f"{prefix}/{name}" if whole else f"{prefix}.{name}").read_text() == text
        assert (target / "README.md").exists() == (to == "hf")
        path = target
    last = checkpoint.open(path)
    assert last.config == checkpoint.open(tmp_path / "first").config
    if version is None:
        for name, tensor in last.tensors.items():
            assert tensor.data.tobytes() == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("format", [*bounds.BOUNDS])
def test_rounding_is_within_its_bounds(format: str, sources: Sources, out: Path) -> None:
    receipt = convert(sources["gguf"], out / "q.gguf", "gguf", format=format)
    each = receipt["tensors"]["each"]
    assert {facts.get("rounded_to") for facts in each.values()} == {None, format}
    rms = max(facts.get("relative_rms", 0) for facts in each.values())
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7, "Q5_1": 4.5, "Q5_0": 4.3, "Q4_1": 3.5, "Q4_0": 3.3}[format]
    assert rms < 2**-bits
    assert 0 < receipt["answers"]["mean_divergence"] < receipt["answers"]["divergence_limit"]
    staged = out / "q.gguf.part" / "q.gguf"
    assert not list((store.home() / "packed").glob(f"{store.key(staged)}*"))  # weights that were packed to run it
    back = convert(out / "q.gguf", out / "back", "hf")  # every format's values are float32
    assert back["tensors"]["bitwise_equal"] == back["tensors"]["count"]
    assert back["answers"]["bitwise_equal"]


@pytest.mark.parametrize("format", [*bounds.BOUNDS])
def test_bounds_hold_and_are_no_wider_than_they_must(format: str) -> None:
    """The gguf package's own rounding keeps them, and comes within a tenth of them where numbers are adverse."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(0, scale, (500, 32)) for scale in (1e-8, 1e-4, 1.0, 1e3)]
    rows.append(np.where(rng.random((500, 32)) < 0.5, -1.0, 1.0) * rng.uniform(0.9, 1, (500, 32)))
    rows.append(rng.uniform(5, 5.1, (500, 32)))
    x = np.concatenate(rows).astype(np.float32)
    kind = gguf.GGMLQuantizationType[format]
    y = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).reshape(x.shape).astype(np.float64)
    block = quantization.FORMATS[format].block
    bound = np.broadcast_to(bounds.BOUNDS[format](x.astype(np.float64).reshape(-1, block)), (x.size // block, block))
    share = np.abs(y - x).reshape(-1, block) / bound
    assert 0.8 < share.max() <= 1


def test_bounds_by_hand() -> None:
    """Q4_0, largest -8: d = 1, codes -8 to 7. Half of d, or what is missing beyond 7, and 8 times what d is off by."""
    x = np.zeros((1, 32))
    x[0, :4] = -8, 7.75, 7.25, 3
    slack = 8 / 2048 + 8 * 2.0**-25
    expected = [0.5 + slack, 0.75 + slack, 0.5 + slack, 0.5 + slack]
    assert bounds.BOUNDS["Q4_0"](x)[0, :4].tolist() == pytest.approx(expected, rel=1e-12)


def test_the_same_samples_everywhere() -> None:
    strings, dialogs = samples.strings(), samples.dialogs()
    assert (len(strings), len(set(strings)) > 950, len(dialogs)) == (1000, True, 50)
    digest = sha256("\0".join(strings).encode(errors="surrogatepass")).hexdigest()
    assert digest.startswith("c0d054f3771c0c69")
    joined = "".join(strings)
    assert all(
        mark in joined for mark in ("<s>", "[INST]", "<|im_end|>", "\ud800", "한국어", "\r\n", "👩‍👩‍👧", "\u3000", "▁")
    )
    assert {messages[-1].role for messages in dialogs} == {"user", "assistant"}
    assert {messages[0].role for messages in dialogs} == {"user", "system"}
    assert {len(messages) for messages in dialogs} == {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("format", ["Q2_K", "Q4_K", "Q6_K"])
def test_formats_that_are_only_read_stay_or_become_float32(format: str, tmp_path: Path, out: Path) -> None:
    write_tiny_gguf(tmp_path / "k.gguf", format=format)
    for target, to in ((out / "k.gguf", "gguf"), (out / "k", "hf")):
        receipt = convert(tmp_path / "k.gguf", target, to)  # type: ignore[arg-type]
        formats = {each["output"] for name, each in receipt["tensors"]["each"].items() if "norm" not in name}
        assert formats == {format if to == "gguf" else "F32"}
        assert receipt["answers"]["bitwise_equal"]


@pytest.mark.parametrize(
    "scaling", [RopeScaling("linear", factor=4), RopeScaling("llama3", factor=8, original_context=64)]
)
def test_rotary_scaling(scaling: RopeScaling, sources: Sources, out: Path) -> None:
    """GGUF has Llama 3.1's as float32 divisors, so that logits may differ in their last bits."""
    model = checkpoint.open(sources["tied"])
    hf_folder.write(replace(model, config=replace(model.config, rope_scaling=scaling)), out / "scaled")
    receipt = convert(out / "scaled", out / "scaled.gguf", "gguf")
    assert receipt["answers"]["mean_divergence"] <= 1e-9
    assert receipt["answers"]["divergence_limit"] == (1e-6 if scaling.kind == "llama3" else 0)
    assert receipt["tensors"]["bitwise_equal"] == receipt["tensors"]["count"] == len(model.tensors)
    back = convert(out / "scaled.gguf", out / "back", "hf")
    assert json.loads((out / "back" / "config.json").read_text())["rope_scaling"]["factor"] == scaling.factor
    assert back["answers"]["same_tokens"] == 200


def test_progress_and_the_public_name(sources: Sources, out: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    llama2.convert.convert(
        sources["gguf"],
        out / "hf",
        "hf",
        progress=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )
    assert [*told] == ["writing", "comparing", "running the source", "running the output"]
    for steps in told.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_byte_level_and_a_template(sources: Sources, out: Path) -> None:
    """Of tokens that no text yields, tokenizer.json does not say that they are unused; that is no difference."""
    receipt = convert(sources["bpe"], out / "hf", "hf")
    assert receipt["chat_template"]["kept"]
    assert receipt["chat_template"]["tokens"] > 50 * 20
    assert receipt["tokenizer"]["texts_in_tokenizer_json"] > 1000
    again = convert(out / "hf", out / "again.gguf", "gguf")
    assert again["chat_template"] == receipt["chat_template"]
    kinds = [set(checkpoint.open(path).tokenizer.vocabulary().types) for path in (sources["bpe"], out / "hf")]
    assert [5 in found for found in kinds] == [True, False]


@pytest.mark.parametrize("mode", ["legacy", "file"])
@pytest.mark.parametrize("to", ["gguf", "hf", "quantized"])
def test_the_mode_of_spaces_is_written(to: Any, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the tokenizers library: Metaspace's "first", and for legacy the normalizer that transformers had before it."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    source, target = tmp_path / "source", tmp_path / "target.gguf"
    hf_folder.write(checkpoint.open(tmp_path / "tiny.gguf"), source)
    rules = json.loads((source / "tokenizer.json").read_text())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    legacy = Library.from_str(json.dumps({**rules, "normalizer": prefix, "pre_tokenizer": None}))
    first = Library.from_str(json.dumps({**rules, "normalizer": None, "pre_tokenizer": metaspace}))
    first.save(str(source / "tokenizer.json"))
    expected = (legacy if mode == "legacy" else first).encode("a</s>a b", add_special_tokens=False)
    assert "".join(expected.tokens) == ("▁a</s>▁a▁b" if mode == "legacy" else "▁a</s>a▁b")

    if to == "quantized":
        command = ["quantize", source, target, "--format", "F32", "--report", "none"]
    else:
        command = ["convert", source, target, "--to", to, "--receipt", "tensors", "--json"]
        assert "mode" not in convert(source, tmp_path / "other", to, run=False)["tokenizer"]
    status, said, error = typed(capsys, *command, "--tokenizer-mode", mode)
    assert status == 0, error
    assert to == "quantized" or json.loads(said)["tokenizer"]["mode"] == mode
    assert checkpoint.open(target).tokenizer.encode("a</s>a b", special=True) == expected.ids
    if to == "hf":
        written = Library.from_file(str(target / "tokenizer.json"))
        assert written.encode("a</s>a b", add_special_tokens=False).ids == expected.ids
    else:
        keys = gguf.GGUFReader(target).fields
        assert ("llama2.tokenizer.prepend_scheme" in keys) == (mode == "file")
        assert keys["tokenizer.ggml.add_space_prefix"].contents() is True


def test_a_mode_that_is_none(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(RequestError, match=r"^tokenizer_mode 'old' is not one of auto, file, legacy; choose one$"):
        convert(tmp_path / "tiny.gguf", tmp_path / "t", "hf", tokenizer_mode="old")  # type: ignore[arg-type]
