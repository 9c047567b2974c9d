"""Stop strings against a search of the whole text, however it is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from llama2.engine.stop import StopStrings

letters = st.text("ab", max_size=12)


@given(pieces=st.lists(letters, max_size=6), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_to_complete(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    ending = [stop for stop in stops if ends and text[: ends[0]].endswith(stop)]
    longest = max(ending, key=len, default=None)
    expected = text[: ends[0] - len(longest or "")] if ends else text

    matcher, told, seen = StopStrings(stops), "", ""
    for piece in pieces:
        told += matcher.push(piece)
        seen += piece
        if matcher.found:
            break
        assert seen.startswith(told)
        held = seen[len(told) :]
        assert not held or any(stop.startswith(held) for stop in stops), "held back without a reason"
    assert matcher.found == longest
    assert told + matcher.flush() == expected
