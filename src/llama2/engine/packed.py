"""Weights repacked for the instruction set, kept on disk so that the next start need not do it again.

The file (checkpoint/artifacts.py) holds each quantized matrix in native/packed.h's layout.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import Checkpoint, Tensor, artifacts
from llama2.errors import EngineError
from llama2.formats import FLOATS
from llama2.hub import store
from llama2.native import default_threads

Bytes = NDArray[np.uint8]

#: Raised whenever native/packed.h changes what it writes.
LAYOUT = 4
_DEFAULT_LIMIT = 32 << 30


def pack(checkpoint: Checkpoint, native: ModuleType) -> dict[str, Bytes]:
    """The packed form of every quantized matrix of `checkpoint`, by name; from the cache if it is there.

    The first time, every weight is checked to be a finite number (CheckpointError). If the cache cannot be written, the
    result stays in memory and a warning says so. Embeddings that are not also the output head are not packed: they are
    read row by row where they lie.
    """
    wanted = {name: tensor for name, tensor in checkpoint.tensors.items() if _is_packed(checkpoint, tensor)}
    sizes = {name: int(native.packed_bytes(t.format, *t.shape)) for name, t in wanted.items()}
    tensors = [[t.name, t.format, *t.shape, sizes[t.name]] for t in wanted.values()]
    facts: dict[str, Any] = {"isa": native.isa, "layout": LAYOUT, "tensors": tensors}
    what = native.isa
    if checkpoint.adapters:  # a merged model's weights are neither its base's, nor those of another adapter
        merged = [adapter.digest() for adapter in checkpoint.adapters]
        facts["adapters"] = merged
        what += f"-{hashlib.sha256(' '.join(merged).encode()).hexdigest()[:16]}"
    path = store.artifact(checkpoint.path, what)
    if (found := artifacts.read(path, checkpoint.path, facts, resident=True)) is not None:
        return found
    checkpoint.check_finite()
    try:
        artifacts.write_stream(path, checkpoint.path, facts, sizes, _packed(wanted, sizes, native))
    except OSError as error:
        warnings.warn(
            f"packed weights cannot be kept in {path.parent} ({error.strerror or error}); every start will repack them",
            stacklevel=2,
        )
        return dict(_packed(wanted, sizes, native))
    evict(keep=path)
    found = artifacts.read(path, checkpoint.path, facts, resident=True)
    return found if found is not None else dict(_packed(wanted, sizes, native))


def limit() -> int:
    """How many bytes of packed weights are kept; `LLAMA2_PACKED_LIMIT` gives it in bytes, by default 32 GiB."""
    value = os.environ.get("LLAMA2_PACKED_LIMIT")
    if value is None:
        return _DEFAULT_LIMIT
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 0:
        raise EngineError(f"LLAMA2_PACKED_LIMIT={value!r} must be a number of bytes")
    return number


def evict(*, keep: Path) -> None:
    """Remove the files unused for longest until the rest fits the limit; `keep` is removed last of all.

    What an interrupted process left half written is one of them.
    """
    try:
        files = sorted(keep.parent.iterdir(), key=lambda p: (p == keep, p.stat().st_mtime_ns))
        excess = sum(p.stat().st_size for p in files) - limit()
        for path in files:
            if excess <= 0:
                break
            excess -= path.stat().st_size
            path.unlink()
    except OSError:  # another process was faster, or the system holds on to a mapped file
        return


def _is_packed(checkpoint: Checkpoint, tensor: Tensor) -> bool:
    embedding = tensor.name == "tok_embeddings.weight"
    return tensor.format not in FLOATS and (not embedding or checkpoint.config.tied_embeddings)


def _packed(wanted: Mapping[str, Tensor], sizes: Mapping[str, int], native: ModuleType) -> Iterator[tuple[str, Bytes]]:
    def one(name: str) -> tuple[str, Bytes]:
        out = np.empty(sizes[name], np.uint8)
        native.pack(wanted[name].format, wanted[name].data, *wanted[name].shape, out)
        return name, out

    from concurrent.futures import ThreadPoolExecutor

    threads = default_threads()
    with ThreadPoolExecutor(threads) as pool:
        names = list(wanted)
        for start in range(0, len(names), threads):  # few at a time: only these are in memory
            yield from pool.map(one, names[start : start + threads])
