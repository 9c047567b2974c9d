"""Files of dialogs → records, each with its place, `FILE:LINE`: JSON lines, JSON, CSV, Parquet.

Files come from strangers: regular ones alone are opened, and no more than a record's limit is held of what has none.
A record is separated from its neighbours before it is parsed. So a bad one is known by its place, and can be left out.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llama2 import files
from llama2.data import compressed, extract
from llama2.errors import DataError, DialogError
from llama2.text.worker import Worker

#: What a record is before it is parsed: JSON text, or a row by its columns; None: longer than LONGEST.
Raw = bytes | Mapping[str, Any] | None

#: The most bytes of a record, and of a JSON file that is not JSON lines.
LONGEST, LARGEST = 1 << 24, 1 << 28
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

_STRUCTURE = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|[\[\]{},\n]')


def find(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and those in folders, in order. Raises DataError for what is missing or empty of dialogs.

    In folders, hidden files are left out, and so are those of other suffixes. Each may be compressed but Parquet.
    """
    found: list[Path] = []
    for path in paths:
        if not files.exists(path):
            raise DataError(f"{path}: no such file or folder; give files of dialogs")
        if not path.is_dir():
            found.append(path)
            continue
        inside = [
            each
            for each in sorted(path.rglob("*"))
            if _kind(each) in _SUFFIXES
            and each.is_file()
            and not any(part.startswith(".") for part in each.relative_to(path).parts)
        ]
        if not inside:
            raise DataError(f"{path}: holds no file of dialogs; they end in {', '.join(_SUFFIXES)}")
        found += inside
    return found


def records(path: Path) -> Iterator[tuple[str, Raw]]:
    """What is in a file, by its suffix; without one that is known, JSON lines. Blank lines are not records.

    Raises DataError for a file that cannot be read.
    """
    kind = _kind(path)
    with files.open_file(path, error=DataError) as raw:
        try:
            if kind == ".parquet":
                yield from _parquet(path)
                return
            file = compressed.unpacked(raw, path.name.lower(), os.fstat(raw.fileno()).st_size)
            if kind in (".csv", ".tsv"):
                yield from _rows(path, file, "\t" if kind == ".tsv" else ",")
            elif kind == ".json":
                yield from _values(path, file)
            else:
                for number, line in enumerate(files.lines(file, LONGEST), 1):
                    if line is None or line.strip():
                        yield f"{path}:{number}", line
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise DataError(f"{path}: cannot be read ({reason}); check the file") from None


def _kind(path: Path) -> str:
    """The suffix that says a file's format, its compression's left out."""
    return Path(compressed.bare(path.name.lower())).suffix


def value(record: Any) -> Any:
    """The value of what `records` gave: a line's JSON, or what is one already. Raises DialogError."""
    if record is None:
        raise DialogError(f"has more than {LONGEST >> 20} MB; cut it")
    return parse(record) if isinstance(record, bytes) else record


def parse(text: bytes) -> Any:
    """The value of a JSON text. Raises DialogError."""
    if len(text) > LONGEST or (needed := files.json_memory(text)) > files.MAX_VALUES:
        size = len(text) if len(text) > LONGEST else needed
        raise DialogError(f"would need {size >> 20} MB as JSON, which no dialog does; cut it")
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DialogError(f"is not UTF-8, at byte {error.start} of the line; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DialogError(f"is not JSON ({error}); write one object a line") from None
    if b"\\u" in text and re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise DialogError("holds half of a surrogate pair, which is not a character; fix or remove the line")
    return value


def _values(path: Path, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """The elements of a file's array; or, where it is none, its values, each from a line of its own on."""
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise DataError(
            f"{path}: has more than {LARGEST >> 20} MB; write it as JSON lines, in a file that ends in .jsonl"
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    array = data.lstrip()[:1] == b"["
    ends, level = (b",", 1) if array else (b"\n", 0)
    depth, line = 0, 1
    start, begun = 0, 1  # of the value, and in which line

    def value(end: int) -> Iterator[tuple[str, bytes]]:
        text = data[start:end]
        if text.strip():
            blank = text[: len(text) - len(text.lstrip())].count(b"\n")
            yield f"{path}:{begun + blank}", text.strip()

    for match in _STRUCTURE.finditer(data):
        symbol, at = match[0], match.start()
        if symbol == ends and depth == level:
            yield from value(at)
            start, begun = at + 1, line + (symbol == b"\n")
        elif symbol in (b"[", b"{"):
            depth += 1
            if array and depth == 1:
                start, begun = at + 1, line
        elif symbol in (b"]", b"}"):
            depth = max(0, depth - 1)
            if array and depth == 0:
                yield from value(at)
                start, begun, level = at + 1, line, -1
                break
        line += symbol == b"\n"
    yield from value(len(data))  # what follows an array is not a value, as the parser will find
    if array and level != -1:
        raise DataError(f"{path}: ends before its array does; the file is cut short")


def _rows(path: Path, file: IO[bytes], separator: str) -> Iterator[tuple[str, Raw]]:
    """Rows by the names in the first one; empty cells are left out. Raises DataError."""
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for text in files.lines(file, LONGEST):
            line += 1
            if text is None:
                raise DataError(f"{path}:{line}: has more than {LONGEST >> 20} MB; cut it, or write JSON lines")
            try:
                yield text.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{line}: is not UTF-8, at byte {error.start}; save the file as UTF-8") from None

    texts = lines()
    head = next(texts, "")
    if separator not in head and ";" in head:
        separator = ";"
    try:
        names = next(csv.reader([head], delimiter=separator), [])
        rows = csv.reader(texts, delimiter=separator)
        begins = line + 1
        for row in rows:
            where, begins = f"{path}:{begins}", line + 1
            if len(row) > len(names):
                raise DataError(f"{where}: has {len(row)} cells, and the first line names {len(names)}; fix the row")
            if cells := {name.strip(): cell for name, cell in zip(names, row, strict=False) if cell.strip()}:
                yield where, cells
    except csv.Error as error:
        raise DataError(f"{path}:{line}: is not CSV ({error}); fix the row") from None


def _parquet(path: Path) -> Iterator[tuple[str, Raw]]:
    """Rows, from a process that can be killed. Places count rows, because there are no lines."""
    number = 0
    seconds = extract.SECONDS_OF_RECORDS
    request: dict[str, Any] = {"place": str(path), "form": "rows", "names": [], "limit": LONGEST}
    with Worker(extract.__file__, DataError) as worker:
        try:
            while True:
                answer = worker.ask({**request, "seconds": seconds}, extract.PATIENCE * seconds)
                if "error" in answer:
                    raise DataError(answer["error"])
                request = {"next": True}
                if answer.get("records") == []:
                    return
                for reason, text, _ in answer.get("records", ()):
                    number += 1
                    yield f"{path}:{number}", None if reason else text.encode()
        except DataError as error:
            raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}; write it anew") from None
