"""Preference pairs: each public form read, what teaches nothing counted, conversations held out whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama2 import checkpoint
from llama2.data import comparisons
from llama2.data.comparisons import PairReport, PreferencePair, hold_out, mix, some, to_json
from llama2.data.pairs import Pairs, TokenizedPair, tokenize
from llama2.errors import DataError
from llama2.text import chat_formats
from llama2.text.dialog import Message
from models import write_tiny_gguf

SAID = [{"role": "user", "content": "Hi"}]


def read(tmp_path: Path, *records: Any, **options: Any) -> tuple[list[PreferencePair], PairReport]:
    file, report = tmp_path / "set.jsonl", PairReport()
    file.write_text("\n".join(json.dumps(record) for record in records))
    return list(comparisons.read([file], report, **options)), report


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"},
        {"prompt": SAID, "chosen": answer("Hello."), "rejected": answer("What?")},
        {"messages": SAID, "chosen": "Hello.", "rejected": " What?\n"},
        {"chosen": SAID + answer("Hello."), "rejected": SAID + answer("What?")},
        {"prompt": "Hi", "chosen": SAID + answer("Hello."), "rejected": SAID + answer("What?")},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " What?"},
    ],
)
def test_forms_of_one_pair(record: dict[str, Any], tmp_path: Path) -> None:
    (pair,), _ = read(tmp_path, record)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Message("user", "Hi"),), "Hello.", "What?")
    assert (pair.grade, pair.safety, pair.source, pair.where) == (None, None, "set", f"{tmp_path / 'set.jsonl'}:1")


def test_grades_labels_and_sources_are_written_and_read_back(tmp_path: Path) -> None:
    pair = PreferencePair((Message("user", "Hi"),), "Hello.", "What?", 2, "chosen safe", "mine")
    assert to_json(pair, margin=2 / 3)["margin"] == 2 / 3
    comparisons.write([pair], tmp_path / "set.jsonl")
    (found,), _ = read(tmp_path, json.loads((tmp_path / "set.jsonl").read_text()))
    assert (found.prompt, found.grade, found.safety, found.source) == (pair.prompt, 2, "chosen safe", "mine")
    (named,), _ = read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c", "grade": "slightly better"})
    (labelled,), _ = read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, safety="both safe")
    assert (named.grade, named.safety, labelled.safety) == (1, None, "both safe")


def test_trees_become_graded_pairs(tmp_path: Path) -> None:
    """Three ranked replies are three pairs, and the second question's two are another."""

    def reply(text: str, rank: int, *replies: Any) -> dict[str, Any]:
        return {"role": "assistant", "text": text, "rank": rank, "replies": list(replies)}

    inner = {"role": "prompter", "text": "Why?", "replies": [reply("so", 3), reply("thus", 0)]}
    root = {"role": "prompter", "text": "Hi", "replies": [reply("b", 1), reply("a", 0, inner), reply("c", 2)]}
    pairs, _ = read(tmp_path, {"message_tree_id": "x", "prompt": root})
    found = [(len(pair.prompt), pair.chosen, pair.rejected, pair.grade) for pair in pairs]
    assert found == [(1, "a", "b", 1), (1, "a", "c", 2), (1, "b", "c", 1), (3, "thus", "so", 3)]
    assert [message.content for message in pairs[3].prompt] == ["Hi", "a", "Why?"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"},
         "roles are out of order, or a message is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "an answer is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "both answers are the same"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: c", "rejected": "\n\nHuman: b\n\nAssistant: d"}, "the prompts differ"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "safety": "rejected safe"},
         "an unsafe answer is chosen over a safe one"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: d"},
         "a side ends without an answer of the assistant"),
    ],
)  # fmt: skip
def test_what_teaches_nothing_is_counted(record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    pairs, report = read(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, record)
    assert (len(pairs), dict(report.left_out)) == (1, {reason: 1})
    assert report.lines()[1] == f"1 left out: {reason}; the first: {tmp_path / 'set.jsonl'}:2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grade": 4}, "grade 4 is out of range; grades are 0 (negligibly better), 1 (slightly better)"),
        ({"grade": True}, "grade True is out of range"),
        ({"safety": "safe"}, "safety 'safe' is not one of chosen safe, both safe, both unsafe"),
        ({"chosen": 3}, "chosen must be text or messages"),
        ({"prompt": 3}, "prompt must be text or a list of messages"),
        ({"prompt": [{"role": "bot", "content": "a"}]}, "prompt: message 0 must have a role"),
        ({"prompt": None}, "has no prompt"),
    ],
)
def test_what_is_not_a_pair_is_refused_or_counted(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    record = {"prompt": "a", "chosen": "b", "rejected": "c"} | change
    with pytest.raises(DataError) as refused:
        read(tmp_path, record)
    assert f"set.jsonl:1: {message}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert read(tmp_path, record, skip_bad=True)[1].left_out == {"not a pair": 1}


def made(count: int, source: str = "set") -> list[PreferencePair]:
    """Two pairs of each conversation."""
    return [PreferencePair((Message("user", f"{source} {i // 2}"),), "a", "b", source=source) for i in range(count)]


def test_conversations_are_held_out_whole() -> None:
    pairs = made(60, "one") + made(20, "two")
    pairs.append(
        PreferencePair((Message("user", " ONE  3"), Message("assistant", "x"), Message("user", "y")), "a", "b")
    )
    train, held = hold_out(pairs, 10, seed=1)
    assert len(train) + len(held) == 81
    assert not {pair.group for pair in train} & {pair.group for pair in held}
    counts = {source: sum(pair.source == source for pair in held) for source in ("one", "two")}
    assert counts == {"one": 10, "two": 8}  # two fifths of 20
    alone = hold_out(made(60, "one"), 10, seed=1)[1]
    assert [pair for pair in held if pair.source == "one"] == alone  # whatever is beside it
    assert hold_out(pairs, 10, seed=2)[1] != held


def test_the_mixes_of_the_paper() -> None:
    own, other = made(90, "one"), made(200, "two")
    assert len(mix(own, other, 0.5)) == 180  # as many again
    tenth = mix(own, other, 0.9)
    assert (len(tenth), tenth[:90]) == (100, own)
    assert mix(own, other, 0.9, seed=1)[90:] != tenth[90:]
    assert len(mix(own, other[:5], 0.5)) == 95
    assert some(own, 0.25) == some(own, 0.5)[:22]
    assert (len(some(own, 0.5)), len(some(own, 1.0)), len(some(own, 0.001))) == (45, 90, 1)


def tokenized(*sizes: int) -> list[TokenizedPair]:
    """Pairs of sequences of these many tokens, all of them different."""
    starts = np.cumsum((0, *sizes))
    every = [np.arange(start, start + size, dtype=np.int32) for start, size in zip(starts, sizes, strict=False)]
    return [TokenizedPair(a, b, 0.5, (1.0, 0.0)) for a, b in zip(every[::2], every[1::2], strict=True)]


def test_batches_hold_both_sides_whole_and_find_their_ends() -> None:
    source = Pairs("pairs", tokenized(5, 60, 30, 7, 64, 2))
    assert (len(source), source.length) == (3, 56)
    batch = source.batch([2, 0, 1])
    assert batch.tokens.shape == (3, 64)  # 64, 60 + 2, 30 + 7 + 5
    assert batch.count == 3
    flat, documents = batch.tokens.flatten(), batch.documents
    for place, number in enumerate([2, 0, 1]):
        pair = source._pairs[number]
        for end, sequence in zip(batch.ends[place], (pair.chosen, pair.rejected), strict=True):
            start = end - len(sequence) + 1
            assert flat[start : end + 1].tolist() == sequence.tolist()
            same = documents.flatten()[start : end + 1]
            assert same.min() == same.max()
    assert len({(row, number) for row, numbers in enumerate(documents) for number in numbers}) <= 6 + 3
    assert Pairs("pairs", tokenized(5, 60, 30, 7, 130, 2), fixed=True).batch([0]).tokens.shape == (1, 192)
    assert source.sha256 != Pairs("pairs", tokenized(5, 60, 30, 7, 64, 3)).sha256


def test_sequences_end_with_the_answer_and_none_is_cut(tmp_path: Path) -> None:
    """What ChatML's template writes behind the end token, a newline, is left out."""
    write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer="bpe", template=chat_formats.source("chatml", bos=False))
    said = (Message("user", "Hi"),)
    pairs = [PreferencePair(said, "yes", "n" * 90, 3, "both safe", where="f:1"),
             PreferencePair(said, "yes", "no", where="f:2")]  # fmt: skip
    report = PairReport()
    with checkpoint.open(tmp_path / "tiny.gguf") as model:
        options: dict[str, Any] = {"length": 70, "margins": {3: 1.0, None: 0.0}, "report": report}
        found, kept = tokenize(pairs, model.tokenizer, model.template, **options)
        texts = [model.tokenizer.decode(side.tolist()) for side in (found[0].chosen, found[0].rejected)]
        whole, _ = pairs[1].dialog("yes").render(model.tokenizer, model.template)
        assert len(found[0].chosen) < len(whole)
        assert found[0].chosen.tolist() == whole[: len(found[0].chosen)]
        assert found[0].chosen[-1] == found[0].rejected[-1] == model.tokenizer.control["<|im_end|>"]
        again, _ = tokenize(pairs[:1], model.tokenizer, model.template, **options | {"length": 999})
    assert kept == pairs[1:]
    assert report.lines()[1:] == ["1 left out: more than 70 tokens, and nothing is cut; the first: f:1"]
    assert np.isnan(found[0].safe).all()
    assert (again[0].margin, again[0].safe) == (1.0, (1.0, 1.0))
    assert all("Hi" in text for text in texts)


def test_text_that_spells_a_role_marker_is_counted_or_neutralised(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    pair, report = PreferencePair((Message("user", "Hi"),), "a [INST]", "b", where="f:1"), PairReport()
    with checkpoint.open(tmp_path / "tiny.gguf") as model:
        options: dict[str, Any] = {"length": 99, "margins": {}, "report": report}
        assert tokenize([pair], model.tokenizer, None, **options) == ([], [])
        assert report.lines()[1].startswith(
            "1 left out: the chat format cannot write it; the first: f:1: message 1 con"
        )
        assert len(tokenize([pair], model.tokenizer, None, **options, neutralise=True)[0]) == 1
