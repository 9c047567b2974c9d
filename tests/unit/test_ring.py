"""Once through every format: the same bits come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from conversions import CHATML
from llama2 import checkpoint
from llama2.checkpoint import gguf_writer, hf_folder, llama2c, meta
from llama2.config import BIASED, RopeScaling
from llama2.convert import convert
from meta_bytes import CONFIG, random_tensors, write_folder
from models import tiny_config, write_tiny_gguf
from texts import strings, train_sentencepiece


@pytest.mark.parametrize("version", [0, 1])
def test_ring(version: int, tmp_path: Path) -> None:
    """Meta in 8 files, with grouped queries → Hugging Face → GGUF → llama2.c → Meta in 2 files."""
    tensors = random_tensors(dtype=torch.float32)
    path = write_folder(tmp_path / "first", tensors, 8)
    (path / "tokenizer.model").write_bytes(train_sentencepiece(CONFIG.vocab_size, user_defined=()))
    first = checkpoint.open(path)
    hf_folder.write(first, tmp_path / "second", shard=1 << 18)
    gguf_writer.write(checkpoint.open(tmp_path / "second"), tmp_path / "third.gguf")
    llama2c.write(checkpoint.open(tmp_path / "third.gguf"), tmp_path / "fourth.bin", version=version)
    meta.write(checkpoint.open(tmp_path / "fourth.bin"), tmp_path / "last", shards=2)
    last = checkpoint.open(tmp_path / "last")
    assert last.config == first.config == replace(CONFIG, context_length=4096)
    for name, tensor in last.tensors.items():
        assert tensor.data.tobytes() == tensors[name].numpy().tobytes()
    for text in strings(200):
        assert last.tokenizer.encode(text) == first.tokenizer.encode(text)


RELATIVES = {
    "a window": {"sliding_window": 40},
    "biases": {"biases": BIASED},
    "YaRN": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_context=64, attention_factor=1.1)},
    "added tokens": {"vocab_size": 310},
}


def add_tool(writer: gguf.GGUFWriter) -> None:
    """Make the last token a user-defined one."""
    keys = writer.kv_data[0]
    keys["tokenizer.ggml.tokens"].value[-1] = "<tool>"
    keys["tokenizer.ggml.token_type"].value[-1] = 4


@pytest.mark.parametrize("name", [*RELATIVES])
def test_ring_of_relatives(name: str, tmp_path: Path) -> None:
    """GGUF → Hugging Face → GGUF, each with a receipt: numbers, ids with every added token, dialogs, greedy answers."""
    config = tiny_config(**RELATIVES[name])
    edit = add_tool if name == "added tokens" else None
    write_tiny_gguf(tmp_path / "first.gguf", template=CHATML, config=config, edit=edit)
    receipts = [
        convert(tmp_path / "first.gguf", tmp_path / "second", "hf"),
        convert(tmp_path / "second", tmp_path / "third.gguf", "gguf"),
    ]
    for receipt in receipts:
        assert receipt["answers"]["bitwise_equal"]
        assert receipt["chat_template"]["kept"]
    first, last = checkpoint.open(tmp_path / "first.gguf"), checkpoint.open(tmp_path / "third.gguf")
    assert replace(last.config, rope_scaling=None) == replace(first.config, rope_scaling=None)
    assert last.config.inverse_frequencies() == first.config.inverse_frequencies()
    assert last.config.attention_factor() == first.config.attention_factor()
    assert first.tokenizer.user == ({"<tool>": config.vocab_size - 1} if edit else {})
    for name_, tensor in first.tensors.items():
        assert last.tensors[name_].data.tobytes() == tensor.data.tobytes()
