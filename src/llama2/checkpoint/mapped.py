"""The one guard between the numbers in a model file and memory: every format's reader gets its bytes here."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from llama2 import files
from llama2.errors import CheckpointError
from llama2.files import quote
from llama2.files import start as start_of

__all__ = ["MappedFile", "damaged", "quote", "refuse_overlaps", "release_pages", "start_of"]

#: Every file that is mapped at the moment.
_MAPPED: WeakSet[mmap.mmap] = WeakSet()


class MappedFile:
    """A file mapped read-only. Whoever takes bytes of it checks first, with exact integers, that they exist.

    Who shortens a file that is mapped ends this process (SIGBUS): replace it by renaming, as `files.create` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.open_file(path) as file:
            try:
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
