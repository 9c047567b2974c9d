"""The scheduler's decisions, step by step, worked by hand."""

import pytest

from llama2.engine.runner import BLOCK
from llama2.engine.scheduler import Scheduler, Sequence, blocks_for

Plan = list[tuple[int, int]]


def step(scheduler: Scheduler[Sequence]) -> Plan:
    """(id, tokens) of the next step; afterwards each sequence whose tokens all ran has one more."""
    plan = scheduler.schedule()
    for s, count in plan:
        s.cached += count
        s.length += s.cached == s.length
    return [(s.id, count) for s, count in plan]


def test_answers_run_before_prompts_and_prompts_in_chunks_as_they_came() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_batch_tokens=8, max_sequences=4)
    for id, prompt in enumerate([3, 12, 6]):
        scheduler.add(Sequence(id, length=prompt, limit=prompt + 9))
    assert step(scheduler) == [(0, 3), (1, 5)]
    assert step(scheduler) == [(0, 1), (1, 7)]  # 12 = 5 + 7
    assert step(scheduler) == [(0, 1), (1, 1), (2, 6)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 1)]


def test_a_request_waits_until_its_whole_need_is_free_and_those_behind_it_wait_too() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(4, max_batch_tokens=64, max_sequences=4)
    first, second, third = (Sequence(i, length=2, limit=n * BLOCK) for i, n in enumerate([3, 2, 1]))
    for s in (first, second, third):
        scheduler.add(s)
    assert step(scheduler) == [(0, 2)]
    assert (scheduler.allocator.available, list(scheduler.waiting)) == (1, [second, third])
    scheduler.remove(first)
    assert scheduler.allocator.available == 4
    assert step(scheduler) == [(1, 2), (2, 2)]
    scheduler.remove(second)
    scheduler.remove(third)
    assert (scheduler.allocator.available, scheduler.schedule()) == (4, [])


def test_a_waiting_request_can_be_removed_and_an_unknown_one_not() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(1, max_batch_tokens=4, max_sequences=1)
    a, b = Sequence(0, length=1, limit=2), Sequence(1, length=1, limit=2)
    scheduler.add(a)
    scheduler.add(b)
    assert step(scheduler) == [(0, 1)]
    scheduler.remove(b)
    with pytest.raises(ValueError, match="not in"):
        scheduler.remove(b)
    assert step(scheduler) == [(0, 1)]


def test_limits() -> None:
    assert [blocks_for(n) for n in (1, BLOCK, BLOCK + 1, 10 * BLOCK)] == [1, 1, 2, 10]
    with pytest.raises(ValueError, match="do not fit 2 blocks"):
        Scheduler(2).add(Sequence(0, length=1, limit=2 * BLOCK + 1))
    for sequences, tokens in [(0, 4), (5, 4)]:
        with pytest.raises(ValueError, match="max_sequences"):
            Scheduler(2, max_batch_tokens=tokens, max_sequences=sequences)
