"""Z of a task's subsets against the paper's table, and items that are planted in a corpus."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import corpora
from evaluations import answered, arc_task, tiny_model, write_rows
from llama2.data import shards
from llama2.errors import DataError
from llama2.evaluate import contaminated, table
from llama2.evaluate.contaminated import contamination, declared, subset_scores, z
from llama2.evaluate.run import EvaluationSettings, evaluate
from texts import train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece vocabulary of 400 tokens."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(400, user_defined=()))
    return path


@pytest.mark.parametrize(
    ("mean", "n", "subset", "printed"),
    [
        (82.5, 7391, 80.0, -5.66),  # HellaSwag 70B, clean: the paper prints -5.73, of means that it did not round
        (82.5, 9194, 81.6, -2.27),  # not dirty
        (82.5, 848, 92.2, 7.43),  # dirty
        (65.3, 520, 85.8, 9.82),  # MMLU humanities 70B, dirty
        (68.9, 1536, 78.2, 7.87),  # MMLU 70B, dirty
    ],
)
def test_z_is_the_papers(mean: float, n: int, subset: float, printed: float) -> None:
    deviation = math.sqrt(mean * (100 - mean))
    found = z(subset, n, mean, deviation)
    assert found == pytest.approx(printed, abs=0.005)


def test_all_four_subsets_must_differ_each_in_its_direction() -> None:
    def scores(**values: float | None) -> dict[str, dict[str, float | None]]:
        named = {"clean": -5.73, "not_clean": 9.56, "not_dirty": -2.27, "dirty": 7.42} | values
        return {name.replace("_", " "): {"z": value} for name, value in named.items()}

    assert declared(scores())  # HellaSwag 70B
    assert not declared(scores(not_dirty=-2.0))
    assert not declared(scores(clean=5.73))
    assert not declared(scores(dirty=None))


def test_subsets_of_items() -> None:
    # 8 clean items of which 2 are right, 2 of which both are, one half and one wholly so: μ = 0.4, σ² = 0.24
    values = [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    found = subset_scores(np.array([0.1] * 8 + [0.5, 0.9]), values)
    assert {name: (part["n"], part["mean"]) for name, part in found.items()} == {
        "clean": (8, 0.25), "not clean": (2, 1.0), "not dirty": (9, 3 / 9), "dirty": (1, 1.0),
    }  # fmt: skip
    assert found["clean"]["z"] == pytest.approx(-0.15 / math.sqrt(0.24 / 8))
    assert found["not clean"]["share"] == pytest.approx(0.7)
    alike = subset_scores(np.zeros(3), [1, 1, 1])
    assert (alike["clean"]["z"], alike["dirty"]) == (None, {"share": None, "n": 0, "mean": None, "z": None})


def test_planted_items_are_found_at_each_length(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every document is compared as a whole, wherever the corpus is read in parts."""
    monkeypatch.setattr(contaminated, "_CHUNK", 64)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    random = np.random.default_rng(0)
    texts = ["".join(random.choice([*"abcdefghijklmnopqrstuvwxyz "], 120)) for _ in range(7)]
    ids = [encoder.encode(text) for text in texts]
    assert 100 < len(ids[1]) < 125
    quarter = ids[1][:25]
    documents = [[1, *ids[0], 2], [1, *quarter, 2], [1, *ids[6], 2]]
    corpora.write(corpus, tokenizer, encoder.vocab_size(), {"train": [documents[:2], documents[2:]]})
    seen: list[tuple[int, int]] = []
    found = contamination(
        {"a": (texts[:4], [1, 1, 0, 0]), "b": (texts[4:6], [1, 0])}, corpus, lambda *at: seen.append(at)
    )
    assert found["a"]["lengths"]["10"]["dirty"]["n"] == 1
    assert found["a"]["lengths"]["10"]["not clean"]["n"] == 2
    assert found["a"]["lengths"]["10"]["clean"]["mean"] == 0
    assert found["b"]["lengths"]["10"]["clean"]["n"] == 2
    longer = [found["a"]["lengths"][str(n)]["not clean"]["n"] for n in (10, 20, 30, 40, 50)]
    assert longer == [sum(len(run) >= n for run in (ids[0], quarter)) for n in (10, 20, 30, 40, 50)]
    assert found["a"]["length"] is None  # four items show nothing
    assert seen[-1][0] == seen[-1][1] == sum(map(len, documents))


def test_a_run_looks_for_its_items_in_a_corpus(tokenizer: Path, tmp_path: Path) -> None:
    right = "in the old house behind the mill"
    choices = [right, "by the long river where we swim", "at the busy market far away", "on the hill, under a tree"]
    rows = [{"query": f"Question: Where is the {n}?", "choices": choices, "gold": 0} for n in ("cat", "dog", "cow")]
    write_rows(tmp_path / "sets/mine.jsonl", rows)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    planted = encoder.encode(f"Question: Where is the dog?\nAnswer: {right}")
    corpora.write(corpus, tokenizer, encoder.vocab_size(), {"train": [[[1, *planted, 2]]]})
    with tiny_model(tmp_path) as model:
        settings = EvaluationSettings(data=tmp_path / "sets", corpus=corpus)
        record = evaluate(model, [arc_task()], tmp_path / "run", settings)
    found = record["tasks"]["mine"]["contamination"]
    assert found["corpus"] == shards.sha256(corpus / "manifest.json")
    assert found["lengths"]["10"]["dirty"]["n"] >= 1
    assert json.loads((tmp_path / "run/record.json").read_text())["tasks"]["mine"]["contamination"] == found
    assert any(line.startswith("items in the corpus") for line in table.lines(record))


def test_what_was_not_judged_is_not_looked_for(tokenizer: Path, tmp_path: Path) -> None:
    """Of four prompts one is in the corpus, one by half, and one is not; the fourth has an empty answer."""
    random = np.random.default_rng(0)
    prompts = ["".join(random.choice([*"abcdefghijklmnopqrstuvwxyz "], 120)) for _ in range(4)]
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids = [encoder.encode(prompt) for prompt in prompts]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    documents = [[1, *ids[0], 2], [1, *ids[1][: len(ids[1]) // 2], 2], [1, *ids[3], 2]]
    corpora.write(corpus, tokenizer, encoder.vocab_size(), {"train": [documents]})
    files = {"x.json": json.dumps([{"mutated_prompt": prompt} for prompt in prompts]).encode()}
    answers = ["Sure! Here are three steps.", "Sure! Here are three steps.", "I cannot help you with that.", ""]
    record = answered("cyber_frr", files, answers, tmp_path, corpus=corpus)
    found = record["tasks"]["cyber_frr"]["contamination"]["lengths"]["10"]
    assert {name: (part["n"], part["mean"]) for name, part in found.items()} == {
        "clean": (1, 1.0), "not clean": (2, 0.0), "not dirty": (2, 0.5), "dirty": (1, 0.0),
    }  # fmt: skip


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a corpus"):
        contamination({}, tmp_path)
