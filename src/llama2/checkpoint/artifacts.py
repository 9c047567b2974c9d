"""The cache of artifacts derived from a model file, on disk, so that the next start need not compute them again.

Such a file is: magic, length and CRC-32 of the header, header, then each array from a 64-byte boundary. The header says
all that the content depends on and how long each array is. Path, sizes, times, inodes and samples of the model's files
are part of it. A file can be replaced by another of equal size and time.

A file counts only if its header is whole and states the same, and its length is exactly right. Its content must have
the CRC-32 that the header states, if there is one. Files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.files import replaced
from llama2.machine import available_memory

Bytes = NDArray[np.uint8]

_MAGIC = b"llama2 kept arrays\n".ljust(24, b"\0")
_START = struct.Struct("<24sQI")
_SAMPLE, _SAMPLES = 4096, 32  # bytes, and how many of them in a model's files
_PIECE = 16 << 20  # bytes that a thread reads at a time


def write(path: Path, model: Path, facts: Mapping[str, Any], arrays: Mapping[str, Bytes]) -> None:
    """Cache `arrays`, which are checked whenever they are read. Raises OSError, and leaves nothing half written."""
    sizes = {name: data.nbytes for name, data in arrays.items()}
    write_stream(path, model, facts, sizes, arrays.items(), check=_crc32(arrays))


def write_stream(
    path: Path,
    model: Path,
    facts: Mapping[str, Any],
    sizes: Mapping[str, int],
    content: Iterable[tuple[str, Bytes]],
    *,
    check: int | None = None,
) -> None:
    """`write` for arrays, of these `sizes` in bytes, that come one after another and are too long to check."""
    text = json.dumps({"facts": {**_identity(model), **facts}, "sizes": sizes, "crc32": check}).encode()
    places, total = _places(_START.size + len(text), sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, shared=True, mode=0o600) as file:
        file.write(_START.pack(_MAGIC, len(text), zlib.crc32(text)) + text)
        for name, data in content:
            file.seek(places[name])
            file.write(data.data)
        file.truncate(total)


def read(path: Path, model: Path, facts: Mapping[str, Any], *, resident: bool = False) -> dict[str, Bytes] | None:
    """The arrays cached for this `model` and exactly these `facts`; None when there are none.

    They are mapped; with `resident` they are read into memory of their own if there is plenty, but not on Windows.
    Linux gives that huge pages, and a file's mapping seldom, so that it is faster to use.
    """
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        magic, length, check = _START.unpack_from(data.data)
        text = data[_START.size : _START.size + length].tobytes()
        if magic != _MAGIC or zlib.crc32(text) != check:
            return None
        header = json.loads(text)
        places, total = _places(_START.size + length, header["sizes"])
        if header["facts"] != {**_identity(model), **facts} or len(data) != total:
            return None
        if resident and hasattr(os, "preadv") and total <= available_memory() * 3 // 4:
            data = _load(path, total)
        arrays = {name: data[at : at + header["sizes"][name]] for name, at in places.items()}
        if header["crc32"] is not None and header["crc32"] != _crc32(arrays):
            return None
        os.utime(path)  # used now
    except (OSError, ValueError, struct.error):
        return None
    return arrays


def _load(path: Path, size: int) -> Bytes:
    """The file's first `size` bytes, read by several threads. NumPy asks for huge pages."""
    from concurrent.futures import ThreadPoolExecutor

    data = np.empty(size, np.uint8)
    with open(path, "rb") as file, ThreadPoolExecutor() as pool:

        def fill(start: int) -> None:
            piece = data[start : start + _PIECE]
            while len(piece):
                count = os.preadv(file.fileno(), [piece.data], start)
                if count == 0:
                    raise OSError(f"{path} became shorter")
                start, piece = start + count, piece[count:]

        list(pool.map(fill, range(0, size, _PIECE)))
    data.flags.writeable = False
    return data


def _identity(model: Path) -> dict[str, Any]:
    """What distinguishes a model's files from others at the same path, also of equal size and time; reads 128 KB."""
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else [model]
    each = max(1, _SAMPLES // max(1, len(files)))
    identity = []
    for path in files:
        with path.open("rb", buffering=0) as file:
            s = os.fstat(file.fileno())
            check = 0
            for i in range(each):  # the first and the last bytes, and some between
                file.seek(max(0, s.st_size - _SAMPLE) * i // max(1, each - 1))
                check = zlib.crc32(file.read(_SAMPLE), check)
        identity.append([path.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, check])
    return {"path": str(model.resolve()), "files": identity}


def _crc32(arrays: Mapping[str, Bytes]) -> int:
    return reduce(lambda check, data: zlib.crc32(data.data, check), arrays.values(), 0)


def _places(at: int, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each array begins when the header ends at `at`, and where the file ends."""
    places = {}
    for name, size in sizes.items():
        places[name] = at = _aligned(at)
        at += size
    return places, _aligned(at)


def _aligned(offset: int) -> int:
    return (offset + 63) // 64 * 64
