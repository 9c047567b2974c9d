"""The one guard between the numbers in a model file and memory: every format's reader gets its bytes here."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from llama2.errors import CheckpointError

#: Every file that is mapped at the moment.
_MAPPED: WeakSet[mmap.mmap] = WeakSet()


class MappedFile:
    """A file mapped read-only. Whoever takes bytes of it checks first, with exact integers, that they exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.is_dir():
                raise CheckpointError(f"{path}: is a folder; give the model file in it")
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; check the path, or see `llama2 list`")
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise damaged(path, "is empty")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        _MAPPED.add(mapped)
        self._bytes = np.frombuffer(mapped, np.uint8)
        self.buffer = self._bytes.data  # for struct, which raises struct.error beyond the end

    def check(self, offset: int, nbytes: int, what: str) -> None:
        """Raise CheckpointError unless the file has bytes [offset, offset + nbytes), which `what` occupies."""
        if not 0 <= offset <= offset + nbytes <= self.size:
            raise damaged(
                self.path, f"{what} needs bytes {offset} to {offset + nbytes}, and the file ends at {self.size}"
            )

    def view(self, offset: int, nbytes: int, what: str) -> NDArray[np.uint8]:
        """Those bytes, checked, and not read before they are touched."""
        self.check(offset, nbytes, what)
        return self._bytes[offset : offset + nbytes]


def release_pages() -> None:
    """Take the pages of all mapped files out of this process's memory; what is touched again is mapped again.

    Whoever reads a whole model once calls this after each tensor, or its resident memory grows by the whole file.
    """
    if hasattr(mmap, "MADV_DONTNEED"):  # Windows lets go by itself when memory is short
        for mapped in list(_MAPPED):
            mapped.madvise(mmap.MADV_DONTNEED)


def start_of(path: Path, size: int) -> bytes:
    """The first bytes of a file, by which its format is told; none when it is no file, or cannot be read."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that contradicts itself or ends early."""
    return CheckpointError(f"{path}: {what}; the file is damaged or cut short, download it again")


def refuse_overlaps(path: Path, spans: Iterable[tuple[int, int, str]]) -> None:
    """Raise CheckpointError when two tensors, given as (start, end, name), share bytes of a file."""
    before, last = 0, ""
    for start, end, name in sorted(spans):
        if start < before:
            raise damaged(path, f"tensors {quote(last)} and {quote(name)} overlap")
        before, last = end, name


def quote(text: str) -> str:
    """A name from a file as it may stand in a message: on one line, and short."""
    return repr(text if len(text) <= 80 else text[:77] + "…")
