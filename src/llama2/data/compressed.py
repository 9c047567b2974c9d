"""Compressed files as streams of what is in them, which end where a bomb would begin."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from typing import IO, Any

#: A file may unpack to so many bytes, and to so many times its own size more. Text shrinks to a tenth, and
#: few logs to a hundredth.
FREE, RATIO = 1 << 26, 100
#: Memory of an xz decoder, in bytes; its presets need up to 65 MB.
_XZ_MEMORY = 1 << 27

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


class TooMuchError(ValueError):
    """A file unpacks to more than any text does."""


def most(size: int) -> int:
    """The most bytes that a file of `size` bytes may unpack to."""
    return FREE + RATIO * size


def bare(path: str) -> str:
    """A file's name without the suffix of its compression."""
    return next((path.removesuffix(suffix) for suffix in SUFFIXES if path.endswith(suffix)), path)


def unpacked(file: IO[bytes], path: str, size: int) -> IO[bytes]:
    """What is in a file of `size` bytes, by its name's suffix; the file itself where that is of no compression.

    Reading raises TooMuchError beyond the limit, and OSError without a number, EOFError, ValueError or LZMAError for a
    damaged file.
    """
    stream: Any
    if path.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=file)
    elif path.endswith(".bz2"):
        stream = bz2.BZ2File(file)
    elif path.endswith(".xz"):
        stream = _Xz(file)
    elif path.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    else:
        return file
    return io.BufferedReader(_Bounded(stream, most(size)), 1 << 16)


class _Bounded(io.RawIOBase):
    """A stream that may give so many bytes."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit, self._left = stream, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise TooMuchError(f"unpacks to more than {self._limit >> 20} MB")
        buffer[: len(data)] = data
        return len(data)


class _Xz:
    """An xz file whose decoder has a limit to its memory, which Python's own reader does not have."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                data = self._decoder.unused_data.lstrip(b"\0") or self._file.read(1 << 16).lstrip(b"\0")
                if not data:
                    return b""
                self._decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
            elif self._decoder.needs_input:
                data = self._file.read(1 << 16)
                if not data:
                    raise EOFError("ends early")
            else:
                data = b""
            if found := self._decoder.decompress(data, size):
                return found
