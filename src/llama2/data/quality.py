"""Rules by which a text is not prose worth training on: those of Gopher (Rae et al. 2021, A.1.1, table A1)."""

from __future__ import annotations

import re

import numpy as np

from llama2.data.words import Hashes, Words

_STOP_WORDS = Words("the be to of and that have with").hashes
#: The most of a text's characters that its most frequent n-gram of words may make up.
_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
#: The most that all n-grams which were there before may make up.
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def fault(text: str, words: Words) -> str | None:
    """The first rule that a text breaks, or None."""
    count = len(words)
    if count < 50:
        return "fewer than 50 words"
    if count > 100_000:
        return "more than 100,000 words"
    if not 3 <= words.lengths.mean() <= 10:
        return "mean word length not from 3 to 10"
    if max(text.count("#"), text.count("...") + text.count("…")) > 0.1 * count:
        return "more than one # or … to ten words"
    if words.alphabetic.mean() < 0.8:
        return "less than 80 % of words with a letter"
    if len(np.intersect1d(words.hashes, _STOP_WORDS)) < 2:
        return "fewer than 2 of the commonest words"
    lines = text.split("\n")
    if sum(line.lstrip().startswith(("•", "-", "*")) for line in lines) > 0.9 * len(lines):
        return "more than 90 % of lines with a bullet"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "more than 30 % of lines with an ellipsis"
    return _repetition(text, words)


def _repetition(text: str, words: Words) -> str | None:
    for what, parts in (("lines", re.split(r"\n+", text.strip())), ("paragraphs", re.split(r"\n{2,}", text.strip()))):
        seen: set[str] = set()
        again = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
        if len(again) > 0.3 * len(parts) or sum(map(len, again)) > 0.2 * len(text):
            return f"repeated {what}"
    for n, most in _TOP.items():
        if _top(words, n) > most * len(text):
            return f"one {n}-gram again and again"
    repeated = _repeated(words, 5)
    if repeated > min(_REPEATED.values()) * len(text):  # longer ones make up less
        for n, most in _REPEATED.items():
            if (repeated if n == 5 else _repeated(words, n)) > most * len(text):
                return f"repeated {n}-grams"
    return None


def _top(words: Words, n: int) -> float:
    """Characters that the most frequent n-gram makes up; 0 when none is there twice."""
    grams = words.grams(n)
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    best = counts.argmax()
    return float(counts[best] * words.lengths[first[best] : first[best] + n].sum()) if counts[best] > 1 else 0.0


def _repeated(words: Words, n: int) -> float:
    """Characters in n-grams that were there before, each counted once."""
    grams: Hashes = words.grams(n)
    again = np.ones(len(grams), bool)
    again[np.unique(grams, return_index=True)[1]] = False
    covered = np.zeros(len(words) + 1, np.int64)
    starts = np.flatnonzero(again)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + n, -1)
    return float(words.lengths[np.cumsum(covered)[:-1] > 0].sum())
