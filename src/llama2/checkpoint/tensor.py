"""One named tensor of a model on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from llama2 import files
from llama2.errors import CheckpointError
from llama2.formats import FORMATS, nbytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor, still in its file's number format.

    `shape` is PyTorch's order, (rows, columns) or (n,). `source` is a read-only uint8 view of exactly the tensor's
    bytes in the mapped file, if they are in Meta's order. Else it is a function that copies them in that order.
    """

    name: str
    format: str  # "F32", "F16", "BF16", "Q8_0", "Q4_0", … as in formats.FORMATS
    shape: tuple[int, ...]
    source: NDArray[np.uint8] | Callable[[], NDArray[np.uint8]]
    mapped: tuple[files.MappedFile, ...] = field(default=(), repr=False, compare=False)  # what `data` is read from

    @property
    def data(self) -> NDArray[np.uint8]:
        """The tensor's bytes in Meta's order. Nothing is read before this; a copy is made each time, and not cached."""
        return self.source() if callable(self.source) else self.source

    @property
    def nbytes(self) -> int:
        """How many bytes `data` has, without touching it."""
        return nbytes(self.format, self.shape)

    def dequantize(self) -> NDArray[np.float32]:
        """The tensor's values in float32, in `shape`."""
        from llama2.checkpoint import quantization

        if self.format not in FORMATS:
            raise CheckpointError(
                f"tensor {files.quote(self.name)} has format {files.quote(self.format)}, not a float's"
            )
        return quantization.dequantize(self.data, self.format, self.shape)

    def in_float32(self) -> Tensor:
        """This tensor in F32, which is made whenever it is touched."""
        if self.format == "F32":
            return self
        return replace(self, format="F32", source=lambda: self.dequantize().view(np.uint8).reshape(-1))

    def in_format(self, format: str) -> Tensor:
        """This tensor in one of formats.FORMATS, without importance; it is made whenever it is touched."""
        from llama2.checkpoint import quantization

        if format in ("F32", self.format):
            return self.in_float32() if format == "F32" else self
        return replace(self, format=format, source=lambda: quantization.quantize(self.dequantize(), format))
