"""Number formats of weights: names, sizes and layouts of ggml's blocks (ggml-common.h), stated once.

A row is divided into blocks of weights that share their scales. `checkpoint/quantization.py` defines what a block's
bytes mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from llama2.errors import CheckpointError, Llama2Error

if TYPE_CHECKING:
    import numpy as np

#: Formats of one number each.
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Format:
    """A number format: `block` weights are one record of `fields`, each a name and NumPy's code of its type.

    In `fields`, d and m are the scale and the minimum in float16, q the low bits of the weights and `high` the others.
    """

    name: str
    ggml_type: int  # of a tensor in GGUF
    file_type: int  # of a GGUF file that has it in most matrices; of a K format, that of the mixture M
    block: int
    fields: Mapping[str, str]

    @cached_property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(int(code[:-2].strip("<") or 1) * int(code[-1]) for code in self.fields.values())

    @cached_property
    def layout(self) -> np.dtype[np.void]:
        """A block as a record of NumPy."""
        import numpy as np

        return np.dtype(list(self.fields.items()))


#: Every supported format by name.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("F32", 0, 0, 1, {"x": "<f4"}),
        Format("F16", 1, 1, 1, {"x": "<f2"}),
        Format("BF16", 30, 32, 1, {"bits": "<u2"}),
        Format("Q8_0", 8, 7, 32, {"d": "<f2", "q": "32i1"}),
        Format("Q5_1", 7, 9, 32, {"d": "<f2", "m": "<f2", "high": "4u1", "q": "16u1"}),
        Format("Q5_0", 6, 8, 32, {"d": "<f2", "high": "4u1", "q": "16u1"}),
        Format("Q4_1", 3, 3, 32, {"d": "<f2", "m": "<f2", "q": "16u1"}),
        Format("Q4_0", 2, 2, 32, {"d": "<f2", "q": "16u1"}),
        Format("IQ4_NL", 20, 25, 32, {"d": "<f2", "q": "16u1"}),
        Format("Q6_K", 14, 18, 256, {"q": "128u1", "high": "64u1", "scales": "16i1", "d": "<f2"}),
        Format("Q5_K", 13, 17, 256, {"d": "<f2", "m": "<f2", "scales": "12u1", "high": "32u1", "q": "128u1"}),
        Format("Q4_K", 12, 15, 256, {"d": "<f2", "m": "<f2", "scales": "12u1", "q": "128u1"}),
        Format("Q3_K", 11, 12, 256, {"high": "32u1", "q": "64u1", "scales": "12u1", "d": "<f2"}),
        Format("Q2_K", 10, 10, 256, {"scales": "16u1", "q": "64u1", "d": "<f2", "m": "<f2"}),
    )
}


def nbytes(
    format: str, shape: tuple[int, ...], name: str = "the tensor", *, error: type[Llama2Error] = CheckpointError
) -> int:
    """Bytes of a tensor, exactly. Raises `error`, which names the tensor, when its rows are not whole blocks."""
    rule = FORMATS[format]
    if shape[-1] % rule.block:
        raise error(
            f"{format} needs rows of a multiple of {rule.block} weights, and {name} has {shape[-1]}; "
            "choose another format"
        )
    return prod(shape) // rule.block * rule.size
