"""The scheduler's decisions, step by step, worked by hand."""

import numpy as np
import pytest

from llama2.engine.cache import BlockCache, hash_blocks
from llama2.engine.runner import BLOCK
from llama2.engine.scheduler import Scheduler, Sequence, blocks_for

Plan = list[tuple[int, int]]


def sequence(id: int, prompt: list[int], answer: int = 9, *, prefix_limit: int = 1 << 62) -> Sequence:
    s = Sequence(id, length=len(prompt), limit=len(prompt) + answer, prefix_limit=prefix_limit)
    hash_blocks(s.block_hashes, np.array(prompt, np.int32))
    return s


def distinct(id: int, length: int, answer: int = 9) -> Sequence:
    """A prompt that shares nothing with another."""
    return sequence(id, [id] * length, answer)


def step(scheduler: Scheduler[Sequence]) -> Plan:
    """(id, tokens) of the next step; afterwards each sequence whose tokens all ran has one more."""
    plan = scheduler.schedule()
    for s, count in plan:
        s.cached += count
        if s.cached == s.length:
            s.length += 1
            if len(s.block_hashes) < s.cached // BLOCK:
                s.block_hashes.append(bytes([s.id, s.cached // BLOCK]))
    return [(s.id, count) for s, count in plan]


def test_answers_run_before_prompts() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_batch_tokens=8, max_sequences=4)
    for s in (distinct(0, 3), distinct(1, 12), distinct(2, 19)):
        scheduler.add(s)
    assert step(scheduler) == [(0, 3), (1, 5)]  # half of 8 are 4, of which the first needs 3
    assert step(scheduler) == [(0, 1), (1, 7)]  # 12 = 5 + 7
    assert step(scheduler) == [(0, 1), (1, 1), (2, 6)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 6)]


def test_while_answers_grow_prompts_have_a_limit() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_batch_tokens=64, max_prefill_tokens=10)
    scheduler.add(distinct(0, 70))
    scheduler.add(distinct(1, 30))
    assert step(scheduler) == [(0, 30), (1, 30)]  # as many as it takes to end one of them
    assert step(scheduler) == [(0, 10), (1, 1)]
    assert step(scheduler) == [(0, 10), (1, 1)]
    scheduler.remove(scheduler.running[1])
    assert step(scheduler) == [(0, 20)]


def test_prompts_that_come_together_begin_to_answer_one_after_another() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_prefill_tokens=10)
    for id in range(3):
        scheduler.add(distinct(id, 40))
    assert step(scheduler) == [(0, 40)]
    assert step(scheduler) == [(0, 1), (1, 10)]
    scheduler.remove(scheduler.running[0])
    assert step(scheduler) == [(1, 30)]
    scheduler = Scheduler(100, max_prefill_tokens=10)
    for id in range(3):  # of which nothing but the next token is asked
        scheduler.add(distinct(id, 40, 1))
    assert step(scheduler) == [(0, 40), (1, 40), (2, 40)]


def test_half_of_the_room_is_the_oldest_prompts_and_the_rest_goes_to_those_that_end_soonest() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_batch_tokens=20, max_sequences=8)
    for s in (distinct(0, 60), distinct(1, 50), distinct(2, 7)):
        scheduler.add(s)
    assert step(scheduler) == [(0, 10), (1, 3), (2, 7)]
    assert step(scheduler) == [(0, 10), (1, 9), (2, 1)]  # 47 left of 1, and 50 of 0
    scheduler.add(distinct(3, 5))
    assert step(scheduler) == [(0, 10), (1, 4), (2, 1), (3, 5)]
    assert step(scheduler) == [(0, 18), (2, 1), (3, 1)]  # 30 left of 0, and 34 of 1


def test_a_prompt_that_begins_as_another_waits_for_it_and_runs_what_is_its_own() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_batch_tokens=50, max_sequences=8)
    first, second = [sequence(id, [0] * 100) for id in (0, 1)]
    other = sequence(2, [0] * 40 + [2] * 30)
    for s in (first, second, other):
        scheduler.add(s)
    assert step(scheduler) == [(0, 50)]
    assert step(scheduler) == [(0, 25), (2, 25)]  # 2 found a block; the second one is its own
    assert step(scheduler) == [(0, 25), (2, 13)]
    assert step(scheduler) == [(0, 1), (1, 4), (2, 1)]
    assert second.blocks[:3] == first.blocks[:3]
    assert (second.prefix_hit_tokens, other.prefix_hit_tokens, first.prefix_hit_tokens) == (96, 32, 0)
    assert other.blocks[0] == first.blocks[0]
    assert other.blocks[1] != first.blocks[1]


def test_a_prompt_goes_on_by_itself_when_the_one_it_waited_for_is_cancelled() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_batch_tokens=40, max_sequences=8)
    first, second = [sequence(id, [0] * 100) for id in (0, 1)]
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == [(0, 40)]
    scheduler.remove(first)
    assert step(scheduler) == [(1, 40)]
    assert second.prefix_hit_tokens == 32


def test_what_a_cancelled_or_ended_sequence_computed_is_found_again_but_the_last_token_runs() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100, max_prefill_tokens=100)
    scheduler.add(first := sequence(0, [0] * 64))
    assert step(scheduler) == [(0, 64)]
    scheduler.remove(first)
    assert (scheduler.cache.available, scheduler.cache.evictable) == (100, 2)
    scheduler.add(sequence(1, [0] * 64))
    assert step(scheduler) == [(1, 32)]  # its second block would leave nothing that gives logits
    scheduler.add(sequence(2, [0] * 65))
    assert step(scheduler) == [(1, 1), (2, 1)]
    scheduler.add(sequence(3, [0] * 65, prefix_limit=0))
    assert step(scheduler) == [(1, 1), (2, 1), (3, 65)]
    scheduler.schedule()
    assert scheduler.running[1].blocks[:2] == scheduler.running[2].blocks[:2]  # of two alike, one is kept


def test_an_answer_is_found_again_as_part_of_the_next_prompt() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(100)
    scheduler.add(first := sequence(0, [0] * 30 + [5, 5]))
    first.length = 30  # the rest is the answer
    for _ in range(4):
        step(scheduler)
    assert (first.length, first.cached) == (34, 33)
    scheduler.remove(first)
    scheduler.add(sequence(1, [0] * 30 + [5, 5] + [6] * 10))
    assert step(scheduler) == [(1, 10)]


def test_what_was_used_least_recently_is_evicted_first_and_ends_before_beginnings() -> None:
    cache = BlockCache(6)
    keys = [bytes([i]) for i in range(6)]
    a, b = cache.allocate(3), cache.allocate(3)
    for block, key in zip(a + b, keys, strict=True):
        assert cache.commit(block, key) == block
    cache.release(a)
    cache.release(b)
    assert cache.find(keys[0]) == a[0]  # only the beginning of a, which thereby becomes the last to go
    cache.release(a[:1])
    assert [cache.allocate(1)[0] for _ in range(6)] == [a[2], a[1], b[2], b[1], b[0], a[0]]
    assert [cache.find(key) for key in keys] == [None] * 6


def test_a_sequence_is_admitted_when_its_prompt_fits_beside_a_block_for_each_that_runs() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(6, max_prefill_tokens=512)
    first, second, third = distinct(0, 2 * BLOCK, 4 * BLOCK), distinct(1, 3 * BLOCK), distinct(2, 1)
    for s in (first, second, third):
        scheduler.add(s)
    assert step(scheduler) == [(0, 64), (1, 96)]  # 2 + 3, and 1 to grow; for the third nothing is left
    assert list(scheduler.waiting) == [third]
    assert step(scheduler) == [(0, 1)]  # takes the last block, and the second must wait
    assert step(scheduler) == [(0, 1)]
    scheduler.remove(second)
    assert step(scheduler) == [(0, 1), (2, 1)]


def test_the_sequence_that_came_last_is_preempted_and_comes_back_first() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(7, max_prefill_tokens=512)
    first, second, third = distinct(0, 31, 120), distinct(1, 40, 120), distinct(2, 40, 120)
    for s in (first, second):
        scheduler.add(s)
    assert step(scheduler) == [(0, 31), (1, 40)]
    scheduler.add(third)
    assert step(scheduler) == [(0, 1), (1, 1), (2, 40)]  # 5 blocks, and 2 to grow
    while third in scheduler.running:
        plan = step(scheduler)
    assert plan == [(0, 1), (1, 1)]
    assert (first.cached, second.cached, scheduler.preemptions) == (65, 74, 1)  # 3 blocks each
    assert (third.blocks, third.cached, third.length) == ([], 0, 65)  # its third block was not there any more
    scheduler.add(fourth := distinct(3, 1))
    assert step(scheduler) == [(0, 1), (1, 1)]
    assert list(scheduler.waiting) == [third, fourth]
    scheduler.remove(first)
    scheduler.remove(second)
    assert step(scheduler) == [(2, 33), (3, 1)]  # its second block went to the first sequence, its first is still there


def test_a_waiting_request_can_be_removed_and_an_unknown_one_not() -> None:
    scheduler: Scheduler[Sequence] = Scheduler(1, max_batch_tokens=4, max_sequences=1)
    a, b = distinct(0, 1, 1), distinct(1, 1, 1)
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
    with pytest.raises(ValueError, match="max_prefill_tokens=0"):
        Scheduler(2, max_prefill_tokens=0)


def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_block() -> None:
    a, b, c = list[bytes](), list[bytes](), list[bytes]()
    hash_blocks(a, np.arange(70, dtype=np.int32))
    hash_blocks(b, np.arange(40, dtype=np.int32))
    hash_blocks(b, np.arange(64, dtype=np.int32))
    hash_blocks(c, np.r_[np.int32(9), np.arange(1, 64, dtype=np.int32)])
    assert a == b
    assert len(set(a + c)) == 4
