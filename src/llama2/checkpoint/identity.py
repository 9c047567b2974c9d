"""What identifies a model: a digest of everything that its answers and scores depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from llama2.checkpoint.checkpoint import Checkpoint


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a model's shape, vocabulary, chat templates, weights and adapters, in hexadecimal.

    It is the same wherever the model lies. Reads every weight once. Raises TokenizerError for a damaged vocabulary.
    """
    base = checkpoint.base or checkpoint  # merging an adapter into every matrix would take longer than hashing it
    tokenizer = checkpoint.tokenizer
    about = [asdict(checkpoint.config), dict(checkpoint.templates), checkpoint.tokenizer_mode]
    found = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        found.update(len(piece).to_bytes(4) + piece)
    for name, tensor in sorted({**base.tensors, **base.extras}.items()):
        found.update(json.dumps([name, tensor.format, tensor.shape]).encode())
        found.update(tensor.data.data)
    base.release_pages()
    for adapter in checkpoint.adapters:
        found.update(adapter.digest().encode())
    return found.hexdigest()
