"""Files → documents: text, JSON lines, Parquet, HTML, WARC with the text of its pages, and docstrings of Python.

Files come from strangers. No more than a document's limit of bytes is ever held of one. What a library reads is read in
a process of its own with limits of time and memory (extract.py). Compressed files end where a bomb would begin
(compressed.py). What cannot be used is left out and counted, by source and reason.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from datatrove.data import Document
from datatrove.io import DataFolder, get_datafolder
from fsspec.utils import glob_translate

from llama2.data import clean, compressed, encoding, extract
from llama2.data.settings import BuildRecipe, SourceSettings
from llama2.data.stage import Stage
from llama2.errors import DataError, Llama2Error
from llama2.files import json_memory, lines
from llama2.text.worker import Worker

_FORMS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}
#: Names that a record's text has where it is not where the recipe says.
_TEXTS = ("content", "body")
#: The most bytes of memory that a line of JSON may need.
_JSON_MEMORY = 1 << 28
#: Files of a task that are named among those that were left out.
_NAMED = 100
#: Reasons for which a document is left out.
_TOO_LONG, _TOO_MUCH, _MALFORMED = "too long", "took too much time or memory", "malformed"

Text = tuple[str, str | None]


class File(NamedTuple):
    """A file of a source: its path in the recipe's folder, its size, and when it changed, as far as that is known."""

    source: str
    path: str
    size: int
    changed: str


class _StoppedError(Llama2Error):
    """A process that reads for us was ended."""


def changed(info: Mapping[str, Any]) -> str:
    """When a file changed, by what fsspec knows of it; on a server that does not say, its version."""
    return str(info.get("mtime") or info.get("ETag"))


def find(recipe: BuildRecipe) -> list[File]:
    """Every source's files in order; none for a source whose patterns match nothing. What the recipe writes is none.

    Raises DataError where no source has a file, and for a source without one whose weight needs some.
    """
    folder = get_datafolder(recipe.folder)
    own = os.path.relpath(recipe.output.resolve(), recipe.folder) if "://" not in recipe.folder else ".."
    within = not own.startswith("..")

    @cache
    def listing(place: str) -> dict[str, dict[str, Any]]:
        listed: dict[str, dict[str, Any]] = folder.find(place, detail=True) if folder.exists(place) else {}
        return {
            path: facts
            for path, facts in listed.items()
            if facts.get("type", "file") == "file" and not (within and Path(path).is_relative_to(own))
        }

    found = []
    for name, source in recipe.sources.items():
        matching = {}
        for pattern in source.files:
            fixed = re.split(r"[*?\[]", pattern)[0]
            expression = re.compile(glob_translate(pattern))
            for path, facts in listing(fixed if fixed == pattern else fixed.rpartition("/")[0]).items():
                if expression.match(path) and not any(fnmatch(path, each) for each in source.exclude):
                    matching[path] = File(name, path, facts["size"], changed(facts))
        if not matching and source.weight is not None:
            patterns = ", ".join(source.files)
            raise DataError(f"sources.{name}: no file in {recipe.dir} matches {patterns}; fix files, or give dir=")
        found += [matching[path] for path in sorted(matching)]
    if not found:
        if not folder.exists(""):
            raise DataError(f"{recipe.dir}: no such folder; give the folder of the documents as dir=")
        patterns = ", ".join(dict.fromkeys(pattern for source in recipe.sources.values() for pattern in source.files))
        raise DataError(
            f"{recipe.dir}: no file in it matches {patterns}; fix the sources' files, or give another folder as dir="
        )
    return found


class Read(Stage):
    """The documents of a task's files. Each has its source's name in its metadata, and where known its address.

    Files that were left out, wholly or from a place on, are named in a file of `left_out`, where that is a folder.
    """

    name = "read"

    def __init__(self, recipe: BuildRecipe, files: Sequence[File], left_out: Path | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.files = files
        self.left_out = left_out

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        folder = get_datafolder(self.recipe.folder)
        files = _Files(self, folder)
        try:
            for file in self.files[rank::world_size]:
                name = file.source
                for number, (text, address) in enumerate(files.texts(file)):
                    if not text.strip():
                        self.count(name, "empty")
                        continue
                    self.count(name, "read")
                    self.count(name, "bytes read", len(text.encode(errors="replace")))
                    metadata = {"source": name} | ({"url": address} if address else {})
                    yield Document(text, f"{file.path}/{number}", metadata=metadata)
        finally:
            files.close()
        if self.left_out:
            self.left_out.mkdir(parents=True, exist_ok=True)
            (self.left_out / f"{rank:05d}.json").write_text(json.dumps(files.named))


class _Files:
    """Reads files for a `Read`, with what that takes."""

    def __init__(self, stage: Read, folder: DataFolder) -> None:
        self.named: list[tuple[str, str, str]] = []  # source, path, reason: of files that were left out
        self._stage, self._folder, self._limit = stage, folder, stage.recipe.document_limit
        self._reader, self._extractor = (Worker(extract.__file__, _StoppedError) for _ in range(2))
        self._detector: Any = None
        self._now = File("", "", 0, "")

    def close(self) -> None:
        self._reader.close()
        self._extractor.close()

    def texts(self, file: File) -> Iterator[Text]:
        """The documents of a file. Raises DataError where the system or the network does not give its bytes."""
        self._now, source = file, self._stage.recipe.sources[file.source]
        form = source.format if source.format != "suffix" else _form(file.path)
        try:
            if form in ("parquet", "warc"):
                yield from self._records(source, form)
                return
            with self._folder.open(file.path, "rb", compression=None) as raw:
                stream = compressed.unpacked(raw, file.path, file.size)
                if form == "html":
                    yield from self._html(stream)
                else:
                    yield from self._text(stream, source, form)
        except compressed.TooMuchError as error:
            self._leave("unpacks to too much", str(error))
        except UnicodeDecodeError:
            self._leave("not UTF-8", "breaks its own encoding")
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, OSError) and error.errno is not None:
                place = self._folder.resolve_paths(file.path)
                raise DataError(f"{place}: cannot be read ({reason}); fix it or exclude it") from error
            self._leave("damaged", reason)

    def _count(self, what: str) -> None:
        self._stage.count(self._now.source, what)

    def _leave(self, what: str, reason: str) -> None:
        """Count something that was left out, and name its file once."""
        self._count(what)
        known = any(path == self._now.path for _, path, _ in self.named[-1:])
        if not known and len(self.named) < _NAMED:
            self.named.append((self._now.source, self._now.path, f"{what}: {reason}" if reason else what))

    def _text(self, stream: IO[bytes], source: SourceSettings, form: str) -> Iterator[Text]:
        stream, start, name = encoding.opened(stream)
        if name:
            self._count(f"converted: {name}")
        if not encoding.is_text(start):
            self._leave("no text", "")
            return
        yield from self._jsonl(stream, source) if form == "jsonl" else self._plain(stream, source, form)

    def _plain(self, stream: IO[bytes], source: SourceSettings, form: str) -> Iterator[Text]:
        for data in self._whole(pieces(stream, self._limit)):
            text = self._decode(data)
            if text is None:
                continue
            if form == "docstrings":
                yield from self._extracted({"source": text}, len(data), None)
            elif source.separator is not None:
                yield from ((part, None) for part in re.split(source.separator, text))
            else:
                yield text, None

    def _jsonl(self, stream: IO[bytes], source: SourceSettings) -> Iterator[Text]:
        for line in self._whole(lines(stream, self._limit)):
            text = self._decode(line)
            if text is None or not text.strip():
                continue
            if json_memory(line) > _JSON_MEMORY:
                self._leave(_TOO_MUCH, "a line of JSON with too many values")
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = None
            record = record if isinstance(record, dict) else {}
            value = next((record[key] for key in (source.text, *_TEXTS) if key in record), None)
            if not isinstance(value, str):
                self._leave(_MALFORMED, _without_text(source, record))
            elif len(value) > self._limit:
                self._leave(_TOO_LONG, "")
            else:
                address = record.get("url")
                yield value.encode("utf-8", "replace").decode(), address if isinstance(address, str) else None

    def _records(self, source: SourceSettings, form: str) -> Iterator[Text]:
        """What a process of its own reads of a file with many documents."""
        place = self._folder.resolve_paths(self._now.path)
        request = {"place": place, "form": form, "names": [source.text, *_TEXTS], "limit": self._limit}
        left = compressed.most(self._now.size)
        opened = answer = self._ask(self._reader, request, extract.SECONDS_OF_RECORDS)
        while not answer.keys() & {"error", "stopped"}:
            answer = self._ask(self._reader, {"next": True}, extract.SECONDS_OF_RECORDS)
            if answer.get("records") == []:
                return
            for kind, text, address in answer.get("records", ()):
                left -= len(text)
                if left < 0:
                    raise compressed.TooMuchError("its records are more than any text is")
                if kind is None:
                    yield text.encode("utf-8", "replace").decode(), address
                elif kind.startswith("page "):
                    yield from self._page(text, kind.removeprefix("page "), address)
                elif kind == "text":
                    decoded = self._decode(text.encode("latin-1"))
                    yield from () if decoded is None else [(decoded, address)]
                elif kind == "no page":
                    self._count(kind)
                else:
                    self._leave(kind, _without_text(source, opened["columns"]) if kind == _MALFORMED else "")
        if "error" in answer:
            self._leave("damaged", answer["error"])

    def _html(self, stream: IO[bytes]) -> Iterator[Text]:
        data = stream.read(self._limit + 1)
        if len(data) > self._limit:
            self._leave(_TOO_LONG, "")
        else:
            yield from self._page(data.decode("latin-1"), "", None)

    def _page(self, data: str, charset: str, address: str | None) -> Iterator[Text]:
        """The text of a page whose bytes are characters."""
        yield from self._extracted({"page": data, "charset": charset}, len(data), address)

    def _extracted(self, request: dict[str, Any], size: int, address: str | None) -> Iterator[Text]:
        seconds = extract.SECONDS + extract.SECONDS_PER_MB * size / 1e6
        answer = self._ask(self._extractor, request, seconds)
        if answer.get("text") is not None:
            yield answer["text"].encode("utf-8", "replace").decode(), address
        elif "stopped" not in answer:
            self._leave(_MALFORMED, answer.get("error", ""))

    def _ask(self, worker: Worker, request: dict[str, Any], seconds: float) -> Any:
        """The answer of a process that can be killed; `stopped`, and something is left out, when it was."""
        try:
            return worker.ask({**request, "seconds": seconds}, extract.PATIENCE * seconds)
        except _StoppedError:
            self._leave(_TOO_MUCH, f"more than {seconds:.0f} s, or too much memory")
            return {"stopped": True}

    def _whole(self, records: Iterator[bytes | None]) -> Iterator[bytes]:
        for record in records:
            if record is None:
                self._leave(_TOO_LONG, "")
            else:
                yield record

    def _decode(self, data: bytes) -> str | None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = encoding.western(data)
        if text is not None:
            self._detector = self._detector or clean.language_detector()
            if encoding.is_western(clean.identify(self._detector, text)):
                self._count("converted: windows-1252")
                return text
        self._leave("not UTF-8", "save it as UTF-8")
        return None


def _without_text(source: SourceSettings, names: Any) -> str:
    """Why a record has no text."""
    there = ", ".join(map(str, list(names)[:8]))
    return f"no text in {source.text}" + (f"; there is {there}" if there else "")


def _form(path: str) -> str:
    name = compressed.bare(path).lower()
    return next((form for suffix, form in _FORMS.items() if name.endswith(suffix)), "text")


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
