"""Weights repacked for the instruction set, kept on disk so that the next start is a memory map.

A file of the cache is: magic, header length, header, then each quantised matrix in native/packed.h's layout from a
64-byte boundary. The header says all that the content depends on: the model file's path, size and time, instruction
set, layout, and every tensor's place. A file counts only if its header and its length are exactly what they should be;
files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import Checkpoint, Tensor
from llama2.errors import EngineError
from llama2.hub import store
from llama2.native import default_threads

Bytes = NDArray[np.uint8]

#: Raised whenever native/packed.h changes what it writes.
LAYOUT = 3
_MAGIC = b"llama2 packed weights\n".ljust(24, b"\0")
_DEFAULT_LIMIT = 32 << 30


def pack(checkpoint: Checkpoint, native: ModuleType) -> dict[str, Bytes]:
    """The packed form of every quantised matrix of `checkpoint`, by name; from the cache if it is there.

    The first time, every weight is checked to be a finite number (CheckpointError). If the cache cannot be written, the
    result stays in memory and a warning says so. Embeddings that are not also the output head are not packed: they are
    read row by row where they lie.
    """
    wanted = {name: tensor for name, tensor in checkpoint.tensors.items() if _is_packed(checkpoint, tensor)}
    sizes = {name: int(native.packed_bytes(t.format, *t.shape)) for name, t in wanted.items()}
    header, places, total = _describe(checkpoint, native.isa, sizes)
    path = folder() / f"{store.key(checkpoint.path)}-{native.isa}.bin"
    if (mapped := _open(path, header, places, total)) is not None:
        return mapped
    checkpoint.check_finite()
    try:
        _write(path, header, places, total, _packed(wanted, sizes, native))
    except OSError as error:
        warnings.warn(
            f"packed weights cannot be kept in {path.parent} ({error.strerror or error}); every start will repack them",
            stacklevel=2,
        )
        return dict(_packed(wanted, sizes, native))
    evict(keep=path)
    mapped = _open(path, header, places, total)
    return mapped if mapped is not None else dict(_packed(wanted, sizes, native))


def folder() -> Path:
    """Where packed weights are kept."""
    return store.home() / "packed"


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
        files = sorted(folder().iterdir(), key=lambda p: (p == keep, p.stat().st_mtime_ns))
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
    return tensor.format not in ("F32", "F16", "BF16") and (not embedding or checkpoint.config.tied_embeddings)


def _describe(
    checkpoint: Checkpoint, isa: str, sizes: Mapping[str, int]
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """The header, each tensor's (offset, size), and the whole file's size."""
    stat = checkpoint.path.stat()
    facts = {
        "path": str(checkpoint.path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "isa": isa,
        "layout": LAYOUT,
        "tensors": [
            [t.name, t.format, *t.shape, sizes[t.name]] for t in checkpoint.tensors.values() if t.name in sizes
        ],
    }
    text = json.dumps(facts).encode()
    header = _MAGIC + struct.pack("<Q", len(text)) + text
    places, at = {}, _aligned(len(header))
    for name, size in sizes.items():
        places[name] = (at, size)
        at = _aligned(at + size)
    return header, places, at


def _aligned(offset: int) -> int:
    return (offset + 63) // 64 * 64


def _packed(wanted: Mapping[str, Tensor], sizes: Mapping[str, int], native: ModuleType) -> Iterator[tuple[str, Bytes]]:
    def one(name: str) -> tuple[str, Bytes]:
        out = np.empty(sizes[name], np.uint8)
        native.pack(wanted[name].format, wanted[name].data, *wanted[name].shape, out)
        return name, out

    threads = default_threads()
    with ThreadPoolExecutor(threads) as pool:
        names = list(wanted)
        for start in range(0, len(names), threads):  # few at a time: only these are in memory
            yield from pool.map(one, names[start : start + threads])


def _write(
    path: Path,
    header: bytes,
    places: Mapping[str, tuple[int, int]],
    total: int,
    content: Iterator[tuple[str, Bytes]],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(header)
            for name, data in content:
                file.seek(places[name][0])
                file.write(data.data)
            file.truncate(total)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _open(path: Path, header: bytes, places: Mapping[str, tuple[int, int]], total: int) -> dict[str, Bytes] | None:
    try:
        if path.stat().st_size != total:
            return None
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return None
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        os.utime(path)  # used now
    except OSError:
        return None
    return {name: data[at : at + size] for name, (at, size) in places.items()}
