"""Continuous batching with chunked prefill, first come first served: which sequence runs how many tokens next.

A sequence is admitted once blocks for everything it may ever hold are free, so an admitted one always runs to its end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from llama2.engine.cache import BlockAllocator
from llama2.engine.runner import BLOCK

#: Sequences that run at once, unless a caller says otherwise.
MAX_SEQUENCES = 64


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of a request: 0 ≤ cached < length ≤ limit, counted in tokens."""

    id: int
    length: int  # of the prompt and the answer so far
    limit: int  # of the prompt and the longest answer
    cached: int = 0  # how many have keys and values in the cache
    blocks: list[int] = field(default_factory=list)


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """Plans steps over the sequences it was given. The caller advances `cached` and `length` after each step."""

    def __init__(self, n_blocks: int, *, max_batch_tokens: int = 512, max_sequences: int = MAX_SEQUENCES) -> None:
        """Raises ValueError unless 1 ≤ max_sequences ≤ max_batch_tokens: every running answer grows in every step."""
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(f"max_sequences={max_sequences} must be from 1 to max_batch_tokens={max_batch_tokens}")
        self.allocator = BlockAllocator(n_blocks)
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[S] = deque()
        self.running: list[S] = []

    def add(self, sequence: S) -> None:
        """Queue a new sequence. Raises ValueError when even an empty cache could not hold it."""
        if blocks_for(sequence.limit) > self.allocator.total:
            raise ValueError(f"{sequence.limit} tokens do not fit {self.allocator.total} blocks of {BLOCK}")
        self.waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a waiting or running sequence and free its blocks. Raises ValueError when it is neither."""
        (self.running if sequence.blocks else self.waiting).remove(sequence)
        self.allocator.free(sequence.blocks)
        sequence.blocks = []

    def schedule(self) -> list[tuple[S, int]]:
        """The sequences of the next step and how many tokens each runs, in order of arrival.

        A prompt runs in chunks of what room the sequences before it leave, so growing answers stand before prompts; and
        as there are at most `max_batch_tokens` sequences, each answer gets its token and the first prompt at least one.
        """
        while self.waiting and len(self.running) < self.max_sequences:
            if (need := blocks_for(self.waiting[0].limit)) > self.allocator.available:
                break
            sequence = self.waiting.popleft()
            sequence.blocks = self.allocator.allocate(need)
            self.running.append(sequence)
        plan = []
        room = self.max_batch_tokens
        for sequence in self.running:
            if count := min(room, sequence.length - sequence.cached):
                plan.append((sequence, count))
                room -= count
        return plan


def blocks_for(tokens: int) -> int:
    """Cache blocks that hold so many tokens."""
    return -(-tokens // BLOCK)
