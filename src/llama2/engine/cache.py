"""Who holds which block of the paged key/value cache. Bookkeeping alone: the cache itself is the runner's."""

from __future__ import annotations

from collections.abc import Sequence


class BlockAllocator:
    """Hands out the ids 0 … total − 1, each to one holder at a time; the block freed last is handed out first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def available(self) -> int:
        """Number of blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. Raises ValueError when fewer are available."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} available")
        blocks = [self._free.pop() for _ in range(count)]
        self._held.update(blocks)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give `blocks` back. Raises ValueError, and frees nothing, when one of them is not held or named twice."""
        returned = set(blocks)
        if len(returned) != len(blocks) or not returned <= self._held:
            raise ValueError(f"blocks {list(blocks)} are not all held, or one is named twice")
        self._held -= returned
        self._free.extend(blocks)
