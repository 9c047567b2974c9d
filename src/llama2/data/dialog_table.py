"""Rows of a Parquet file as JSON: a program that its parent can kill (text/worker.py).

A value of Parquet is unpacked before anybody can ask for its size, and a file of 10 KB can hold one of many gigabytes.
So the library that unpacks it runs in an address space of its own.
"""

from __future__ import annotations

import json
from typing import Any

#: Address space of the process in bytes, a third of which it needs to start.
MEMORY = 1280 << 20
#: Seconds for the next rows.
SECONDS = 5.0

_BATCH = 16  # rows that are unpacked at once
_SENT = 1 << 20  # characters of an answer, at most one row more


class Table:
    """Answers requests about one file at a time."""

    def __init__(self) -> None:
        self._rows: Any = iter(())

    def answer(self, request: dict[str, Any]) -> Any:
        """`rows` as JSON texts, of a file at a `place`, or the next ones; none at its end. Else `error`, the reason.

        A row of more than `limit` characters is null.
        """
        try:
            if "place" in request:
                self._rows = rows(**request)
            some, sent = [], 0
            for row in self._rows:
                some.append(row)
                sent += len(row or "")
                if sent > _SENT or len(some) == 10 * _BATCH:
                    break
            return {"rows": some}
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # whatever a library makes of a stranger's bytes
            return {"error": " ".join(str(error).split())[:200] or type(error).__name__}


def rows(place: str, limit: int) -> Any:
    """Each row of a file."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(place, pre_buffer=False, buffer_size=1 << 20)
    for batch in table.iter_batches(_BATCH, use_threads=False):
        for row in batch.to_pylist():
            text = json.dumps(without_nulls(row), default=str)
            yield text if len(text) <= limit else None


def without_nulls(value: Any) -> Any:
    """Parquet's structures have every field of any row, null where this one has none."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


if __name__ == "__main__":
    import pyarrow.parquet  # before the clock runs

    from llama2.text.sandbox import serve

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    serve(Table().answer, MEMORY)
