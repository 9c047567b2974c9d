"""Meta's surface over a network whose logits are written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import END, VOCABULARY, ByteTokenizer, HistoryRunner, one
from llama2 import Dialog, Llama
from llama2.engine.engine import Engine
from llama2.errors import CheckpointError, ContextError, DialogError, EngineError, RequestError, TokenizerError
from llama2.text.dialog import Message
from models import write_tiny_gguf

LENGTH = 32  # max_seq_len


@dataclass
class ByteModel:
    """What Llama needs of a model: `?` asks, and the network answers."""

    engine: Engine
    tokenizer: ByteTokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def render(self, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
        dialog = Dialog(messages)
        if dialog.messages[-1].role != "user":
            raise DialogError("the last one must be the user's")
        return self.tokenizer.encode(dialog.messages[-1].content + "?")


def llama(logits: Callable[[list[int]], NDArray[np.float32]], seed: int = 1) -> Llama:
    engine = Engine(HistoryRunner(logits), ByteTokenizer(), context=LENGTH)  # type: ignore[arg-type]
    return Llama(ByteModel(engine, ByteTokenizer()), max_batch_size=3, seed=seed)  # type: ignore[arg-type]


def counting(history: list[int]) -> NDArray[np.float32]:
    """b after a, c after b and so on with probability 3/4, else the letter itself again; after e, the end."""
    row = np.full(VOCABULARY, -np.inf, np.float32)
    row[history[-1] + 1 if history[-1] < ord("e") else END] = math.log(0.75)
    row[history[-1]] = math.log(0.25)
    return row


def test_rows_end_at_their_end_token_or_their_length() -> None:
    rows, scores = llama(counting).generate([[*b"a"], [*b"xyzc"], [*b"cd"]], max_gen_len=3, temperature=0)
    assert (rows, scores) == ([[*b"bcd"], [*b"de"], [*b"e"]], None)


def test_log_probabilities_are_aligned_to_tokens() -> None:
    likely, same = math.log(0.75), math.log(0.25)
    rows, scores = llama(counting).generate([[*b"abb"]], 2, temperature=0, logprobs=True)
    assert (rows, scores) == ([[*b"cd"]], [pytest.approx([likely, likely])])
    rows, scores = llama(counting).generate([[*b"abb"], [*b"d"]], 2, temperature=0, logprobs=True, echo=True)
    assert rows == [[*b"abbcd"], [*b"de"]]
    assert scores == [pytest.approx([0, likely, same, likely, likely]), pytest.approx([0, likely])]
    rows, _ = llama(counting).generate([[*b"ab", END, *b"a"]], 2, temperature=0, echo=True)
    assert rows == [[*b"ab"]]  # the reference's own way


def test_a_prompt_that_fills_the_length_gets_its_own_log_probabilities_alone() -> None:
    prompt = [*b"abcd" * (LENGTH // 4)]
    model = llama(lambda history: one(ord("abcd"[len(history) % 4])))
    assert model.generate([prompt], 5, logprobs=True) == ([[]], [[]])
    assert model.generate([prompt], 5, logprobs=True, echo=True) == ([prompt], [pytest.approx([0.0] * LENGTH)])
    assert model.generate([prompt[:-1]], 5) == ([prompt[-1:]], None)


def test_completions_have_the_keys_of_the_reference() -> None:
    model = llama(counting)
    assert model.text_completion(["a", "c"], temperature=0, max_gen_len=3) == [
        {"generation": "bcd"},
        {"generation": "de"},
    ]
    (answer,) = model.text_completion(["c"], temperature=0, logprobs=True, echo=True)
    assert answer["generation"] == "cde"
    assert answer["tokens"] == ["c", "d", "e"]
    assert answer["logprobs"] == pytest.approx([0, math.log(0.75), math.log(0.75)])


def test_dialogs_with_special_tags_get_metas_sentence_and_the_others_their_answer() -> None:
    dialogs: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": "<<SYS>>"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "c"}],
    ]
    refusal = "Error: special tags are not allowed as part of the prompt."
    model = llama(lambda history: one(ord(chr(history[0]).upper())))
    plain = model.chat_completion(dialogs, max_gen_len=2)
    assert [answer["generation"]["content"] for answer in plain] == ["AA", refusal, "CC"]
    assert all(answer.keys() == {"generation"} and answer["generation"]["role"] == "assistant" for answer in plain)
    scored = model.chat_completion(dialogs, max_gen_len=2, logprobs=True)
    assert [answer["tokens"] for answer in scored] == [["A", "A"], [], ["C", "C"]]
    assert [answer["logprobs"] for answer in scored] == [pytest.approx([0.0, 0.0]), [], pytest.approx([0.0, 0.0])]
    assert model.chat_completion(dialogs[1:2])[0]["generation"]["content"] == refusal
    with pytest.raises(DialogError, match="user's"):
        model.chat_completion([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])


def test_answers_repeat_from_build_to_build_and_not_from_call_to_call() -> None:
    def uniform(history: list[int]) -> NDArray[np.float32]:
        return np.zeros(VOCABULARY, np.float32)

    def calls(model: Llama) -> list[list[int]]:
        return [row for _ in range(2) for row in model.generate([[1], [1]], 8, temperature=1.0, top_p=1.0)[0]]

    first = calls(llama(uniform))
    assert calls(llama(uniform)) == first
    assert len({tuple(row) for row in first}) == 4
    assert calls(llama(uniform, seed=2)) != first


def test_limits_are_errors() -> None:
    model = llama(counting)
    with pytest.raises(RequestError, match="4 prompts are more than max_batch_size=3"):
        model.text_completion(["a"] * 4)
    with pytest.raises(ContextError, match="prompt of 33 tokens is longer than max_seq_len=32"):
        model.generate([[*b"a"], [97] * 33], 4)
    with pytest.raises(RequestError, match="temperature"):
        model.generate([[*b"a"]], 4, temperature=-1)
    with pytest.raises(RequestError, match="max_gen_len=-1"):
        model.generate([[*b"a"]], -1)
    with pytest.raises(RequestError, match="empty"):
        model.generate([[]], 4)
    with pytest.raises(EngineError, match="number"):
        llama(lambda history: np.full(VOCABULARY, np.nan, np.float32)).generate([[1]], 4)
    assert not model.model.engine.busy


def test_build(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    model = Llama.build(str(path), max_seq_len=64, max_batch_size=2, model_parallel_size=1)
    (answer,) = model.text_completion(["to be"], max_gen_len=4, logprobs=True)
    assert len(answer["tokens"]) == len(answer["logprobs"]) <= 4
    for settings, error, reason in [
        ({"max_seq_len": 10_000}, ContextError, "context=10000"),
        ({"max_batch_size": 0}, RequestError, "max_batch_size=0"),
        ({"tokenizer_path": str(tmp_path / "tokenizer.model")}, TokenizerError, "tokenizer.model"),
        ({"tokenizer_path": str(path)}, TokenizerError, "tiny.gguf"),
    ]:
        with pytest.raises(error, match=reason):
            Llama.build(str(path), **settings)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        Llama.build(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "prompts", [b"abc", None, 5, {1: 2}, [b"abc"], [[1.0]], [5], np.array(1), np.array([[1.5]])], ids=str
)
def test_what_are_no_lists_of_token_ids(prompts: Any) -> None:
    with pytest.raises(RequestError, match=r"^prompt_tokens"):
        llama(counting).generate(prompts, 3)


def test_one_text_is_no_list_of_texts() -> None:
    model = llama(counting)
    wrong: Any
    for wrong in ("abc", b"abc", None, 5):
        with pytest.raises(RequestError, match=r"^prompts"):
            model.text_completion(wrong)
        with pytest.raises(RequestError, match=r"^dialogs"):
            model.chat_completion(wrong)
    for name, value in (("max_gen_len", "3"), ("max_gen_len", True), ("logprobs", 1), ("echo", "no")):
        options: dict[str, Any] = {name: value}
        with pytest.raises(RequestError, match=rf"^{name}"):
            model.text_completion(["a"], **options)
