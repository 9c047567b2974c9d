"""A file of a public set: its lines and objects, each with its place for messages."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import EvaluationError

Row = dict[str, Any]
Splits = dict[str, list[Row]]


@dataclass(frozen=True, slots=True)
class SetFile:
    """A file of a set, as it is on disk."""

    path: Path
    data: bytes

    @property
    def text(self) -> str:
        """The content, decompressed by the name's end. Raises EvaluationError for what is not UTF-8."""
        opened = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(self.path.suffix, bytes)
        try:
            return opened(self.data).decode("utf-8-sig")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{self.path}: cannot be read ({error}); download it again") from None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Lines that are not empty, each with its place for messages."""
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.strip():
                yield f"{self.path}:{number}", line.removesuffix("\r")

    def objects(self, **fields: type | tuple[type, ...]) -> Iterator[tuple[str, Row]]:
        """JSON objects, one a line, each with its place. Raises EvaluationError as `checked` does."""
        for where, line in self.lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{where}: is not JSON ({error}); download the set again") from None
            yield where, checked(where, row, **fields)

    def table(self, *names: str, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
        """Rows of a table whose first line has the names of its columns, with those that are named.

        Raises EvaluationError for a column that is missing, and for a row of another length.
        """
        lines = csv.reader(io.StringIO(self.text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if lacking := [name for name in names if name not in header]:
                raise EvaluationError(f"{self.path}: the column {lacking[0]!r} is missing; compare it with the source")
            for cells in lines:
                where = f"{self.path}:{lines.line_num}"
                if len(cells) != len(header):
                    raise EvaluationError(f"{where}: has {len(cells)} cells for {len(header)} columns; check the file")
                row = dict(zip(header, cells, strict=True))
                yield where, {name: row[name] for name in names}
        except csv.Error as error:
            raise EvaluationError(f"{self.path}:{lines.line_num}: is not CSV ({error}); check the file") from None

    def _value(self) -> Any:
        """The one JSON value of the file. Raises EvaluationError where it is not JSON."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{self.path}: is not JSON ({error}); download the set again") from None

    def nested(self) -> dict[str, dict[str, Any]]:
        """The file's one JSON object, whose values are objects. Raises EvaluationError where it is another."""
        found = self._value()
        if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
            raise EvaluationError(f"{self.path}: is not an object of objects; compare it with the task's source")
        return found

    def elements(self, *names: str, **fields: type | tuple[type, ...]) -> Iterator[tuple[str, Row]]:
        """Objects of the list under `names` in the one JSON value of the file. Raises EvaluationError as `objects`."""
        found = self._value()
        for name in names:
            found = checked(str(self.path), found, **{name: list})[name]
        if not isinstance(found, list):
            raise EvaluationError(f"{self.path}: is not a list; compare it with the task's source")
        for number, row in enumerate(found):
            where = f"{self.path}: {'.'.join(names)}[{number}]"
            yield where, checked(where, row, **fields)


def checked(where: str, row: Any, **fields: type | tuple[type, ...]) -> Row:
    """`row`, an object with these fields. Raises EvaluationError where one is missing or of another type."""
    if not isinstance(row, dict):
        raise EvaluationError(f"{where}: is not an object; download the set again")
    for name, kind in fields.items():
        if name not in row:
            raise EvaluationError(f"{where}: the field {name!r} is missing; compare it with the task's source")
        if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is int):
            raise EvaluationError(
                f"{where}: the field {name!r} has a value of another type; compare it with the source"
            )
    return row


def text_list(where: str, name: str, values: list[Any]) -> list[str]:
    """A list of texts that is not empty."""
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise EvaluationError(f"{where}: the field {name!r} is not a list of texts; download the set again")
    return values
