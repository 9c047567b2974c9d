"""Extra tensors of a checkpoint, such as a value head: read back, or refused by name; an attached tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from llama2 import checkpoint
from llama2.checkpoint import Checkpoint, Tensor, gguf_writer, hf_folder, llama2c, meta
from llama2.convert import convert
from llama2.errors import CheckpointError, TokenizerError
from models import write_tiny_gguf

HEAD = np.arange(8, dtype="<f4")[None] / 8  # (1, D)
BIAS = np.array([1.5], "<f2")


def with_head(folder: Path) -> Checkpoint:
    write_tiny_gguf(folder / "tiny.gguf", format="F32")
    extras = {
        "value_head.weight": Tensor("value_head.weight", "F32", HEAD.shape, HEAD.view(np.uint8).reshape(-1)),
        "value_head.bias": Tensor("value_head.bias", "F16", BIAS.shape, BIAS.view(np.uint8)),
    }
    return replace(checkpoint.open(folder / "tiny.gguf"), extras=extras)


@pytest.mark.parametrize("shard", [5 * 10**9, 1000])
def test_extra_tensors_are_read_back(shard: int, tmp_path: Path) -> None:
    hf_folder.write(with_head(tmp_path), tmp_path / "hf", shard=shard)
    with checkpoint.open(tmp_path / "hf") as opened:
        assert [*opened.extras] == ["value_head.weight", "value_head.bias"]
        assert opened.extras["value_head.bias"].format == "F16"
        assert np.array_equal(opened.extras["value_head.weight"].dequantize(), HEAD)
        assert np.array_equal(opened.extras["value_head.bias"].dequantize(), [1.5])
        assert not opened.tensors.keys() & opened.extras.keys()
        opened.check_finite()
    if shard > 1000:  # by the library of the format
        with safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
            assert np.array_equal(file.get_tensor("value_head.weight"), HEAD)


def test_a_conversion_carries_extra_tensors(tmp_path: Path) -> None:
    hf_folder.write(with_head(tmp_path), tmp_path / "hf")
    facts = convert(tmp_path / "hf", tmp_path / "copy", "hf", run=False)
    assert facts["tensors"]["each"]["value_head.weight"] == {"source": "F32", "output": "F32"}
    with checkpoint.open(tmp_path / "copy") as copy:
        assert np.array_equal(copy.extras["value_head.weight"].dequantize(), HEAD)
    with pytest.raises(CheckpointError, match=r"'value_head\.bias', which GGUF has no place for; choose hf"):
        convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", run=False)


@pytest.mark.parametrize(
    ("write", "format"), [(gguf_writer.write, "GGUF"), (meta.write, "Meta's"), (llama2c.write, "llama2.c's")]
)
def test_other_formats_refuse_them_by_name(write: Callable[..., None], format: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"extra tensor 'value_head.bias', which {format}"):
        write(with_head(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (None, "has tensor 'value_head.bias', which no Llama has"),
        (["value_head.weight"], "has tensor 'value_head.bias', which no Llama has"),
        (["value_head.weight", "value_head.bias", "reward.weight"], "lacks tensor 'reward.weight'"),
        ("value_head.weight", "extra_tensors is not a list of different names"),
        (["value_head.bias"] * 2, "extra_tensors is not a list of different names"),
        (["value_head.weight", "value_head.bias", "model.norm.weight"], "lacks tensor 'model.norm.weight'"),
    ],
)
def test_what_config_json_lists(listed: Any, reason: str, tmp_path: Path) -> None:
    hf_folder.write(with_head(tmp_path), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    assert config["extra_tensors"] == ["value_head.weight", "value_head.bias"]
    path.write_text(json.dumps(config | {"extra_tensors": listed}))
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.open(tmp_path / "hf")


def test_a_name_of_llama_s_is_refused(tmp_path: Path) -> None:
    model = with_head(tmp_path)
    extras = {"lm_head.weight": replace(model.extras["value_head.weight"], name="lm_head.weight")}
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' has a name of Llama's; rename it"):
        hf_folder.write(replace(model, extras=extras), tmp_path / "hf")


def test_a_head_that_is_not_finite(tmp_path: Path) -> None:
    model = with_head(tmp_path)
    wrong = replace(model.extras["value_head.weight"], source=np.full(8, np.nan, "<f4").view(np.uint8))
    with pytest.raises(CheckpointError, match=r"'value_head\.weight' holds weights that are not finite"):
        replace(model, extras={wrong.name: wrong}).check_finite()


def test_a_tokenizer_is_attached(tmp_path: Path) -> None:
    model = with_head(tmp_path)
    own = model.tokenizer
    for source in (own, lambda: own):
        assert replace(model, tokenizer_source=source).tokenizer is own
    with pytest.raises(TokenizerError, match="has no tokenizer; give one with --tokenizer"):
        _ = replace(model, tokenizer_source=None).tokenizer
