"""Figures of bench/embeddings.py, worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_recall_and_mean_reciprocal_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import embeddings

    lines = [("p one", "q one?"), ("p two", "q two?"), ("p one", "again?"), ("p three\nof two lines", "q three?")]
    path = tmp_path / "boolq.jsonl"
    path.write_text("".join(json.dumps({"query": f"Passage: {p}\nQuestion: {q}"}) + "\n" for p, q in lines))
    questions = ["q one?", "q two?", "q three?"]
    assert embeddings.pairs(path, 3) == (questions, ["p one", "p two", "p three\nof two lines"])
    assert embeddings.pairs(path, 2)[0] == questions[:2]

    # Ranks 1, 2 (the first passage is nearer) and 3 (all are as near: a tie counts against it).
    asked = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    held = np.array([[1, 0], [0.6, 0.8], [0, 0]], np.float32)
    found = embeddings.scores(asked, held)
    assert found["recall@1"] == pytest.approx(1 / 3)
    assert found["recall@5"] == found["recall@10"] == 1
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
