"""Files → documents: text, docstrings of Python, JSON lines, Parquet, and WARC with the text of its pages.

No more than a document's limit of bytes is ever held. What cannot be used is counted, by source and reason: empty,
not UTF-8, too long, malformed.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from typing import IO, Any, NamedTuple

from datatrove.data import Document
from datatrove.io import DataFolder, get_datafolder
from fsspec.utils import glob_translate

from llama2.data.settings import BuildRecipe, Source
from llama2.data.stage import Stage
from llama2.errors import DataError

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".warc": "warc"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class File(NamedTuple):
    """A file of a source: its path in the recipe's folder, its size, and when it changed, as far as that is known."""

    source: str
    path: str
    size: int
    changed: str


def find(recipe: BuildRecipe) -> list[File]:
    """Every source's files in order. Raises DataError for a source that has none."""
    folder = get_datafolder(recipe.folder)

    @cache
    def listing(place: str) -> dict[str, dict[str, Any]]:
        listed: dict[str, dict[str, Any]] = folder.find(place, detail=True) if folder.exists(place) else {}
        return listed

    found = []
    for name, source in recipe.sources.items():
        matching = {}
        for pattern in source.files:
            fixed = re.split(r"[*?\[]", pattern)[0]
            expression = re.compile(glob_translate(pattern))
            for path, facts in listing(fixed if fixed == pattern else fixed.rpartition("/")[0]).items():
                if expression.match(path) and not any(fnmatch(path, each) for each in source.exclude):
                    matching[path] = File(name, path, facts["size"], str(facts.get("mtime") or facts.get("ETag")))
        if not matching:
            patterns = ", ".join(source.files)
            raise DataError(f"sources.{name}: no file in {recipe.dir} matches {patterns}; mend files, or give dir=")
        found += [matching[path] for path in sorted(matching)]
    return found


class Read(Stage):
    """The documents of a task's files. Each has its source's name in its metadata, and where known its address."""

    name = "read"

    def __init__(self, recipe: BuildRecipe, files: Sequence[File]) -> None:
        super().__init__()
        self.recipe = recipe
        self.files = files

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        folder = get_datafolder(self.recipe.folder)
        for name, path, _, _ in self.files[rank::world_size]:
            source = self.recipe.sources[name]
            for number, (text, address) in enumerate(self._texts(folder, path, name, source)):
                if not text.strip():
                    self.count(name, "empty")
                    continue
                self.count(name, "read")
                self.count(name, "bytes read", len(text.encode(errors="replace")))
                metadata = {"source": name} | ({"url": address} if address else {})
                yield Document(text, f"{path}/{number}", metadata=metadata)

    def _texts(self, folder: DataFolder, path: str, name: str, source: Source) -> Iterator[tuple[str, str | None]]:
        form = source.format if source.format != "suffix" else _form(path)
        compression = None if form == "warc" else "infer"
        try:
            with folder.open(path, "rb", compression=compression) as file:
                if form == "parquet":
                    yield from self._parquet(file, name, source)
                elif form == "warc":
                    yield from self._warc(file, name)
                elif form == "jsonl":
                    yield from self._jsonl(file, name, source)
                else:
                    yield from self._plain(file, name, source, form)
        except (OSError, EOFError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{folder.resolve_paths(path)}: cannot be read ({reason}); mend it or exclude it"
            ) from error

    def _plain(self, file: IO[bytes], name: str, source: Source, form: str) -> Iterator[tuple[str, str | None]]:
        for data in self._whole(pieces(file, self.recipe.document_limit), name):
            text = self._decode(data, name)
            if text is None:
                continue
            if form == "docstrings":
                yield self._docstrings(text, name), None
            elif source.separator is not None:
                yield from ((part, None) for part in re.split(source.separator, text))
            else:
                yield text, None

    def _jsonl(self, file: IO[bytes], name: str, source: Source) -> Iterator[tuple[str, str | None]]:
        for line in self._whole(lines(file, self.recipe.document_limit), name):
            text = self._decode(line, name)
            if text is None or not text.strip():
                continue
            try:
                record = json.loads(text)
                if not isinstance(record, dict):
                    record = {}
            except (ValueError, RecursionError):
                record = {}
            yield from self._record(record, name, source)

    def _parquet(self, file: IO[bytes], name: str, source: Source) -> Iterator[tuple[str, str | None]]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as table:
            columns = [column for column in (source.text, "url") if column in table.schema_arrow.names]
            for batch in table.iter_batches(64, columns=columns):
                for record in batch.to_pylist():
                    yield from self._record(record, name, source)

    def _warc(self, file: IO[bytes], name: str) -> Iterator[tuple[str, str | None]]:
        """Pages of responses, reduced to their main text, and the text that conversions (WET) have already."""
        from fastwarc.warc import ArchiveIterator, WarcRecordType
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding

        limit = self.recipe.document_limit
        kinds = WarcRecordType.response | WarcRecordType.conversion
        for record in ArchiveIterator(file, record_types=kinds):
            page = record.record_type == WarcRecordType.response
            if page and "html" not in (record.http_content_type or "text/html"):
                self.count(name, "no page")
                continue
            data = record.reader.read(limit + 1)
            if len(data) > limit:
                self.count(name, "too long")
                continue
            address = record.headers.get("WARC-Target-URI")
            if page:
                html = bytes_to_str(data, str(record.http_charset or detect_encoding(data)))
                yield extract_plain_text(html, main_content=True), address
            elif (text := self._decode(data, name)) is not None:
                yield text, address

    def _record(self, record: dict[str, Any], name: str, source: Source) -> Iterator[tuple[str, str | None]]:
        text, address = record.get(source.text), record.get("url")
        if not isinstance(text, str):
            self.count(name, "malformed")
        elif len(text) > self.recipe.document_limit:
            self.count(name, "too long")
        else:
            yield text.encode("utf-8", "replace").decode(), address if isinstance(address, str) else None

    def _docstrings(self, text: str, name: str) -> str:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            self.count(name, "malformed")
            return ""
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        return "\n\n".join(docstring for docstring in found if docstring)

    def _whole(self, records: Iterator[bytes | None], name: str) -> Iterator[bytes]:
        for record in records:
            if record is None:
                self.count(name, "too long")
            else:
                yield record

    def _decode(self, data: bytes, name: str) -> str | None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.count(name, "not UTF-8")
            return None


def _form(path: str) -> str:
    for suffix in _COMPRESSED:
        path = path.removesuffix(suffix)
    return next((form for suffix, form in _SUFFIXES.items() if path.endswith(suffix)), "text")


def lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines of a file; None for one of more than `limit` bytes, of which no more is held."""
    while line := file.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            while (line := file.readline(limit)) and not line.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def pieces(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """A file in pieces of up to `limit` bytes that end with a paragraph, or else a line; None for a longer line."""
    data = file.read(limit + 1)
    while len(data) > limit:
        end = data.rfind(b"\n\n", 0, limit) + 2
        if end < 2:
            end = data.rfind(b"\n", 0, limit) + 1
        if end:
            yield data[:end]
            data = data[end:]
        else:
            yield None
            while data and b"\n" not in data:
                data = file.read(limit)
            data = data[data.find(b"\n") + 1 :] if data else b""
        data += file.read(limit + 1 - len(data))
    if data:
        yield data
