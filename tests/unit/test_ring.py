"""Once through every format: the same bits come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2 import checkpoint
from llama2.checkpoint import gguf_writer, huggingface, llama2c, meta
from meta_bytes import CONFIG, random_tensors, write_folder
from texts import strings, train_sentencepiece


@pytest.mark.parametrize("version", [0, 1])
def test_ring(version: int, tmp_path: Path) -> None:
    """Meta in 8 files, with grouped queries → Hugging Face → GGUF → llama2.c → Meta in 2 files."""
    tensors = random_tensors(dtype=torch.float32)
    path = write_folder(tmp_path / "first", tensors, 8)
    (path / "tokenizer.model").write_bytes(train_sentencepiece(CONFIG.vocab_size, user_defined=()))
    first = checkpoint.open(path)
    huggingface.write(first, tmp_path / "second", shard=1 << 18)
    gguf_writer.write(checkpoint.open(tmp_path / "second"), tmp_path / "third.gguf")
    llama2c.write(checkpoint.open(tmp_path / "third.gguf"), tmp_path / "fourth.bin", version=version)
    meta.write(checkpoint.open(tmp_path / "fourth.bin"), tmp_path / "last", shards=2)
    last = checkpoint.open(tmp_path / "last")
    assert last.config == first.config == replace(CONFIG, context_length=4096)
    for name, tensor in last.tensors.items():
        assert tensor.data.tobytes() == tensors[name].numpy().tobytes()
    for text in strings(200):
        assert last.tokenizer.encode(text) == first.tokenizer.encode(text)
