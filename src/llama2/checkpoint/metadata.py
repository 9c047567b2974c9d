"""What a model file says of itself, as key and value: strict JSON, and look-ups that name the key that is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint.mapped import damaged, quote
from llama2.errors import CheckpointError

T = TypeVar("T")


def parse(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises CheckpointError for anything else, among it NaN, whole numbers of more
    than 20 digits, and a key that stands twice.

    An object can need many times the memory of its text, which the caller therefore keeps short.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise damaged(path, f"{what} has {quote(twice)} twice")
        return values

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{quote(name)} is no number of a model")

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= 20 else refuse(digits)

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_int=whole)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{what} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise damaged(path, f"{what} is not a JSON object")
    return values


@dataclass(frozen=True, slots=True)
class Metadata:
    """Typed look-ups in a file's metadata; a CheckpointError names the key."""

    path: Path
    values: Mapping[str, Any]

    def find(self, key: str, kind: type[T]) -> T | None:
        value = self.values.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a table"}
            expected = wanted.get(kind, "an array")
            raise CheckpointError(f"{self.path}: {key} must be {expected}; convert the model again")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        value = self.find(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: lacks {key}; convert the model again")
        return value

    def numbers(self, key: str, dtype: str) -> NDArray[Any]:
        values = self.need(key, np.ndarray)
        if values.dtype != dtype:
            raise CheckpointError(
                f"{self.path}: {key} holds {values.dtype}, must hold {dtype}; convert the model again"
            )
        return values
