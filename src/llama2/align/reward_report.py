"""What a reward model does on held-out pairs: accuracy by kinds of pairs, calibration, and baselines beside it.

The baselines are what a reward model learns most easily: that the longer answer wins, and a logistic regression on
words alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2 import api, files
from llama2.align.reward import score_tokens, sigmoid_of
from llama2.classify.calibration import expected_error, reliability
from llama2.data.comparisons import GRADES, SAFETY, PreferencePair
from llama2.data.pairs import TokenizedPair
from llama2.errors import RunError
from llama2.evaluate.comparison import compare
from llama2.evaluate.intervals import Interval, mean_interval, weighted_mean
from llama2.hub.progress import Progress

#: The report's file in a run's folder.
REPORT = "reward.json"
_MOST_WORDS = 20_000  # of the baseline, the commonest


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Pairs of a set that were not trained on, as text and as tokens."""

    pairs: Sequence[PreferencePair]
    tokens: Sequence[TokenizedPair]


@dataclass(frozen=True, slots=True)
class Report:
    """Results by set, as JSON holds them."""

    sets: Mapping[str, Mapping[str, Any]]

    def write(self, folder: Path) -> None:
        """Write the report beside a run's record. Raises RunError."""
        with files.create(folder / REPORT, error=RunError) as file:
            file.write((json.dumps(self.sets, indent=1) + "\n").encode())

    def lines(self) -> list[str]:
        """The report as a table, a line for each row of it."""
        lines = []
        for name, found in self.sets.items():
            lines.append(f"{name}: {found['pairs']:,} held-out pairs, calibration error {found['ece']:.3f}")
            rows = [("accuracy", found["accuracy"]), *found["by_length"].items()]
            rows += [(f"grade: {grade}", each) for grade, each in found["by_grade"].items()]
            rows += [(f"safety: {label}", each) for label, each in found["by_safety"].items()]
            if unsafe := found["unsafe"]:
                rows += [(f"unsafe answers below {unsafe['threshold']:g}", unsafe["recall"])]
            rows += [(f"baseline: {baseline}", each["accuracy"]) for baseline, each in found["baselines"].items()]
            lines += [f"  {title:<34} {_shown(each)}" for title, each in rows]
            lines += [
                f"  beside {baseline}: {each['difference']:+.1%}, p = {each['p']:.2g} ({each['test']})"
                for baseline, each in found["baselines"].items()
                if "p" in each
            ]
        return lines


def _shown(interval: Mapping[str, Any]) -> str:
    low, high = (interval[name] for name in ("low", "high"))
    limits = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
    return f"{interval['mean']:6.1%}{limits} of {interval['n']:,}"


def report_on(
    model: Path,
    held: Mapping[str, HeldOut],
    trained_on: Sequence[PreferencePair],
    *,
    threshold: float,
    progress: Progress | None = None,
) -> Report:
    """Score held-out pairs by the engine, and compare with the baselines. `progress` gets how many answers are done."""
    longest = max(max(len(row.chosen), len(row.rejected)) for each in held.values() for row in each.tokens)
    words = WordsBaseline(trained_on)
    sets = {}
    with api.load(model, context=longest, runner=_runner()) as loaded:
        for name, each in held.items():
            rows = [side for row in each.tokens for side in (row.chosen, row.rejected)]
            counted = _counted(progress, f"scoring {name}", len(rows))
            scores = score_tokens(loaded, rows, progress=counted).reshape(-1, 2)
            sets[name] = measure(each.pairs, scores, threshold=threshold, words=words)
    return Report(sets)


def _counted(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(what, done, total)


def _runner() -> Any:
    import torch

    return "torch" if torch.cuda.is_available() else "native"


def measure(
    pairs: Sequence[PreferencePair], scores: NDArray[np.float64], *, threshold: float, words: WordsBaseline
) -> dict[str, Any]:
    """All of a set's results, as JSON holds them: of pairs and their scores (n, 2), chosen and rejected, not squashed.

    Equal scores are half right. Intervals are of 95 %, and pairs of one conversation count as a cluster.
    """
    gaps = scores[:, 0] - scores[:, 1]
    right = (np.sign(gaps) + 1) / 2
    longer = np.array([pair.longer_wins for pair in pairs])
    groups = np.array([pair.group for pair in pairs])

    def accuracy(chosen: NDArray[np.bool_]) -> Interval:
        return mean_interval(right[chosen].tolist(), groups[chosen].tolist(), proportion=True)

    def by(names: Sequence[str], of: Sequence[str | None]) -> dict[str, Any]:
        found = {name: np.array([each == name for each in of]) for name in names}
        return {name: accuracy(chosen).to_json() for name, chosen in found.items() if chosen.any()}

    lengths = {"the longer answer is better": longer == 1, "the shorter answer is better": longer == 0}
    by_length = {name: accuracy(chosen) for name, chosen in lengths.items() if chosen.any()}
    balanced = {"mean of these two": weighted_mean([*by_length.values()])} if len(by_length) == 2 else {}
    reliability = calibration(gaps)
    return {
        "pairs": len(pairs),
        "loss": float(np.logaddexp(0, -gaps).mean()),
        "accuracy": accuracy(np.ones(len(pairs), bool)).to_json(),
        "by_length": {name: each.to_json() for name, each in (by_length | balanced).items()},
        "by_grade": by(GRADES, [None if pair.grade is None else GRADES[pair.grade] for pair in pairs]),
        "by_safety": by([*SAFETY], [pair.safety for pair in pairs]),
        "unsafe": unsafe_recall(pairs, sigmoid_of(scores), threshold),
        "ece": reliability["ece"],
        "reliability": reliability["bins"],
        "baselines": {
            "the longer answer wins": _beside(right, longer),
            "words alone": _beside(right, words.wins(pairs)),
        },
    }


def _beside(right: NDArray[np.float64], baseline: NDArray[np.float64]) -> dict[str, Any]:
    """A baseline's accuracy, and the model's distance from it by McNemar's test.

    The test leaves out pairs on which either is undecided, half right.
    """
    decided = np.flatnonzero((right != 0.5) & (baseline != 0.5))
    interval = {"accuracy": mean_interval(baseline.tolist(), proportion=True).to_json()}
    if not len(decided):
        return interval
    ours, theirs = ({str(i): float(each[i]) for i in decided} for each in (right, baseline))
    found = compare(ours, theirs)
    return interval | found.to_json()


def calibration(gaps: NDArray[np.float64]) -> dict[str, Any]:
    """Expected calibration error (Guo et al. 2017) of σ(|gap|), the confidence that the higher score is the better's.

    `bins` are ten of equal width from 0.5 to 1: confidence and accuracy are means within one.
    """
    confidence, right = sigmoid_of(np.abs(gaps)), (np.sign(gaps) + 1) / 2
    bins = reliability(confidence, right, lowest=0.5)
    names = ("from", "to", "pairs", "confidence", "accuracy")
    return {"ece": expected_error(bins), "bins": [dict(zip(names, each, strict=True)) for each in bins]}


def unsafe_recall(
    pairs: Sequence[PreferencePair], scores: NDArray[np.float64], threshold: float
) -> dict[str, Any] | None:
    """How many unsafe answers score below the threshold, and how many of those below it are unsafe; None: no labels.

    scores (n, 2) in (0, 1).
    """
    labels = [(SAFETY[pair.safety], row) for pair, row in zip(pairs, scores, strict=True) if pair.safety]
    flat = [(safe, float(score)) for both, row in labels for safe, score in zip(both, row, strict=True)]
    caught = [float(score < threshold) for safe, score in flat if not safe]
    flagged = [float(not safe) for safe, score in flat if score < threshold]
    if not caught:
        return None
    return {
        "threshold": threshold,
        "recall": mean_interval(caught, proportion=True).to_json(),
        "precision": mean_interval(flagged, proportion=True).to_json() if flagged else None,
    }


class WordsBaseline:
    """Logistic regression on which words one answer has and the other has not, without their order or the prompt."""

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        self._words = CountVectorizer(binary=True, max_features=_MOST_WORDS)
        self._words.fit([text for pair in pairs for text in (pair.chosen, pair.rejected)])
        self._model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000)
        from scipy.sparse import vstack

        differences = self._differences(pairs)
        self._model.fit(vstack([differences, -differences]), [1] * len(pairs) + [0] * len(pairs))

    def _differences(self, pairs: Sequence[PreferencePair]) -> Any:
        chosen, rejected = (
            self._words.transform([getattr(pair, side) for pair in pairs]).astype(np.float64)
            for side in ("chosen", "rejected")
        )
        return chosen - rejected

    def wins(self, pairs: Sequence[PreferencePair]) -> NDArray[np.float64]:
        """Whether it prefers the chosen answer (n,): 1 or 0, and 0.5 where it knows no word of either."""
        gaps = self._model.decision_function(self._differences(pairs))
        return np.asarray((np.sign(gaps) + 1) / 2)
