"""The same tiny model in every format, for tests of conversions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from llama2.convert import convert
from meta_bytes import CONFIG, random_tensors, write_folder
from models import tiny_config, write_tiny_gguf
from texts import train_sentencepiece

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Sources = dict[str, Path]


@cache
def plain_vocabulary() -> bytes:
    """A SentencePiece model that every format can hold: without user-defined tokens."""
    return train_sentencepiece(CONFIG.vocab_size, user_defined=())


def write_sources(root: Path) -> Sources:
    """One model by format, with wq and wk of one shape; and two that are tied, one with a byte-level vocabulary."""
    config = replace(CONFIG, n_kv_heads=16)
    write_folder(root / "meta", random_tensors(config, torch.float32), 4, n_kv_heads=16)
    (root / "meta" / "tokenizer.model").write_bytes(plain_vocabulary())
    convert(root / "meta", root / "hf", "hf", run=False)
    convert(root / "meta", root / "model.gguf", "gguf", run=False)
    (root / "c").mkdir()
    convert(root / "meta", root / "c" / "model.bin", "llama2c", run=False)
    write_tiny_gguf(root / "bpe.gguf", tokenizer="bpe", template=CHATML, config=tiny_config(tied_embeddings=True))
    write_tiny_gguf(root / "tied.gguf", template=CHATML, config=tiny_config(tied_embeddings=True, vocab_size=310))
    write_tiny_gguf(root / "odd.gguf", config=tiny_config(hidden_dim=100))
    names = {"meta": "meta", "hf": "hf", "gguf": "model.gguf", "llama2c": "c/model.bin"}
    return {
        kind: root / name
        for kind, name in (names | {"bpe": "bpe.gguf", "tied": "tied.gguf", "odd": "odd.gguf"}).items()
    }
