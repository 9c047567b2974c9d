"""Incremental detokenisation over random histories, and what user text can become."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.text import tokenizer_folder
from llama2.text.tokenizer import Tokenizer, from_sentencepiece
from texts import train_bpe, train_sentencepiece

UNTIMED = settings(deadline=None, max_examples=200)
KINDS = pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])


@cache
def tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        if kind == "bpe":
            return tokenizer_folder.read(train_bpe("smollm", Path(folder, "tokenizer.json")).parent)
        Path(folder, "tokenizer.model").write_bytes(train_sentencepiece())
        return from_sentencepiece(Path(folder, "tokenizer.model"))


def tokens(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, and byte soup: tokens of one byte each."""
    all_ids = range(tokenizer(kind).vocab_size)
    single = [i for i in all_ids if len(tokenizer(kind).token_bytes(i)) == 1]
    return st.lists(st.sampled_from(all_ids) | st.sampled_from(single), max_size=40)


@KINDS
@UNTIMED
@given(data=st.data())
def test_joined_pieces_equal_decode_and_never_hold_half_a_character(kind: str, data: st.DataObject) -> None:
    ours, ids = tokenizer(kind), data.draw(tokens(kind))
    stream = ours.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == ours.decode(ids)
    more = data.draw(tokens(kind))
    assert ours.decode(ids + more).startswith("".join(pieces))  # what is out is certain, whatever follows


@KINDS
@UNTIMED
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_text_survives_and_streams_as_it_was(kind: str, text: str) -> None:
    ours = tokenizer(kind)
    ids = ours.encode(text)
    assert ours.decode(ids) == text.replace("\u2581", " " if kind == "sentencepiece" else "\u2581")
    stream = ours.stream()
    assert "\ufffd" not in "".join(map(stream.push, ids)).replace("\ufffd", "", text.count("\ufffd"))


@KINDS
@UNTIMED
@given(
    st.lists(
        st.sampled_from(["<s>", "</s>", "<unk>", "<|eot_id|>", "<|begin_of_text|>", "<", "|", "s", ">", "/", "＜s＞"]),
        max_size=12,
    ).map("".join)
)
def test_text_never_becomes_a_control_token(kind: str, text: str) -> None:
    ours = tokenizer(kind)
    assert not set(ours.encode(text)) & {*ours.control.values(), 0}
    control = [token for _, token in ours.split(text) if token is not None]
    assert [i for i in ours.encode(text, special=True) if i in ours.control.values()] == control
