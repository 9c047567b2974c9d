"""Files that alignment leaves: lines of data and reports, which appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama2 import files
from llama2.errors import DataError


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file. Raises DataError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.create(path, error=DataError) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
