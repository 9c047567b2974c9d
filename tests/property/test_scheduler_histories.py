"""Block allocator and scheduler over random histories."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.engine.cache import BlockAllocator
from llama2.engine.runner import BLOCK
from llama2.engine.scheduler import Scheduler, Sequence, blocks_for


@given(total=st.integers(0, 20), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60))
def test_every_block_is_held_once_or_free(total: int, moves: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(total)
    holders: list[list[int]] = []
    for take, n in moves:
        if take and n <= allocator.available:
            holders.append(allocator.allocate(n))
            assert len(holders[-1]) == n
        elif take:
            with pytest.raises(ValueError, match="available"):
                allocator.allocate(n)
        elif holders:
            allocator.free(holders.pop(n % len(holders)))
        held = [block for blocks in holders for block in blocks]
        free = allocator.allocate(allocator.available)
        assert sorted(held + free) == list(range(total))
        allocator.free(free)


@pytest.mark.parametrize("wrong", [[0, 0], [3], [0, 9], [-1]])
def test_a_block_is_freed_by_its_holder_once(wrong: list[int]) -> None:
    allocator = BlockAllocator(4)
    held = allocator.allocate(2)
    assert held == [0, 1]
    with pytest.raises(ValueError, match="not all held"):
        allocator.free(wrong)
    assert allocator.available == 2
    allocator.free(held)
    with pytest.raises(ValueError, match="not all held"):
        allocator.free(held)


@given(data=st.data())
def test_every_request_runs_to_its_end_in_order_of_arrival(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 6), "blocks")
    budget = data.draw(st.integers(1, 70), "max_batch_tokens")
    most = data.draw(st.integers(1, min(budget, 5)), "max_sequences")
    scheduler: Scheduler[Sequence] = Scheduler(total, max_batch_tokens=budget, max_sequences=most)
    unfinished: list[Sequence] = []
    admitted: list[int] = []
    moves = data.draw(st.lists(st.sampled_from(["add", "step", "step", "cancel"]), max_size=40), "moves")
    for id, move in enumerate(moves):
        if move == "add":
            limit = data.draw(st.integers(1, total * BLOCK), "limit")
            unfinished.append(Sequence(id, length=data.draw(st.integers(1, limit), "prompt"), limit=limit))
            scheduler.add(unfinished[-1])
        elif move == "cancel" and unfinished:
            scheduler.remove(unfinished.pop(data.draw(st.integers(0, len(unfinished) - 1), "which")))
        elif move == "step":
            step(scheduler, unfinished, admitted, budget)
        check_blocks(scheduler, total)
        assert len(scheduler.running) <= most
    steps = 0
    while unfinished:
        step(scheduler, unfinished, admitted, budget)
        check_blocks(scheduler, total)
        steps += 1
        assert steps <= total * BLOCK * (len(moves) + 1), "a request starves"
    assert scheduler.allocator.available == total
    assert admitted == sorted(admitted)


def step(scheduler: Scheduler[Sequence], unfinished: list[Sequence], admitted: list[int], budget: int) -> None:
    """Run a step as an engine would: what is planned becomes cached, and a sequence without known tokens gets one."""
    before = {s.id for s in scheduler.running}
    answers = {s.id for s in scheduler.running if s.cached > 0 and s.length - s.cached == 1}
    plan = scheduler.schedule()
    assert bool(plan) == bool(unfinished)
    admitted += [s.id for s in scheduler.running if s.id not in before]
    counts = {s.id: count for s, count in plan}
    assert len(counts) == len(plan)
    assert sum(counts.values()) <= budget
    assert all(counts.get(id) == 1 for id in answers), "an answer waited for a prompt"
    prefills = [s for s in scheduler.running if s.length - s.cached > 1]
    for earlier, later in itertools.pairwise(prefills):
        assert counts.get(later.id, 0) == 0 or counts[earlier.id] == earlier.length - earlier.cached
    for s, count in plan:
        assert 1 <= count <= s.length - s.cached
        s.cached += count
        if s.cached == s.length:
            s.length += 1
            if s.length >= s.limit:
                scheduler.remove(s)
                unfinished.remove(s)


def check_blocks(scheduler: Scheduler[Sequence], total: int) -> None:
    held = [block for s in scheduler.running for block in s.blocks]
    assert len(held) + scheduler.allocator.available == total
    assert len(set(held)) == len(held)
    assert all(len(s.blocks) == blocks_for(s.limit) for s in scheduler.running)
    assert not any(s.blocks for s in scheduler.waiting)
