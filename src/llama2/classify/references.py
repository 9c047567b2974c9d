"""How an answer compares with answers that are known to be true, and with others that are known to be false."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llama2.classify.features import normalise, words

#: How many features `compare` gives.
COUNT = 10


def compare(question: str, answer: str, true: Sequence[str], false: Sequence[str]) -> tuple[float, ...]:
    """Features of an answer to a question: its overlap with the nearest true and false answers, and its length.

    Overlap is F1 of words: once of all, and once of those that are not in the question, which alone distinguish
    answers. `true` and `false` are not empty.
    """
    asked = {*words(normalise(question))}
    said = words(normalise(answer))
    near = [_nearest(said, [words(normalise(each)) for each in some], asked) for some in (true, false)]
    (all_true, new_true, mean_true), (all_false, new_false, mean_false) = near
    return (
        *(all_true, all_false, all_true - all_false),
        *(new_true, new_false, new_true - new_false, mean_true - mean_false),
        *(len(said) / 20, float(all_true > all_false), float(new_true > new_false)),
    )


def _nearest(said: list[str], references: Sequence[list[str]], asked: set[str]) -> tuple[float, float, float]:
    """The largest overlap of all words, and largest and mean overlap of words that are not in the question."""
    new = [word for word in said if word not in asked]
    overlaps = [overlap(new, [word for word in each if word not in asked]) for each in references]
    return max(overlap(said, each) for each in references), max(overlaps), sum(overlaps) / len(overlaps)


def overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of two lists of words; 0 where one is empty."""
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b)) if common else 0.0
