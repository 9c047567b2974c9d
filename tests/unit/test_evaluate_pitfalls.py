"""Faults of evaluations that others published, each with a test that it is not here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from scipy.special import log_softmax

from evaluations import CHATML, QUESTIONS, arc_task, by_hand, logits, tiny_model, write_rows
from fakes import ByteTokenizer
from llama2.errors import ContextError
from llama2.evaluate import rows as sets
from llama2.evaluate.harness import EngineLM
from llama2.evaluate.items import TaskItem, TaskPart, parts
from llama2.evaluate.queries import AnswerStore, GenerationQuery, LikelihoodQuery, answers, key
from llama2.evaluate.task import EvaluationTask


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLM]:
    """A model with Llama 2's kind of vocabulary, which adds BOS and a space in front."""
    with tiny_model(tmp_path_factory.mktemp("pieces")) as model:
        yield EngineLM(model)


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLM]:
    """A model with SmolLM2's kind of vocabulary and chat template."""
    with tiny_model(tmp_path_factory.mktemp("bytes"), tokenizer="bpe", template=CHATML) as model:
        yield EngineLM(model)


def asked(
    task: EvaluationTask,
    folder: Path,
    rows: list[Any],
    *,
    lm: EngineLM | None = None,
    protocol: str = "paper",
    wanted: set[str] | None = None,
    seed: int = 0,
    chat: bool = False,
) -> tuple[TaskPart, list[TaskItem]]:
    """A task's only part, and its items."""
    write_rows(folder / "mine.jsonl", rows)
    splits, _ = sets.read(task, folder)
    (part,) = parts(task, splits, cast("Any", protocol))
    return part, part.items(lm or by_hand(), set(part.ids) if wanted is None else wanted, seed=seed, chat=chat)


def questions(count: int) -> list[dict[str, Any]]:
    """Questions that differ, in ARC's form."""
    return [{"query": f"Question: What is {n}?", "choices": ["this", "that"], "gold": n % 2} for n in range(count)]


def test_a_token_over_the_seam(bytes_: EngineLM) -> None:
    """Pitfalls 1 and 6: `e` and `r` are one token together, so that lm-eval's own split leaves nothing to score."""
    assert TemplateLM._encode_pair(bytes_, "he we", "r")[1] == []
    query = bytes_.likelihood("he we", "r")
    assert [*query.context, *query.continuation] == bytes_.tok_encode("he wer")
    assert query.continuation == tuple(bytes_.tok_encode("er"))


def test_a_continuation_is_never_empty(pieces: EngineLM) -> None:
    for context, continuation in [
        ("he we", "r"),
        ("h", "e"),
        (" ", "x"),
        ("", " a"),
        ("", " "),
        ("a", " "),
        ("a ", " b"),
    ]:
        query = pieces.likelihood(context, continuation)
        assert query.context
        assert query.continuation


def test_no_lone_space(pieces: EngineLM) -> None:
    """Pitfall 2: encoded alone, SentencePiece writes " t" as "▁" and "▁t"."""
    space, word = (pieces.model.tokenizer.encode(text) for text in ("", " t"))
    assert space == []
    lone = word[0]
    assert pieces.model.tokenizer.token_bytes(lone) == b" "
    for context in ("", "Answer:", "Answer: "):
        assert lone not in pieces.likelihood(context, " t" if not context.endswith(" ") else "t").continuation


def test_a_space_at_the_end_of_a_context(pieces: EngineLM, bytes_: EngineLM) -> None:
    """Pitfall 3: words begin with their space."""
    for lm in (pieces, bytes_):
        assert lm.likelihood("on it ", "to") == lm.likelihood("on it", " to")
        assert lm.likelihood("on it ", "x") == lm.likelihood("on it", " x")  # for which there is not one token


def test_positions_and_lengths() -> None:
    """Pitfall 4: each token is scored once, at its place, in a continuation of one beside one of five."""
    lm = by_hand()
    pairs = [("ab", "c"), ("ab", "cdefg"), ("", "x")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        before = list(context.encode()) or [ByteTokenizer.eos_id]
        rows = [logits([*before, *continuation.encode()[:i]]).astype(float) for i in range(len(continuation))]
        expected = sum(log_softmax(row)[token] for row, token in zip(rows, continuation.encode(), strict=True))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == all(row.argmax() == token for row, token in zip(rows, continuation.encode(), strict=True))


def test_characters_not_bytes(tmp_path: Path) -> None:
    """Pitfall 5: `ééé` has 3 characters and 6 bytes; −3.3 and −4 are −1.1 and −1 a character, −0.55 and −1 a byte."""
    rows = [{"query": "Question: Which?", "choices": ["ééé", "eeee"], "gold": 1}]
    assert _values(tmp_path, rows, [-3.3, -4.0]) == {"acc": 0.0, "acc_norm": 1.0}


def test_likelihoods_that_an_answer_has_anyway(tmp_path: Path) -> None:
    """−2 and −4 after the question, −1 and −5 after `Answer:`: the second gains 1, the first loses 1 (spec 9.1)."""
    rows = [{"query": "Question: Which?", "choices": ["no", "yes"], "gold": 1}]
    values = _values(tmp_path, rows, [-2.0, -4.0, -1.0, -5.0], normalisation="answer")
    assert values == {"acc": 0.0, "acc_norm": 0.0, "acc_answer": 1.0}


def _values(folder: Path, rows: list[Any], logprobs: list[float], **changes: Any) -> dict[str, float]:
    """The values of an item whose queries have these answers."""
    part, items = asked(arc_task(**changes), folder, rows)
    queries = [query for some in items[0].queries for query in some]
    found = {key(query): {"logprob": value, "greedy": False} for query, value in zip(queries, logprobs, strict=True)}
    (values,) = part.values(items, AnswerStore(folder, found))
    return values


def test_bos_once(pieces: EngineLM, bytes_: EngineLM) -> None:
    """Pitfall 7: also before a text that begins with it; and none where the tokenizer adds none."""
    bos = pieces.model.tokenizer.bos_id
    for context in ("on it", "<s>on it"):
        query = pieces.likelihood(context, " to")
        assert (query.context[0], query.context.count(cast("int", bos))) == (bos, 1)
        assert query == pieces.likelihood("on it", " to")
        assert bos not in query.continuation
    assert pieces.tok_encode("on it", add_special_tokens=False)[0] != bos
    assert bytes_.model.tokenizer.bos_id not in bytes_.likelihood("on it", " to").context
    assert bytes_.likelihood("", "to").context == (bytes_.model.tokenizer.bos_id,)
    chat = bytes_.apply_chat_template([{"role": "user", "content": "to"}])
    assert bytes_.generation(chat, {}).prompt == tuple(bytes_.model.render("to"))


def test_likelihoods_never_use_the_chat_template(tmp_path: Path, bytes_: EngineLM) -> None:
    """Pitfall 8."""
    plain, chat = (asked(arc_task(), tmp_path, QUESTIONS, lm=bytes_, chat=chat)[1] for chat in (False, True))
    assert [item.queries for item in plain] == [item.queries for item in chat]


def answering(**changes: Any) -> EvaluationTask:
    """A task to be answered in words."""
    table = {"output": "generate_until", "scorer": "direct", "metric": "exact_match", "normalisation": "none"}
    return arc_task(**(table | {"choices": "", "target": "{{answerKey}}", "max_tokens": 4} | changes))


def test_examples_of_a_chat_are_one_message(tmp_path: Path, bytes_: EngineLM) -> None:
    """Pitfall 8: lm-eval 0.4.13 makes turns of them, which lowers scores."""
    _, items = asked(answering(shots=2), tmp_path, QUESTIONS, lm=bytes_, chat=True)
    _, plain = asked(answering(shots=2), tmp_path, QUESTIONS, lm=bytes_)
    for item, same in zip(items, plain, strict=True):
        query = item.queries[0][0]
        assert isinstance(query, GenerationQuery)
        assert query.prompt == tuple(bytes_.model.render(same.prompt))
        assert query.stop_tokens
        assert json.loads(item.question) == [{"role": "user", "content": same.prompt}]
        assert same.question == same.prompt


def test_an_item_is_not_among_its_own_examples(tmp_path: Path) -> None:
    """Pitfall 9: nor a row that repeats it."""
    rows = questions(4)
    _, items = asked(arc_task(shots=3), tmp_path, [*rows, rows[0]])
    for item in items:
        assert item.prompt.count(item.row["question"]) == 1


def test_examples_are_seeded(tmp_path: Path) -> None:
    """Pitfalls 10 and 11: the same every time, and others with another seed."""
    task = arc_task(shots=2)
    first, second, other = (
        [item.prompt for item in asked(task, tmp_path, questions(12), seed=seed)[1]] for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other
    assert len({prompt.partition("\n")[0] for prompt in first}) > 1  # not the same examples for every item


@pytest.mark.parametrize("protocol", ["paper", "harness"])
def test_examples_do_not_move_with_the_batch(tmp_path: Path, protocol: str) -> None:
    """Pitfalls 11 and 16: an item is asked in the same words with or without others."""
    task = arc_task(shots=2, harness_shots=2)
    _, every = asked(task, tmp_path, questions(12), protocol=protocol)
    _, some = asked(task, tmp_path, questions(12), protocol=protocol, wanted={"3", "11"})
    assert [item.prompt for item in some] == [every[3].prompt, every[11].prompt]


def test_prompts_of_the_harness_are_its_own(tmp_path: Path) -> None:
    """All that lm-eval itself asks over these rows, with examples drawn as it draws them."""
    task = arc_task(harness_shots=2)
    part, items = asked(task, tmp_path, questions(12), protocol="harness")
    part.inner.set_fewshot_seed(1234)
    part.inner.build_all_requests()
    ours = [instance.args for item in items for instance in item.instances]
    assert ours == [instance.args for instance in part.inner.instances]


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    """Never cut from the left, as elsewhere."""
    lm = by_hand(context=64)
    _, items = asked(
        arc_task(), tmp_path, [*questions(1), {**questions(1)[0], "query": f"Question: {'x' * 80}"}], lm=lm
    )
    assert [item.refused for item in items] == [
        None,
        f"prompt of {10 + 80 + 8 + 5} tokens, and the context is 64",  # Question: , x, Answer:, this
    ]
    with pytest.raises(ContextError, match="prompt of 70 tokens, and the context is 64"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a" * 69, "b"), 0)])


def test_rolling_windows() -> None:
    """Each token of a text longer than the context is predicted once, by hand, after what the window holds."""
    lm = by_hand(context=32)
    text = "".join(chr(97 + i % 26) for i in range(70))
    windows = lm.windows(text)
    assert bytes(token for window in windows for token in window.continuation) == text.encode()
    assert all(window.needed <= 32 for window in windows)
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    expected = sum(
        log_softmax(logits([*w.context, *w.continuation[:i]]).astype(float))[token]
        for w in windows
        for i, token in enumerate(w.continuation)
    )
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_stop_ends_an_answer_before_it() -> None:
    lm = by_hand()
    (whole,) = lm.generate_until([Instance("generate_until", {}, ("ab", {"max_gen_toks": 12}), 0)])
    stop = whole[5]
    settings = {"max_gen_toks": 12, "until": [stop]}
    assert lm.generate_until([Instance("generate_until", {}, ("ab", settings), 0)]) == [whole[: whole.index(stop)]]


def test_samples_differ_and_greedy_answers_do_not() -> None:
    lm = by_hand()
    drawn = [lm.generation("ab", {"do_sample": True, "temperature": 0.8}, sample=i, seed=3) for i in range(2)]
    greedy = [lm.generation("ab", {}, sample=i, seed=i) for i in range(2)]
    assert key(drawn[0]) != key(drawn[1])
    assert key(greedy[0]) == key(greedy[1])
    assert key(replace(greedy[0], max_tokens=3)) != key(greedy[0])
    assert key(LikelihoodQuery((1,), (2, 3))) != key(LikelihoodQuery((1, 2), (3,)))


def test_answers_come_in_the_order_of_their_queries() -> None:
    """Also where a later one is ready first, so that the stored bytes do not depend on what ran beside what."""
    lm = by_hand()
    queries = [lm.generation(text, {"max_gen_toks": most}) for text, most in (("ab", 9), ("cd", 2), ("ef", 5))]
    assert [answer["tokens"] for answer in answers(lm.model.engine, queries, 3)] == [9, 2, 5]
