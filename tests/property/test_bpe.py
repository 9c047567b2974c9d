"""Byte-level merges of any vocabulary equal the tokenizers library's."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE

from llama2.text import bpe


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces in any order, and merges of any two pieces whose joint text is one: in no order, some of them twice."""
    pieces = bpe.LETTERS.copy()
    del pieces[0x80:0x84]  # bytes without a token
    made: list[str] = []
    for _ in range(draw(st.integers(0, 24))):
        parts = st.sampled_from([*"abc", *made])
        made.append(draw(parts) + draw(parts))
    pieces = draw(st.permutations([*pieces, *{*made}]))
    pairs = [(a, b) for a in {*"abc", *made} for b in {*"abc", *made} if a + b in made]
    return pieces, draw(st.lists(st.sampled_from(sorted(pairs)), max_size=40)) if pairs else []


LETTERS = st.sampled_from(["a", "b", "c", "d", bpe.LETTERS[0x81]])


@settings(deadline=None, max_examples=500)
@given(vocabulary=vocabularies(), words=st.lists(st.text(LETTERS, min_size=1, max_size=40), min_size=1, max_size=8))
def test_words_become_the_librarys_tokens(
    vocabulary: tuple[list[str], list[tuple[str, str]]], words: list[str]
) -> None:
    pieces, pairs = vocabulary
    ids = {piece: token for token, piece in enumerate(pieces)}
    library = BPE(ids, list(dict.fromkeys(pairs)))  # of two alike the first counts, as llama.cpp has it
    ours = bpe.Merges(bpe.arrange(pieces, ids, [f"{left} {right}" for left, right in pairs]))
    assert len(ours) == len(pieces)
    assert [ours.piece(token) for token in range(len(ours))] == pieces
    for word in [*words, *pieces]:
        assert list(ours.merge(word)) == [token.id for token in library.tokenize(word)]
        assert ours.find(word) == ids.get(word)
    assert ours.find("\uffff") is None
