"""Drafts by prompt lookup, against a search through the whole history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llama2.engine.lookup import Lookup

ROOM = 512


def array(history: Sequence[int]) -> NDArray[np.int32]:
    return np.array(history, np.int32)


def searched(history: list[int], most: int) -> list[int]:
    """What followed the latest earlier place of the last 4, else 3, else 2 tokens, as if the copy went on for ever."""
    for n in (4, 3, 2):
        for begin in range(len(history) - n - 1, -1, -1):
            if history[begin : begin + n] == history[-n:]:
                longer = list(history)
                for i in range(most):
                    longer.append(longer[begin + n + i])
                return longer[len(history) :]
    return []


@given(
    history=st.lists(st.integers(0, 2), min_size=1, max_size=120),
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=60),
    most=st.integers(1, 10),
)
def test_a_draft_is_what_a_search_finds(history: list[int], steps: list[tuple[int, int]], most: int) -> None:
    """`steps`: how many tokens are new, and the room for drafts."""
    lookup, end = Lookup(most), 0
    for new, room in steps:
        end = min(end + new, len(history))
        lookup.rate = 1.0  # long drafts, whatever came true
        draft = lookup.draft(array(history[:end]), room)
        found = searched(history[:end], most)
        worth = sum(lookup.rate**k > 0.2 for k in range(1, most + 1))
        assert draft == found[: min(room, worth)]


@pytest.mark.parametrize(
    ("history", "draft"),
    [
        ([], []),
        ([7], []),
        ([7, 7], []),
        ([7, 7, 7], [7] * 4),
        ([1, 2, 3, 1], []),  # a single token is not looked up
        ([1, 2, 3, 1, 2], [3, 1, 2, 3]),
        ([1, 2, 8, 1, 2, 9, 1, 2], [9, 1, 2, 9]),  # the latest place
        ([5, 1, 2, 8, 6, 1, 2, 9, 5, 1, 2], [8, 6, 1, 2]),  # but rather the one with more tokens before it
        ([1, 2, 3, 4, 8, 2, 3, 4, 9, 1, 2, 3, 4], [8, 2, 3, 4]),
        ([0, 1, 2, 3, 4, 8, 9, 1, 2, 3, 4, 7, 0, 1, 2, 3, 4], [7, 0, 1, 2]),  # five in common count as four
    ],
)
def test_worked_examples(history: list[int], draft: list[int]) -> None:
    """The same whether the history comes at once or token by token."""
    for starts in ([], range(len(history))):
        lookup = Lookup(4)
        for start in starts:
            lookup.draft(array(history[:start]), ROOM)
        lookup.rate = 1 / 0.8  # so that it is 1, should the last proposal be judged wrong
        assert lookup.draft(array(history), ROOM) == draft


def test_drafts_grow_while_they_come_true() -> None:
    """The rate starts at a half, and a right token takes a fifth of what is missing to 1: 1 - 0.5 * 0.8 ** n."""
    lookup, history, lengths = Lookup(8), [1, 2] * 4, []
    for _ in range(4):
        draft = lookup.draft(array(history), ROOM)
        lengths.append(len(draft))
        history += ([1, 2] * 5)[: len(draft) + 1] if history[-1] == 2 else ([2, 1] * 5)[: len(draft) + 1]
    assert lengths == [2, 5, 8, 8]  # after 0, 3, 9 right ones: 0.5 ** 3 < 0.2, 0.744 ** 6 = 0.17, 0.933 ** 8 = 0.574
    assert lookup.rate == pytest.approx(1 - 0.5 * 0.8 ** (3 + 6 + 8))  # of nine, the last was not proposed


def test_drafts_end_while_they_are_wrong_and_come_back_when_they_would_be_right() -> None:
    lookup, history, lengths = Lookup(8), [0, 1, 2], []
    lookup.rate = 0.8
    for i in range(7):
        lengths.append(len(lookup.draft(array(history), ROOM)))
        history += [100 + i, 1, 2]  # 1 2 came before, but followed by another number
    # Nothing was found; then 0.8 ** 7 = 0.21, 0.64 ** 3 = 0.262, 0.512 ** 2 = 0.262; 0.41, 0.328, 0.262 are too little.
    assert lengths == [0, 7, 3, 2, 0, 0, 0]

    history, lengths = history[:-3], []
    for token in (105, 1, 2):
        history.append(token)
        lengths.append(len(lookup.draft(array(history), ROOM)))
    assert lengths == [0, 2, 3]  # 1 - 0.738 * 0.8 ** n: 0.41, 0.528, 0.622; 0.528 ** 2 = 0.278, 0.622 ** 3 = 0.241


def test_one_wrong_token_ends_the_judgement_of_a_draft() -> None:
    lookup = Lookup(8)
    history = [1, 2, 3, 4, 5, 6, 1, 2]
    assert lookup.draft(array(history), ROOM) == [3, 4]
    history += [3, 9, 5, 6]  # the proposal was 3 4 5 6: right, then wrong, and of the rest nothing is known
    lookup.draft(array(history), ROOM)
    assert lookup.rate == pytest.approx((0.5 + 0.2 * 0.5) * 0.8)


def test_proposals_are_judged_also_where_there_was_no_room_for_them() -> None:
    lookup, history = Lookup(8), [1, 2] * 4
    for _ in range(6):
        assert lookup.draft(array(history), 0) == []
        history.append(history[-2])
    assert lookup.draft(array(history), ROOM) == [1, 2] * 4
    assert lookup.rate == pytest.approx(1 - 0.5 * 0.8**6)


def test_a_history_is_read_once() -> None:
    """What was read is found again without a look at it: here it is not even there any more."""
    lookup, history = Lookup(3), array([5, 6, 7, 8, 9, 0, 0, 5, 6])
    assert lookup.draft(history[:-2], ROOM) == []
    history[:2] = 0
    lookup.rate = 1.0
    assert lookup.draft(history, ROOM) == [7, 8, 9]
