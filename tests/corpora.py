"""Small corpora, written as `llama2 data build` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama2.data import shards
from llama2.data.shards import Manifest, Shard, Split, TokenizerFile

Document = Sequence[int] | NDArray[np.int64]


def write(folder: Path, tokenizer: Path, vocabulary: int, files: Mapping[Split, Sequence[Sequence[Document]]]) -> None:
    """Each split's files, each of documents, and what belongs to them."""
    splits: dict[Split, list[Shard]] = {}
    for split, parts in files.items():
        splits[split] = []
        for task, documents in enumerate(parts):
            with shards.Writer(folder, split, task, vocabulary) as writer:
                for ids in documents:
                    writer.add(ids)
            assert writer.shard
            splits[split].append(writer.shard)
    file = TokenizerFile(
        file="tokenizer.model", sha256=shards.sha256(tokenizer), vocabulary=vocabulary, bos_id=1, eos_id=2
    )
    manifest = Manifest(tokenizer=file, dtype=shards.dtype_of(vocabulary), splits=splits)
    shards.finish(folder, tokenizer, manifest)
