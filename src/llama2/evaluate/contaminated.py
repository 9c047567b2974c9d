"""Whether a task's items are in a training corpus, and whether that moved the score, by the paper's method (A.6).

An item is the text that the model was asked, without examples. Its tokens are contaminated if they lie in a run of at
least L tokens that item and corpus share (`data/overlap.py`). For each of the four subsets of items,
Z_n = (mean of the subset - mean of all) / (σ / √n), with σ over all items. A score counts as contaminated where all
four have |Z_n| > 2: clean items score lower, dirty ones higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.data.overlap import Coverage, Ids, Matcher, subsets
from llama2.data.shards import Shards

#: Lengths of the shortest run that counts, in tokens (A.6).
LENGTHS = (10, 20, 30, 40, 50)
#: The direction of each subset's Z where the corpus helped.
_DIRECTIONS = {"clean": -1, "not clean": 1, "not dirty": -1, "dirty": 1}
#: |Z| beyond which a subset differs.
_DIFFERS = 2.0
#: Tokens of the corpus whose documents are looked up at once.
_CHUNK = 1 << 20


def contamination(
    items: Mapping[str, tuple[Sequence[str], Sequence[float]]],
    corpus: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """The contamination of each task by a built corpus, of whose items there are the texts and the scores.

    Texts are encoded by the corpus's own tokenizer. `progress` gets tokens of the corpus that were read, and all.
    Raises DataError for what is not a corpus, or is damaged.
    """
    shards = Shards.open(corpus, "train")
    tokenizer = shards.load_tokenizer()
    samples = [np.array(tokenizer.encode(text), np.int64) for texts, _ in items.values() for text in texts]
    coverages = covered(samples, shards, progress)
    found = {}
    first = 0
    for name, (texts, values) in items.items():
        part = slice(first, first + len(texts))
        first += len(texts)
        by_length = {n: subset_scores(coverages[n].shares()[part], values) for n in LENGTHS}
        found[name] = {
            "corpus": shards.sha256,
            "length": max((n for n in LENGTHS if declared(by_length[n])), default=None),
            "lengths": {str(n): by_length[n] for n in LENGTHS},
        }
    return found


def covered(samples: Sequence[Ids], shards: Shards, progress: Callable[[int, int], None]) -> dict[int, Coverage]:
    """Which tokens of samples lie in runs of at least each length, from one pass over a corpus."""
    coverages = {length: Coverage(samples) for length in LENGTHS}
    matcher = Matcher(samples, length=LENGTHS[0])
    for document in _documents(shards, progress):
        for run in matcher.runs(document):
            for length in LENGTHS:
                if run.length >= length:
                    coverages[length].add(run)
    return coverages


def _documents(shards: Shards, progress: Callable[[int, int], None]) -> Iterator[Ids]:
    begun: int | None = None
    for start in range(0, shards.tokens, _CHUNK):
        progress(start, shards.tokens)
        for at in shards.starts(start, min(start + _CHUNK, shards.tokens)).tolist():
            if begun is not None:
                yield shards.read(begun, at)
            begun = at
    if begun is not None:
        yield shards.read(begun, shards.tokens)
    progress(shards.tokens, shards.tokens)


def subset_scores(shares: NDArray[np.float64], values: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The four subsets of items by contaminated share: average share, number, mean score, and Z."""
    x = np.asarray(values, np.float64)
    mean, deviation = float(x.mean()), float(x.std())
    return {
        name: {
            "share": float(shares[chosen].mean()) if chosen.any() else None,
            "n": int(chosen.sum()),
            "mean": float(x[chosen].mean()) if chosen.any() else None,
            "z": z(float(x[chosen].mean()), int(chosen.sum()), mean, deviation) if chosen.any() else None,
        }
        for name, chosen in subsets(shares).items()
    }


def z(subset: float, n: int, mean: float, deviation: float) -> float | None:
    """Z_n of a subset's mean over `n` items; None where all items have one score, so that none can differ."""
    return (subset - mean) / (deviation / math.sqrt(n)) if deviation else None


def declared(scores: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a task counts as contaminated: all four |Z| are above 2, each in its direction."""
    return all(
        (found := scores[name]["z"]) is not None and found * direction > _DIFFERS
        for name, direction in _DIRECTIONS.items()
    )
