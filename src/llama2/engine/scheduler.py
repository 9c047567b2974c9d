"""Continuous batching with chunked prefill over a paged cache: which sequence runs how many tokens next.

First come, first served. A sequence is admitted once its known tokens would fit, and holds blocks only for what has
run. When blocks run out, evictable ones go first. Then the sequence that came last is preempted: it gives its blocks
back and waits at the front of the queue. It is computed anew as far as its blocks are not found again.

So those that run came before those that wait, and nobody loses a block to a sequence that came later. The oldest of all
is therefore never preempted, and gets its tokens in every step; when it has ended, another is the oldest. That is why
every request ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from llama2.engine.cache import BlockCache
from llama2.engine.runner import BLOCK

#: Sequences that run at once, unless a caller says otherwise.
MAX_SEQUENCES = 64
#: Tokens of prompts that run in a step beside decoding sequences, unless a caller says otherwise.
MAX_PREFILL_TOKENS = 64


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of a request: 0 ≤ cached < length ≤ limit, counted in tokens.

    The caller advances `cached` and `length`, and appends to `block_hashes`, after each step. It may also go back to a
    `cached` behind the blocks that have hashes, and write there anew.
    """

    id: int
    length: int  # of the prompt and the answer so far
    limit: int  # of the prompt and the longest answer
    block_hashes: list[bytes] = field(default_factory=list)  # of its known tokens' full blocks (cache.hash_blocks)
    prefix_limit: int = 1 << 62  # how many of its first tokens may be found in blocks that were computed for others
    cached: int = 0  # how many have keys and values in the cache
    blocks: list[int] = field(default_factory=list)
    committed: int = 0  # how many of its first blocks others can find
    placed: int = 0  # how many of its first blocks have not changed since the caller set this
    prefix_hit_tokens: int = 0  # how many of `cached` were computed for others


S = TypeVar("S", bound=Sequence)


class Scheduler(Generic[S]):
    """Plans steps over the sequences it was given, each at most `max_batch_tokens` long.

    While sequences decode, at most `max_prefill_tokens` of them are prompts', so that no prompt makes answers wait for
    longer than that takes. While none does yet, a step is as long as it takes to end one prompt, if that is more. Its
    answer begins then, and those who come together do not stay together.
    """

    def __init__(
        self,
        n_blocks: int,
        *,
        max_batch_tokens: int = 512,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        """Raises ValueError unless 1 ≤ max_sequences ≤ max_batch_tokens: every running answer grows in every step."""
        if not 1 <= max_sequences <= max_batch_tokens:
            raise ValueError(f"max_sequences={max_sequences} must be from 1 to max_batch_tokens={max_batch_tokens}")
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens={max_prefill_tokens} must be at least 1")
        self.cache = BlockCache(n_blocks)
        self.max_batch_tokens = max_batch_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[S] = deque()  # in order of arrival, as those that run
        self.running: list[S] = []
        self.preemptions = 0

    def add(self, sequence: S) -> None:
        """Queue a new sequence. Raises ValueError when even an empty cache could not hold it."""
        if blocks_for(sequence.limit) > self.cache.total:
            raise ValueError(f"{sequence.limit} tokens do not fit {self.cache.total} blocks of {BLOCK}")
        self.waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a waiting or running sequence and free its blocks. Raises ValueError when it is neither."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._free(sequence)

    def schedule(self) -> list[tuple[S, int]]:
        """The sequences of the next step and how many tokens each runs, in order of arrival.

        Every answer gets its token, if there is a block for it, and prompts run in chunks of what room is left
        (`_divide`). A prompt whose next block is being computed for an earlier one waits for that. Where a sequence is
        preempted, the others share the room that it had.
        """
        preemptions = self.preemptions
        plan = self._plan()
        return plan if self.preemptions == preemptions else self.schedule()

    def _plan(self) -> list[tuple[S, int]]:
        for s in self.running:
            if s.committed < s.cached // BLOCK:
                self._commit(s)
            if s.length - s.cached > 1:
                self._match_prefix(s)
        self._admit()
        decoding: list[S] = []
        prefilling: list[S] = []
        coming: set[bytes] = set()  # hashes of the blocks that prompts have yet to compute
        for s in self.running:
            if s.length - s.cached == 1 and s.limit > s.length:
                decoding.append(s)
                continue
            done = s.cached // BLOCK
            if not (self._may_match_prefix(s) and s.block_hashes[done] in coming):
                prefilling.append(s)
            coming.update(s.block_hashes[done:])
        most = self.max_prefill_tokens if decoding else self.max_batch_tokens
        if not decoding and (unfinished := [s for s in prefilling if s.limit > s.length + 1]):
            # All but the oldest prompt have to share with that.
            ends = min((s.length - s.cached) * (1 if s is prefilling[0] else 2) for s in unfinished)
            most = min(most, max(self.max_prefill_tokens, ends))
        counts = dict.fromkeys(decoding, 1)
        counts |= _divide(min(most, self.max_batch_tokens - len(decoding)), prefilling)
        plan = []
        for s in self.running:  # which becomes shorter when its last are preempted
            if count := self._grow(s, counts.get(s, 0)):
                plan.append((s, count))
        return plan

    def reserve(self, sequence: S, count: int) -> int:
        """How many of `count` tokens after the cached ones have a place in its blocks, once it got those available."""
        if (missing := blocks_for(sequence.cached + count) - len(sequence.blocks)) > 0:
            sequence.blocks += self.cache.allocate(min(missing, self.cache.available))
        return min(count, len(sequence.blocks) * BLOCK - sequence.cached)

    def _admit(self) -> None:
        """Let those run whose known tokens fit beside the others', and leave a block for each of these to grow."""
        if not self.waiting:
            return
        promised = sum(max(0, blocks_for(s.length) - len(s.blocks)) for s in self.running)
        while self.waiting and len(self.running) < self.max_sequences:
            s = self.waiting[0]
            self._match_prefix(s)
            missing = blocks_for(s.length) - len(s.blocks)
            if promised + missing + len(self.running) > self.cache.available:
                self._free(s)
                return
            promised += missing
            self.running.append(self.waiting.popleft())

    def _grow(self, s: S, count: int) -> int:
        """Get blocks for `count` more tokens, from sequences that came later if need be; for how many there are."""
        if s.cached + count <= len(s.blocks) * BLOCK:
            return count
        while blocks_for(s.cached + count) - len(s.blocks) > self.cache.available and self.running[-1] is not s:
            last = self.running.pop()
            self._free(last)
            self.waiting.appendleft(last)
            self.preemptions += 1
        return self.reserve(s, count)

    def _free(self, s: S) -> None:
        self._commit(s)
        self.cache.release(s.blocks)
        s.blocks = []
        s.cached = s.committed = s.placed = s.prefix_hit_tokens = 0

    def _commit(self, s: S) -> None:
        """Let others find the blocks that have become full."""
        for i in range(s.committed, min(s.cached // BLOCK, len(s.block_hashes))):
            block = self.cache.commit(s.blocks[i], s.block_hashes[i])
            if block != s.blocks[i]:
                s.blocks[i] = block
                s.placed = min(s.placed, i)
            s.committed = i + 1

    def _match_prefix(self, s: S) -> None:
        """Take the next blocks of `s` from the cache, as many as are found."""
        while self._may_match_prefix(s) and (block := self.cache.find(s.block_hashes[len(s.blocks)])) is not None:
            s.blocks.append(block)
            s.cached += BLOCK
            s.prefix_hit_tokens += BLOCK
            s.committed += 1

    def _may_match_prefix(self, s: S) -> bool:
        """Whether the next block of `s` may be one of others'. Its last token runs in any case, for its logits."""
        return s.cached == len(s.blocks) * BLOCK and s.cached + BLOCK <= min(s.length - 1, s.prefix_limit)


def _divide(room: int, prompts: list[S]) -> dict[S, int]:
    """Half of the room goes to the oldest prompt, and the rest to those that end soonest.

    So a short prompt does not wait for a long one. A prompt of A tokens that came after prompts of B tokens waits for
    at most 2 (A + B) / room steps.
    """
    counts = dict.fromkeys(prompts, 0)
    if prompts:
        counts[prompts[0]] = min(prompts[0].length - prompts[0].cached, -(-room // 2))
        room -= counts[prompts[0]]
    for s in sorted(prompts, key=lambda s: s.length - s.cached):
        more = min(s.length - s.cached - counts[s], room)
        counts[s] += more
        room -= more
    return counts


def blocks_for(tokens: int) -> int:
    """Cache blocks that hold so many tokens."""
    return -(-tokens // BLOCK)
