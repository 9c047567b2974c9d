"""The seam between the engine and the arithmetic (native, NumPy, torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llama2.config import ModelConfig
from llama2.errors import EngineError

#: Tokens in one block of the key/value cache. Attention's tiles are at absolute positions of this size. So the same
#: sums are made in the same order whatever else is in the batch (architecture, decision 1).
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of one step, from any number of sequences, each at its own position.

    Tokens of one sequence are adjacent, in increasing, gapless positions; what lies before the first of them is in the
    cache already. N tokens, S sequences, M rows whose logits are wanted.
    """

    tokens: NDArray[np.int32]  # (N,)
    positions: NDArray[np.int32]  # (N,) 0 is the sequence's first token
    sequences: NDArray[np.int32]  # (N,) row of `blocks`, non-decreasing
    blocks: NDArray[np.int32]  # (S, W) ids of the cache blocks that hold a sequence's positions, −1 past its end
    outputs: NDArray[np.int32]  # (M,) indices into tokens


class Runner(Protocol):
    """Runs the transformer over a batch and keeps the key/value cache."""

    config: ModelConfig
    n_blocks: int
    arithmetic: str  # what the bits of logits depend on, beside weights and tokens

    def forward(self, batch: Batch, hidden: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Write keys and values of every token into its block, and return the logits of `outputs`: (M, V) float32.

        `hidden` (N, D), if given, is filled with every token's state after the final norm, which the output head reads.
        A token reads no position after its own, and a position that comes again is written anew. So tokens that turn
        out wrong leave no trace.
        """
        ...


@runtime_checkable
class LiveRunner(Runner, Protocol):
    """A Runner over weights that somebody else changes in place between steps, such as a training step."""

    def weights_changed(self) -> None:
        """Renew what was derived from the weights. Called between steps, after every change."""
        ...


def cache_too_large(n_blocks: int) -> EngineError:
    """What a runner raises when there is no memory for so many blocks."""
    return EngineError(
        f"a key/value cache of {n_blocks * BLOCK} tokens does not fit into memory; choose a shorter context"
    )
