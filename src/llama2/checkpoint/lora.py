"""What a LoRA adapter adds to a model, by the names of the model's matrices.

R rows  C columns  r rank
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama2.checkpoint.tensor import Tensor

#: The note of an adapter's file that has the fingerprint of its base.
FINGERPRINT = "llama2_base"


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to a matrix: scale * left @ right, with rows in the order of the adapter's file.

    With a magnitude (DoRA, Liu et al. 2024, 4.1), each row of the sum is then stretched to that length.
    """

    module: str  # its name in the file
    left: Tensor  # (R, r)
    right: Tensor  # (r, C)
    scale: float
    magnitude: Tensor | None = None  # (R,)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was merged. `updates` and `replacements` are by Meta's name of a matrix."""

    path: Path
    files: tuple[Path, ...]  # what it was read from
    scale: float  # what the caller multiplies its own scale with
    base: str | None  # what it was trained on, as its file says
    halves: bool  # whether rows of wq and wk are in Hugging Face's order
    updates: Mapping[str, Update]
    replacements: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprint: str | None = None  # of the base, if the file says it

    @property
    def name(self) -> str:
        """The folder's name, or the file's."""
        return self.path.resolve().name.removesuffix(".gguf")

    def summary(self) -> dict[str, Any]:
        """What `llama2 show` and a server's log say of it."""
        ranks = sorted({update.right.shape[0] for update in self.updates.values()})
        return {
            "name": self.name,
            "path": str(self.path),
            "base": self.base,
            "scale": self.scale,
            "matrices": len(self.updates),
            "ranks": ranks,
            "replaced": sorted(self.replacements),
        }

    def digest(self) -> str:
        """SHA-256 of everything that changes numbers. Reads all of the adapter."""
        digest = hashlib.sha256()
        for name, update in sorted(self.updates.items()):
            tensors = [update.left, update.right, *([update.magnitude] if update.magnitude else [])]
            _hash(digest, [name, update.scale, self.halves], tensors)
        for name, tensor in sorted(self.replacements.items()):
            _hash(digest, [name, self.halves], [tensor])
        return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's norms in BF16: the same in every float format, and after another training another one.

    A merged adapter leaves norms as they are, so it is not noticed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.endswith("norm.weight"):
            _hash(digest, [name], [tensor.in_format("BF16")])
    return digest.hexdigest()


def _hash(digest: Any, facts: list[Any], tensors: list[Tensor]) -> None:
    digest.update(json.dumps([facts, *([t.format, t.shape] for t in tensors)]).encode())
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.data).data)
