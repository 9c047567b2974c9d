"""Who holds which block of the paged key/value cache, and what can be found again.

This is bookkeeping: the cache itself is the runner's.

Only full blocks are shared, and a full block is never written again, so no write ever needs a copy first. What that
costs: sequences that begin alike each run the tokens of their last, unfinished block themselves, fewer than BLOCK of
them. A copy would save those and nothing else, and every runner would need an operation that makes it. Continuations of
one prompt do not pay this: they are scored one after another in one sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from llama2.engine.runner import BLOCK


def hash_blocks(hashes: list[bytes], tokens: NDArray[np.int32]) -> None:
    """Append to `hashes` those of the full blocks of `tokens` (T,) that have none yet.

    A block's hash is the SHA-256 of the hash before it and its own token ids, so it names all tokens up to its
    end. Nobody can make two beginnings that share a hash.
    """
    for start in range(len(hashes) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        hashes.append(sha256((hashes[-1] if hashes else b"") + tokens[start : start + BLOCK].tobytes()).digest())


class BlockCache:
    """Blocks 0 … total − 1. Each is held by one sequence or several, or evictable, which may be found again, or free.

    Sequences hold whole beginnings and give them back as such. Then a held block never follows one that is not. The
    evictable block unused for longest never has another behind it: eviction takes ends before their beginnings.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))  # the last is handed out first
        self._holders = [0] * total
        self._blocks: dict[bytes, int] = {}  # those that were committed, by hash
        self._hashes: dict[int, bytes] = {}
        #: Committed and held by nobody, unused for longest first.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Number of blocks that nobody holds."""
        return len(self._free) + len(self._evictable)

    @property
    def evictable(self) -> int:
        """Number of blocks that nobody holds, but `find` may."""
        return len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks that nobody held, free ones first. Raises ValueError when fewer are available."""
        if not 0 <= count <= self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def find(self, hash: bytes) -> int | None:
        """Hold the block that was committed under `hash`, if it is still there."""
        block = self._blocks.get(hash)
        if block is not None:
            self._evictable.pop(block, None)
            self._holders[block] += 1
        return block

    def commit(self, block: int, hash: bytes) -> int:
        """Let others find a full block, and return the one to go on with: of two of one content, the first is kept."""
        first = self.find(hash)
        if first is None:
            self._blocks[hash], self._hashes[block] = block, hash
            return block
        self.release([block])
        return first

    def release(self, blocks: Sequence[int]) -> None:
        """Give back what one sequence held, in the order of its positions.

        Raises ValueError, and gives nothing back, when a block is not held or named twice.
        """
        if len(set(blocks)) != len(blocks) or not all(0 <= b < self.total and self._holders[b] for b in blocks):
            raise ValueError(f"blocks {list(blocks)} are not all held, or one is named twice")
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hashes:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def clear(self) -> None:
        """Forget every committed block, so that none is found again. Those that are held stay held."""
        self._free += reversed(self._evictable)  # the least recently used is handed out first
        self._blocks.clear()
        self._hashes.clear()
        self._evictable.clear()

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._blocks[self._hashes.pop(block)]
        return block
