"""Text from pages and Python sources, records from WARC and Parquet: a program that its parent can kill.

Libraries read these. Their time grows with the square of how deep a page is nested, the compiler's memory with how deep
an expression is. A value of Parquet is unpacked before its size can be known, and 10 KB can hold many gigabytes. What
nobody foresaw may end the process. Here all of that has a limit. The parent is text/worker.py.
"""

from __future__ import annotations

import ast
import json
import signal
import warnings
from collections.abc import Iterator
from typing import Any, Literal

#: Address space of the process in bytes, a third of which it needs to start.
MEMORY = 1280 << 20
#: Seconds of processor time for a request: for any, and for each MB of a page or source. What takes longer is left out.
SECONDS, SECONDS_PER_MB = 2.0, 1.0
#: Seconds for the next records of an archive or a table.
SECONDS_OF_RECORDS = 20.0
#: The parent waits so many times as long, since a machine may be busy and a corpus must not depend on that.
PATIENCE = 10

_BATCH, _ROWS = 64, 16  # values of Parquet that are unpacked at once, and whole rows
_SENT = 1 << 20  # characters of an answer with records, at most one record more

#: Why a record does not have a text, its text or page, and its address.
Record = tuple[str | None, str, str | None]
#: What a file of many documents is: WARC, one column of Parquet, or whole rows of Parquet as JSON.
Form = Literal["warc", "parquet", "rows"]


def page(data: bytes, charset: str) -> str:
    """A page's main text, or where none is found, all of its text; `charset` is empty where it is not known."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    html = bytes_to_str(data, charset or str(detect_encoding(data)))
    text: str = extract_plain_text(html, main_content=True)
    return text if text.strip() else extract_plain_text(html)


def docstrings(source: str) -> str | None:
    """All docstrings of a Python source, an empty line between them; None where it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(docstring for docstring in found if docstring)


class Records:
    """What is in a file of many documents, some at a time."""

    columns: list[str]  # of a table

    def __init__(self, place: str, form: Form, names: list[str], limit: int) -> None:
        """Open the file at a path or address. Of `names`, the first that is a column of Parquet has the text."""
        import fsspec

        remote = "://" in place
        self._file = fsspec.open(place, "rb", compression=None).open() if remote else open(place, "rb")  # noqa: SIM115
        self._limit = limit
        self.columns = []
        self._records = self._archive() if form == "warc" else self._table(names) if form == "parquet" else self._rows()

    def next(self) -> list[Any]:
        """The next records, none at the end."""
        some, sent = [], 0
        for record in self._records:
            some.append(record)
            sent += len(record[1])
            if sent > _SENT or len(some) == 10 * _BATCH:
                break
        return some

    def _open_table(self) -> Any:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self._file, pre_buffer=False)

    def _rows(self) -> Iterator[Record]:
        """Each row as a JSON object."""
        for batch in self._open_table().iter_batches(_ROWS, use_threads=False):
            for row in batch.to_pylist():
                text = json.dumps(without_nulls(row), default=str)
                yield (None, text, None) if len(text) <= self._limit else ("too long", "", None)

    def _table(self, names: list[str]) -> Iterator[Record]:
        table = self._open_table()
        there = table.schema_arrow.names
        self.columns = there[:8]
        name = next((name for name in names if name in there), None)
        return self._texts(table, name, [each for each in (name, "url") if each and each in there])

    def _texts(self, table: Any, name: str | None, columns: list[str]) -> Iterator[Record]:
        from pyarrow import compute, types

        for batch in table.iter_batches(_BATCH, columns=columns, use_threads=False):
            none: Any = [None] * len(batch)
            texts, addresses = (batch.column(each) if each in columns else none for each in (name, "url"))
            if name and types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            text = name and (types.is_string(texts.type) or types.is_large_string(texts.type))
            sizes = compute.binary_length(texts).to_pylist() if text else none
            for value, address, size in zip(texts, addresses, sizes, strict=True):
                if size is None:
                    yield "malformed", "", None
                elif size > self._limit:
                    yield "too long", "", None
                else:
                    where = address and address.as_py()
                    yield None, value.as_py(), where if isinstance(where, str) else None

    def _archive(self) -> Iterator[Record]:
        """Of a WARC: text of conversions, and pages of responses, whose bytes are characters; `page CHARSET` if so."""
        from fastwarc.warc import ArchiveIterator, WarcRecordType

        kinds = WarcRecordType.response | WarcRecordType.conversion
        for record in ArchiveIterator(self._file, record_types=kinds):
            is_page = record.record_type == WarcRecordType.response
            if is_page and "html" not in (record.http_content_type or "text/html"):
                yield "no page", "", None
                continue
            data = record.reader.read(self._limit + 1)
            if len(data) > self._limit:
                yield "too long", "", None
                continue
            kind = f"page {record.http_charset or ''}" if is_page else "text"
            yield kind, data.decode("latin-1"), record.headers.get("WARC-Target-URI")


def without_nulls(value: Any) -> Any:
    """A value of Parquet, whose structures have every field of any row, without those that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


class Extract:
    """Answers requests, one file of records at a time."""

    def __init__(self) -> None:
        self._records: Any = None

    def answer(self, request: dict[str, Any]) -> Any:
        """The answer to a request, or `error`, why the file cannot be read. The system ends what takes too long."""
        timer: Any = getattr(signal, "setitimer", lambda which, seconds: None)
        timer(getattr(signal, "ITIMER_PROF", 0), request.pop("seconds"))
        try:
            if "page" in request:
                return {"text": page(request["page"].encode("latin-1"), request["charset"])}
            if "source" in request:
                return {"text": docstrings(request["source"])}
            if "place" in request:
                self._records = Records(**request)
                return {"columns": self._records.columns}
            return {"records": self._records.next()}
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever a library makes of a stranger's bytes, panics of Rust among it
            return {"error": " ".join(str(error).split())[:200] or type(error).__name__}
        finally:
            timer(getattr(signal, "ITIMER_PROF", 0), 0)


if __name__ == "__main__":
    import fastwarc.warc  # noqa: F401  # these are imported before the clock runs
    import pyarrow.compute
    import pyarrow.parquet
    from resiliparse.extract import html2text  # noqa: F401

    from llama2.text.sandbox import serve

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    serve(Extract().answer, MEMORY, seconds=PATIENCE * 30)
