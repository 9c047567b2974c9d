"""Model files that are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama2.errors import CheckpointError


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when it is whole. Raises CheckpointError when the system refuses."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise CheckpointError(f"{path}: cannot be written ({reason}); free some room, or choose another") from error
        raise
