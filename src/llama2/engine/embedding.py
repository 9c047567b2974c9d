"""Embeddings: one vector for each input, pooled from its tokens' hidden states after the final norm.

T tokens of an input  D width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llama2.engine.request import Pooling, Request
from llama2.errors import EngineError

Floats = NDArray[np.float32]

#: How many inputs, and how many of their tokens, run together at most; a single input may have more.
PIECE_INPUTS, PIECE_TOKENS = 32, 1024


class Pool:
    """Pools the hidden states of one input as they come.

    A mean adds one token after another in float64, so its bits do not depend on how the input was cut into chunks.
    """

    def __init__(self, pooling: Pooling) -> None:
        self._mean = pooling == "mean"
        self._sum: NDArray[np.float64] = np.zeros(0)  # (D,) after the first token
        self._count = 1  # of states in the sum

    @np.errstate(over="ignore", invalid="ignore")  # `vector` refuses numbers that are not finite
    def push(self, position: int, hidden: Floats) -> None:
        """The states (n, D) of the tokens from `position` on, at least one; position 0 begins anew."""
        if not self._mean:
            self._sum = hidden[-1].astype(np.float64)
            return
        if position == 0:
            self._sum = np.zeros(hidden.shape[1])
        for row in hidden:
            self._sum += row
        self._count = position + len(hidden)

    @np.errstate(over="ignore", invalid="ignore")
    def vector(self) -> Floats:
        """The embedding (D,), not normalised. Raises EngineError when a number of it is not finite."""
        vector: Floats = (self._sum / self._count).astype(np.float32)
        if not np.isfinite(vector).all():
            raise EngineError("a hidden state is not a finite number; check the model file")
        return vector


def normalised(vector: Floats) -> Floats:
    """`vector` (D,) at length 1; zeros stay zeros."""
    length = np.sqrt(np.square(vector, dtype=np.float64).sum())
    result: Floats = (vector / (length or 1.0)).astype(np.float32)
    return result


def pieces(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """The requests in order, divided so that what comes between two pieces waits for no more than one of them."""
    start = tokens = 0
    for end, request in enumerate(requests):
        tokens += len(request.prompt)
        if end > start and (end - start == PIECE_INPUTS or tokens > PIECE_TOKENS):
            yield requests[start:end]
            start, tokens = end, len(request.prompt)
    if start < len(requests):
        yield requests[start:]
