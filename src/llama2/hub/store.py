"""The folder of everything that was fetched: its place, its locks, and which files are known to be whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llama2.errors import HubError
from llama2.files import replaced
from llama2.hub.progress import Progress

_CHUNK = 1 << 20
_ROOM = "free some, or point LLAMA2_HOME (HF_HOME for the Hub's models) to a larger disk"
_OWN = "point LLAMA2_HOME (HF_HOME for the Hub's models) to a folder of yours"


def home() -> Path:
    """$LLAMA2_HOME, else `llama2` in the platform's cache folder. Raises HubError for a user who has no home."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or "~/.cache"
    return below_home(os.environ.get("LLAMA2_HOME") or os.path.join(base, "llama2"), "LLAMA2_HOME")


def below_home(folder: str, variable: str) -> Path:
    """`folder`, whose ~ is a user's home. Raises HubError where there is none, and names what is to be set instead."""
    expanded = os.path.expanduser(folder)
    if expanded.startswith("~"):
        raise HubError(f"{folder}: this user has no home folder; point {variable} to a folder of yours")
    return Path(expanded).absolute()


def models() -> Path:
    """Where registered models lie."""
    return home() / "models"


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None when it is not there or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, atomically. Records only save work: one that cannot be written is left out."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, shared=True) as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")


def key(path: Path) -> str:
    """What the names of records and caches of the file `path` begin with."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]


def artifact(model: Path, what: str) -> Path:
    """The cached file of what is derived from a model file: its packed weights, its vocabulary."""
    return home() / "packed" / f"{key(model)}-{what}.bin"


def forget(model: Path) -> int:
    """Remove the artifacts of a model file; bytes freed."""
    freed = 0
    for file in (home() / "packed").glob(f"{key(model)}*"):
        freed += file.stat().st_size
        file.unlink()
    return freed


def _facts(path: Path, expected: str) -> tuple[Path, dict[str, Any]]:
    """Where the record of a verified file lies, and what it has to say to count."""
    stat = path.stat()
    record = home() / "verified" / f"{key(path)}.json"
    return record, {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": expected}


def trust(path: Path, known: str) -> None:
    """Record that `path` has this digest."""
    write_record(*_facts(path, known))


def digest(path: Path, algorithm: str, progress: Progress) -> str:
    """The file's digest in hexadecimal."""
    size, hashing = path.stat().st_size, hashlib.new(algorithm, usedforsecurity=algorithm != "md5")
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hashing.update(chunk)
            progress(f"verifying {path.name}", file.tell(), size)
    return hashing.hexdigest()


def verified(path: Path, expected: str, progress: Progress, algorithm: str = "sha256") -> bool:
    """Whether `path` has this digest: hashed once, then believed while path, size and modification time are the same.

    Raises HubError when the file cannot be read.
    """
    try:
        record, facts = _facts(path, expected)
        if read_record(record) == facts:
            return True
        if digest(path, algorithm, progress) != expected:
            return False
    except OSError as error:
        raise HubError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    write_record(record, facts)
    return True


def require_room(folder: Path, size: int) -> None:
    """Raise HubError if the disk of `folder`, which exists, has less than `size` bytes free."""
    import shutil

    free = shutil.disk_usage(folder).free
    if free < size:
        raise HubError(f"{folder}: {size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; {_ROOM}")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Create `folder` and turn what may go wrong while files are written below it into HubError with advice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise HubError(f"{folder}: no room left ({error.strerror}); {_ROOM}") from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
            raise HubError(f"{folder}: cannot be written ({error.strerror}); {_OWN}") from error
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, so that two processes do not fetch the same thing; waits for the other one."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield
