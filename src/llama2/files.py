"""A model's files, which come from strangers: the one way to open, map, parse and write them.

A folder can hold anything under any name: a FIFO that never answers, a link to a private file, 60 MB of brackets. Every
reader gets its bytes here. `error` is the class that the caller raises.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from llama2.errors import CheckpointError, Llama2Error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The most bytes of a JSON file or a template. A tokenizer_config.json of 30,000 added tokens has 6 MB.
MAX_TEXT = 1 << 26
#: The most bytes of memory that a JSON file may need beside its own: decoded, and as values.
MAX_VALUES = 1 << 26

_VALUE = 100  # the most bytes that a value needs for each of the marks by which values are counted
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_FILE_NAME = r"(?a)[\w-][\w.-]{0,254}"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_WRITE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_NEW, _END = _WRITE | os.O_EXCL, _WRITE | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)


#: Names that are devices on Windows in every folder, also with an ending, and names that it changes or cuts.
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[1-9¹²³]|lpt[1-9¹²³])\s*(\..*)?", re.IGNORECASE)


class Repeated(dict[str, Any]):
    """A JSON object with keys that are there twice and differ, `twice`. The last value counts, as in Python's json."""

    __slots__ = ("twice",)
    twice: frozenset[str]


def open_file(path: Path, *, error: type[Llama2Error] = CheckpointError) -> BinaryIO:
    """A regular file, open to be read. Raises `error` for anything else, and for a pointer of Git LFS."""
    if sys.platform == "win32" and reserved(path.name):
        raise error(f"{path}: is the name of a device on Windows, or ends in what Windows cuts; rename it")
    try:
        descriptor = os.open(path, _FLAGS)  # without O_NONBLOCK, a FIFO would wait for its writer
    except (OSError, ValueError) as reason:
        raise _refused(path, reason, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refused(path, None, error)
    file = os.fdopen(descriptor, "rb")
    try:
        start = file.read(len(_POINTER))
        file.seek(0)
    except OSError as reason:
        file.close()
        raise _refused(path, reason, error) from None
    if start == _POINTER:
        file.close()
        raise error(f"{path}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in {path.parent}")
    return file


def _refused(path: Path, reason: Exception | None, error: type[Llama2Error]) -> Llama2Error:
    """The error for a path that is not a regular file which can be read."""
    if isinstance(reason, ValueError):
        return error(f"{quote(str(path))}: is not a path; check it")
    if path.is_dir():
        return error(f"{path}: is a folder; give the model file in it")
    if path.is_symlink() and not path.exists():
        return error(f"{path}: is a link to a file that is not there; put the file itself there")
    if isinstance(reason, FileNotFoundError | NotADirectoryError):
        return error(f"{path}: no such file; check the path, or see `llama2 list`")
    if isinstance(reason, OSError) and (path.is_file() or not path.exists()):
        return error(f"{path}: cannot be read ({reason.strerror}); check its permissions")
    return error(f"{path}: is not a regular file, which could wait or never end; put the file itself there")


def read(path: Path, *, limit: int = MAX_TEXT, error: type[Llama2Error] = CheckpointError) -> bytes:
    """The whole content of a short file. Raises `error` when it is empty, or has more bytes than `limit`."""
    with open_file(path, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}: has {size} bytes, and the limit is {limit}; choose another model")
        try:
            text = file.read(size)
        except OSError as reason:
            raise _refused(path, reason, error) from None
    if not text:
        raise damaged(path, "is empty", error)
    return text


def sha256(path: Path, *, error: type[Llama2Error] = CheckpointError) -> str:
    """SHA-256 of a regular file, in hexadecimal. Raises `error` as `open_file`."""
    with open_file(path, error=error) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it reads into buffers


def first_bytes(path: Path, size: int) -> bytes:
    """The first bytes of a file, which identify its format; none when it is not a file, or cannot be read."""
    try:
        with open_file(path) as file:
            return file.read(size)
    except (OSError, CheckpointError):
        return b""


def exists(path: Path) -> bool:
    """Whether anything has this name, be it a link that leads nowhere; what it is, `open_file` says."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the path
        return False


def reserved(name: str) -> bool:
    """Whether Windows takes a file's name for a device, cuts its end, or writes a stream of another file."""
    return bool(_RESERVED.fullmatch(name)) or name != name.rstrip(". ") or ":" in name


def named(path: Path) -> Path:
    """The path, made absolute where it does not end in a name (".", "..", "/"), beside which files are looked for."""
    return path if path.name not in ("", "..") or not exists(path) else path.resolve()


def inside(folder: Path, name: str, *, error: type[Llama2Error] = CheckpointError) -> Path:
    """A file of a model's folder, which may be absent. Raises `error` when its name, or a link, leads elsewhere."""
    if not re.fullmatch(_FILE_NAME, name):
        raise error(f"{folder}: {quote(name)} is not the name of a file in it; download it again")
    return refuse_links_out(folder / name, error=error)


def refuse_links_out(path: Path, *, error: type[Llama2Error] = CheckpointError) -> Path:
    """The path itself. Raises `error` for a link that a stranger may have laid to a private file.

    Good are links within a folder, to blobs of a Hub's cache, and to a file of the same name. Weights may link to any
    file (docs/decisions/0012-links-to-model-files.md).
    """
    root, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    blob = target.parent.name == "blobs" and target.parent.with_name("snapshots").is_dir()
    if target.is_relative_to(root) or blob or target.name == path.name or path.suffix in _WEIGHTS:
        return path
    raise error(
        f"{path}: is a link to {quote(target.name)} outside of its folder; put the file itself there, or link to one "
        f"called {path.name}"
    )


def load_json(
    path: Path, *, limit: int = MAX_TEXT, memory: int = MAX_VALUES, error: type[Llama2Error] = CheckpointError
) -> dict[str, Any]:
    """The JSON object that a file holds. Raises `error` as `read` and `parse_json` do."""
    return parse_json(path, read(path, limit=limit, error=error), memory=memory, error=error)


def parse_json(
    path: Path,
    text: bytes,
    what: str = "it",
    *,
    memory: int = MAX_VALUES,
    error: type[Llama2Error] = CheckpointError,
) -> dict[str, Any]:
    """The JSON object that `text` is, `what` of the file at `path`.

    Values are not judged: whole numbers may have 4,300 digits, floats be NaN, texts hold lone surrogates. An object
    with keys that are there twice and differ is a `Repeated`. Raises `error` for what is not an object, or could need
    more than `memory` bytes beside its own.
    """
    refuse_memory(path, text, what, memory=memory, error=error)
    try:
        values = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise damaged(path, f"{what} is not UTF-8", error) from None
    except (json.JSONDecodeError, RecursionError) as reason:
        raise damaged(path, f"{what} is not JSON ({reason})", error) from None
    except ValueError:  # Python's own limit, because the time of that conversion grows with the square of the length
        raise error(f"{path}: {what} has a number of more than 4300 digits; choose another model") from None
    if not isinstance(values, dict):
        raise damaged(path, f"{what} is not a JSON object", error)
    return values


def refuse_memory(path: Path, text: bytes, what: str = "it", *, memory: int, error: type[Llama2Error]) -> None:
    """Raise `error` for a JSON text that could need more than `memory` bytes beside its own."""
    if (needed := json_memory(text)) > memory:
        raise error(f"{path}: {what} could need {needed >> 20} MB of memory as JSON; choose another model")


def json_memory(text: bytes) -> int:
    """The most bytes that a JSON text, decoded, and its values could need beside it.

    Letters need as many as the widest of them; every value has one of four marks in front of it.
    """
    escaped = 4 if re.search(rb"\\u[dD][89abAB]", text) else 2 if b"\\u" in text else 1
    decoded = 1 if text.isascii() else 4 if re.search(rb"[\xf0-\xff]", text) else 2
    return (decoded + max(decoded, escaped)) * len(text) + _VALUE * sum(map(text.count, (b",", b":", b"[", b"{")))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    twice = frozenset(key for key, value in pairs if value != values[key])
    if not twice:
        return values
    repeated = Repeated(values)
    repeated.twice = twice
    return repeated


class MappedFile:
    """A file mapped read-only. Who takes bytes of it checks first, with exact integers, that they exist.

    Who shortens a file that is mapped ends this process (SIGBUS): replace it by renaming, as `create` does.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np  # not at the top: a start of the program that maps nothing is quicker without it

        self.path = path
        with open_file(path) as file:
            try:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise damaged(path, "is empty")
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        self._bytes = np.frombuffer(self._mapped, np.uint8)
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

    def release_pages(self) -> None:
        """Take this mapping's pages out of the process's memory; a page that is touched again is read again.

        Who reads a whole model once calls this after each tensor, or resident memory grows by the whole file.
        """
        if hasattr(mmap, "MADV_DONTNEED"):  # Windows releases pages by itself when memory is short
            self._mapped.madvise(mmap.MADV_DONTNEED)


def damaged(path: Path, what: str, error: type[Llama2Error] = CheckpointError) -> Llama2Error:
    """The error for a file that contradicts itself or ends early."""
    return error(f"{path}: {what}; the file is damaged or cut short, download it again")


def refuse_overlaps(path: Path, spans: Iterable[tuple[int, int, str]]) -> None:
    """Raise CheckpointError when two tensors, given as (start, end, name), share bytes of a file."""
    before, last = 0, ""
    for start, end, name in sorted(spans):
        if start < before:
            raise damaged(path, f"tensors {quote(last)} and {quote(name)} overlap")
        before, last = end, name


@contextmanager
def replaced(path: Path, *, shared: bool = False, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when it is whole. Otherwise nothing of it remains.

    Its name until then is `path`.part. With `shared` it is a name of its own, for processes that write the same file at
    the same time. What an earlier process left at that name is removed, and a link not followed.
    Who has mapped an older file keeps that one, because `path` itself is never written. Raises OSError.
    """
    if sys.platform == "win32" and reserved(path.name):
        raise OSError(errno.EINVAL, "on Windows this is the name of a device, or ends in what is cut", str(path))
    part = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp" if shared else f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, _NEW, mode), "wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def create(path: Path, *, error: type[Llama2Error] = CheckpointError) -> Iterator[BinaryIO]:
    """`replaced`, which raises `error` when the system refuses."""
    try:
        with replaced(path) as file:
            yield file
    except OSError as reason:
        words = reason.strerror or reason
        raise error(f"{path}: cannot be written ({words}); free some room, or choose another") from reason


def append(path: Path, text: str, *, error: type[Llama2Error] = CheckpointError) -> None:
    """Add a text to a file's end, which need not be there. Raises `error` for a link, or when the system refuses."""
    try:
        with os.fdopen(os.open(path, _END, 0o666), "ab") as file:
            file.write(text.encode())
    except OSError as reason:
        raise error(
            f"{path}: cannot be written ({reason.strerror}); free some room, or remove what lies there"
        ) from None


def remove_half_line(path: Path, *, error: type[Llama2Error] = CheckpointError) -> None:
    """Cut what a killed process wrote of a file's last line. Raises `error` where it is not a file."""
    with open_file(path, error=error) as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
    if end < size:
        os.truncate(path, end)


def lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines of a file; None for one of more than `limit` bytes, of which no more is held."""
    while line := file.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            while (line := file.readline(limit)) and not line.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def quote(text: str) -> str:
    """A name from a file as a message may show it: on one line, and short."""
    return repr(text if len(text) <= 80 else text[:77] + "…")
