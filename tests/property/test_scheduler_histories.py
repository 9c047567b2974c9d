"""Block cache and scheduler over random histories, beside a memory that remembers what was written where."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama2.engine.cache import BlockCache, hash_blocks
from llama2.engine.runner import BLOCK
from llama2.engine.scheduler import Scheduler, Sequence, blocks_for


@given(total=st.integers(0, 20), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60))
def test_every_block_is_held_once_or_free(total: int, moves: list[tuple[bool, int]]) -> None:
    cache = BlockCache(total)
    holders: list[list[int]] = []
    for take, n in moves:
        if take and n <= cache.available:
            holders.append(cache.allocate(n))
            assert len(holders[-1]) == n
        elif take:
            with pytest.raises(ValueError, match="available"):
                cache.allocate(n)
        elif holders:
            cache.release(holders.pop(n % len(holders)))
        held = [block for blocks in holders for block in blocks]
        free = cache.allocate(cache.available)
        assert sorted(held + free) == list(range(total))
        cache.release(free)


@pytest.mark.parametrize("wrong", [[0, 0], [3], [0, 9], [-1]])
def test_a_block_is_released_by_its_holder_once(wrong: list[int]) -> None:
    cache = BlockCache(4)
    held = cache.allocate(2)
    assert held == [0, 1]
    with pytest.raises(ValueError, match="not all held"):
        cache.release(wrong)
    assert cache.available == 2
    cache.release(held)
    with pytest.raises(ValueError, match="not all held"):
        cache.release(held)


@dataclass(slots=True, eq=False, kw_only=True)
class Tokens(Sequence):
    tokens: list[int]
    prompt: int = 0  # how many tokens it goes back to
    back: tuple[int, ...] = ()  # how many tokens follow the prompt, each time when it goes back to its end
    most: int = 0  # the longest limit


class Histories(RuleBasedStateMachine):
    """Requests come, are cancelled and fail, while the scheduler runs them in a cache that is too small for all.

    `memory` holds for each slot of the cache the whole history of the token whose keys and values it has: one number
    for each history. So whatever a token reads must be its own history, from its beginning.
    """

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.total = data.draw(st.integers(1, 10), "blocks")
        self.budget = data.draw(st.integers(1, 90), "max_batch_tokens")
        self.prefill = data.draw(st.integers(1, 90), "max_prefill_tokens")
        self.most = data.draw(st.integers(1, min(self.budget, 6)), "max_sequences")
        self.scheduler: Scheduler[Tokens] = Scheduler(
            self.total,
            max_batch_tokens=self.budget,
            max_prefill_tokens=self.prefill,
            max_sequences=self.most,
        )
        self.memory = [[-1] * BLOCK for _ in range(self.total)]
        self.histories: dict[tuple[int, int], int] = {}
        self.content: dict[bytes, tuple[int, bytes | None]] = {}  # key → history at the block's end, and key before
        self.unfinished: list[Tokens] = []

    def follow(self, tokens: list[int]) -> list[int]:
        """The number of each history that ends with one of `tokens`."""
        numbers, last = [], -1
        for token in tokens:
            last = self.histories.setdefault((last, token), len(self.histories))
            numbers.append(last)
        return numbers

    def extend_keys(self, s: Tokens) -> None:
        hash_blocks(s.block_hashes, np.array(s.tokens, np.int32))
        numbers = self.follow(s.tokens)
        for i, key in enumerate(s.block_hashes):
            known = (numbers[(i + 1) * BLOCK - 1], s.block_hashes[i - 1] if i else None)
            assert self.content.setdefault(key, known) == known

    @rule(data=st.data(), prefix_limit=st.sampled_from([1 << 62] * 3 + [0, 31, 32, 100]), copies=st.integers(1, 3))
    def add(self, data: st.DataObject, prefix_limit: int, copies: int) -> None:
        """Some requests with one prompt: the beginning of one of two texts, and some tokens of its own."""
        room = self.total * BLOCK
        text = data.draw(st.sampled_from([[0] * room, [1] * room]), "text")[: data.draw(st.integers(0, room), "begin")]
        prompt = (text + data.draw(st.lists(st.integers(0, 2), min_size=not text, max_size=40), "own"))[:room]
        limit = data.draw(st.integers(len(prompt), room), "limit")
        for _ in range(copies):
            s = Tokens(0, length=len(prompt), limit=limit, prefix_limit=prefix_limit, tokens=list(prompt), most=limit)
            self.extend_keys(s)
            self.scheduler.add(s)
            self.unfinished.append(s)

    @rule(data=st.data(), length=st.integers(1, 70))
    def add_with_continuations(self, data: st.DataObject, length: int) -> None:
        """A prompt whose end several continuations follow, one after another in the same blocks."""
        length = min(length, self.total * BLOCK - 1)
        back = data.draw(st.lists(st.integers(1, min(70, self.total * BLOCK - length)), max_size=3), "continuations")
        s = Tokens(0, length, length, prefix_limit=length - 1, tokens=[0] * length, prompt=length, back=tuple(back))
        s.most = length + max(back, default=0)
        self.extend_keys(s)
        self.scheduler.add(s)
        self.unfinished.append(s)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(self.unfinished[data.draw(st.integers(0, len(self.unfinished) - 1), "which")])

    def end(self, s: Tokens) -> None:
        self.scheduler.remove(s)
        self.unfinished.remove(s)
        assert not s.blocks

    @rule(data=st.data(), steps=st.integers(1, 40))
    def run(self, data: st.DataObject, steps: int) -> None:
        fails = data.draw(st.sampled_from([0, 0, 0, 0, 1]), "a forward pass fails")
        draft = data.draw(st.sampled_from([0, 0, 1, 5, 40]), "drafts")
        for _ in range(steps):
            self.step(draft)
        if fails:
            for s, _ in self.scheduler.schedule():
                self.end(s)

    def step(self, draft: int = 0) -> None:
        """Run a step as an engine would: what is planned is cached, and a sequence without further tokens gets one."""
        plan = self.scheduler.schedule()
        assert self.scheduler.schedule() == plan
        self.check_plan(plan)
        room = self.budget - sum(count for _, count in plan)
        for s, count in plan:
            last = s.cached + count == s.length
            drafts = min(room, s.limit - s.length - 1, draft) if last else 0
            end = s.cached + self.scheduler.reserve(s, count + max(0, drafts))
            assert end >= s.cached + count
            room -= end - s.cached - count
            numbers = self.follow(s.tokens) + [-2] * (end - s.length)  # of drafts, all wrong
            for at in range(s.cached, end):
                block = s.blocks[at // BLOCK]
                assert sum(block in other.blocks for other in self.scheduler.running) == 1, "written into by two"
                assert at // BLOCK >= s.committed
                self.memory[block][at % BLOCK] = numbers[at]
            read = [self.memory[block] for block in s.blocks[: blocks_for(s.cached + count)]]
            assert list(itertools.chain(*read))[: s.cached + count] == numbers[: s.cached + count]
        for s, count in plan:
            s.cached += count
            if s.cached == s.length == s.limit and s.back:
                more, *rest = s.back
                s.tokens[s.prompt :], s.back = [3 + len(rest)] * more, tuple(rest)
                s.length = s.limit = s.prompt + more
                s.cached = s.prompt
            elif s.cached == s.length == s.limit:
                self.end(s)
            elif s.cached == s.length:
                s.tokens.append(self.follow(s.tokens)[-1] % 3)
                s.length += 1
                self.extend_keys(s)

    def check_plan(self, plan: list[tuple[Tokens, int]]) -> None:
        counts = dict(plan)
        assert bool(plan) == bool(self.unfinished)
        assert len(counts) == len(plan)
        assert all(1 <= count <= s.length - s.cached for s, count in plan)
        assert sum(counts.values()) <= self.budget
        if self.unfinished:
            assert plan[0][0] is self.unfinished[0], "the oldest does not advance"
        answers = [s for s in self.scheduler.running if s.length - s.cached == 1 and s.limit > s.length]
        assert all(s in counts for s in answers[:-1]), "an answer waited for something else than a block"
        if answers:
            assert sum(count for s, count in plan if s not in answers) <= self.prefill
        for s in counts:  # what another computes already is not begun
            assert s.prefix_hit_tokens <= s.prefix_limit
            end = s.cached + BLOCK
            shared = s.cached % BLOCK == 0 and end < s.length and end <= s.prefix_limit
            key = s.block_hashes[s.cached // BLOCK] if shared else None
            for earlier in self.scheduler.running[: self.scheduler.running.index(s)]:
                ahead = earlier.length - earlier.cached > 1 and earlier.cached // BLOCK <= s.cached // BLOCK
                assert not (shared and ahead and key in earlier.block_hashes)

    @invariant()
    def everybody_is_in_order_of_arrival(self) -> None:
        if hasattr(self, "scheduler"):
            everybody = [*self.scheduler.running, *self.scheduler.waiting]
            assert everybody == self.unfinished
            assert len(self.scheduler.running) <= self.most
            assert not any(s.blocks or s.cached for s in self.scheduler.waiting)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        cache = self.scheduler.cache
        held = Counter(block for s in self.scheduler.running for block in s.blocks)
        assert [held[block] for block in range(self.total)] == cache._holders
        assert sorted([*held, *cache._evictable, *cache._free]) == list(range(self.total))
        assert cache.available == self.total - len(held)
        for s in self.scheduler.running:
            assert blocks_for(s.cached) <= len(s.blocks) <= blocks_for(s.most)
            assert len(set(s.blocks)) == len(s.blocks)

    @invariant()
    def what_can_be_found_is_what_it_says(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        cache = self.scheduler.cache
        assert {block: key for key, block in cache._blocks.items()} == cache._hashes
        assert set(cache._evictable) <= set(cache._hashes)
        for key, block in cache._blocks.items():
            history, before = self.content[key]
            assert self.memory[block][-1] == history
            assert before is None or before in cache._blocks, "the end of a beginning outlived it"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        most = sum(s.limit + sum(s.back) for s in self.unfinished)  # as the oldest gets a token in every step
        for _ in range(most):
            if self.unfinished:
                self.step()
        assert not self.unfinished, "a request starves"
        assert self.scheduler.cache.available == self.total
        self.blocks_are_accounted_for()
        self.what_can_be_found_is_what_it_says()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
