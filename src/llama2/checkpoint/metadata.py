"""What a model file says of itself, as key and value: look-ups that name the key that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from llama2.errors import CheckpointError
from llama2.files import Repeated

T = TypeVar("T")


class Metadata(NamedTuple):
    """Typed look-ups in a file's metadata; a CheckpointError names the key. What nobody looks up is not judged."""

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value, of whichever type; None where there is none. Raises when it is there twice, and differs."""
        if isinstance(self.values, Repeated) and key in self.values.twice:
            raise CheckpointError(f"{self.path}: has {key} twice, with different values; remove one")
        return self.values.get(key)

    def find(self, key: str, kind: type[T]) -> T | None:
        value = self.get(key)
        if type(value) is int and abs(value) >= 1 << 64:
            raise CheckpointError(f"{self.path}: {key} has {len(str(abs(value)))} digits; convert the model again")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind and not (kind is dict and isinstance(value, dict)):
            wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a table"}
            expected = wanted.get(kind, "an array")
            raise CheckpointError(f"{self.path}: {key} must be {expected}; convert the model again")
        return cast("T | None", value)

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
