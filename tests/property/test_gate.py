"""Moderated streams over random cuts: nothing of what is refused passes, everything else does, and never too late."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.safety.gate import Gate
from llama2.safety.moderation import Moderator
from llama2.safety.policy import Policy, Rule

PHRASE = "never say this aloud"


def run(pieces: list[str], window: int, moderator: Moderator, *, hold_back: bool) -> tuple[list[int], int]:
    """The numbers of the pieces that passed, and the most that were held at once."""
    gate: Gate[int] = Gate(window, hold_back=hold_back)
    passed: list[int] = []
    most = 0
    for i, piece in enumerate(pieces):
        gate.push(i, piece, last=i == len(pieces) - 1)
        passed += gate.take()
        most = max(most, gate.held)
        while (found := gate.window()) is not None:
            start, text, whole = found
            said = [{"role": "assistant", "content": text}]
            if moderator.window(said, start, "output", whole=whole).ends:
                return passed, most
            gate.judged()
            passed += gate.take()
    return passed, most


def cut(text: str, borders: list[int]) -> list[str]:
    edges = [0, *sorted({b % (len(text) + 1) for b in borders}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


MODERATOR = Moderator(Policy(categories={"other": Rule(action="stop", phrases=[PHRASE])}))


@settings(max_examples=300, deadline=None)
@given(
    before=st.text("ab .", max_size=300),
    after=st.text("ab .", max_size=300),
    borders=st.lists(st.integers(0, 1000), max_size=120),
    window=st.sampled_from([4, 8, 32]),
    hold_back=st.booleans(),
)
def test_a_phrase_is_caught_however_it_is_cut(
    before: str, after: str, borders: list[int], window: int, hold_back: bool
) -> None:
    text = f"{before} {PHRASE} {after}"
    pieces = cut(text, borders)
    passed, most = run(pieces, window, MODERATOR, hold_back=hold_back)
    assert passed == list(range(len(passed)))
    begin = len(before) + 1
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    within = [i for i, at in enumerate(starts) if at + len(pieces[i]) > begin and at < begin + len(PHRASE)]
    last = within[-1]
    if hold_back:
        assert most <= window
        assert last not in passed  # nor anything after it
        if len(within) <= window // 2:
            assert not set(within) & set(passed)
    else:
        assert sum(i > last for i in passed) <= window // 2


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.text("ab .", max_size=3), min_size=1, max_size=150),
    window=st.sampled_from([2, 4, 32]),
    hold_back=st.booleans(),
)
def test_what_is_harmless_passes_whole(pieces: list[str], window: int, hold_back: bool) -> None:
    passed, most = run(pieces, window, MODERATOR, hold_back=hold_back)
    assert passed == list(range(len(pieces)))
    assert most <= (window if hold_back else 1)


def test_every_offset_of_a_phrase_over_windows_of_32() -> None:
    """The phrase of 20 letters, cut into letters and into words, begins at each of 80 tokens."""
    for parts in (list(PHRASE[:15] + "x"), ["never", " say", " this", " aloud"]):
        phrase = "".join(parts)
        moderator = Moderator(Policy(categories={"other": Rule(action="stop", phrases=[phrase])}))
        for offset in range(80):
            passed, most = run([" a"] * offset + [" ", *parts, " "] + [" b"] * 50, 32, moderator, hold_back=True)
            assert len(passed) <= offset + 1, offset
            assert most <= 32
