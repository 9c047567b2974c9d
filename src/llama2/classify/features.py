"""What a classifier sees of a text: words, n-grams, and phrases by their place."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

#: A word: letters and digits, with an apostrophe inside.
_WORD = re.compile(r"\w+(?:'\w+)?")
_SENTENCE = re.compile(r"(?<=[.!?])\s|\n")
#: Characters of a text's beginning, which phrases are looked for in.
_HEAD = 300


@dataclass(frozen=True, slots=True)
class NGrams:
    """Runs of `low` to `high` words, or of characters inside a word with a space around it.

    With `head`, they are of so many characters of the text's beginning alone.
    """

    unit: Literal["words", "characters"]
    low: int
    high: int
    head: int = 0

    def of(self, text: str) -> Iterator[str]:
        """The n-grams of a normalised text, in order, with repetitions."""
        found = words(text[: self.head] if self.head else text)
        if self.unit == "words":
            for n in range(self.low, self.high + 1):
                for start in range(len(found) - n + 1):
                    yield " ".join(found[start : start + n])
            return
        for word in found:
            padded = f" {word} "
            for n in range(self.low, self.high + 1):
                for start in range(max(1, len(padded) - n + 1)):
                    yield padded[start : start + n]


@dataclass(frozen=True)
class Phrases:
    """Regular expressions, each looked for in the first sentence, the first two, the beginning, and all of a text."""

    patterns: tuple[str, ...]

    @cached_property
    def _compiled(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern) for pattern in self.patterns]

    def __len__(self) -> int:
        return 4 * len(self.patterns) + (3 if self.patterns else 0)

    def of(self, text: str) -> list[float]:
        """Zeros and ones of a normalised text, then its length in three ways; nothing without patterns."""
        if not self.patterns:
            return []
        sentences = _SENTENCE.split(text)
        places = (sentences[0], " ".join(sentences[:2]), text[:_HEAD], text)
        found = [float(bool(pattern.search(place))) for pattern in self._compiled for place in places]
        count = len(text.split())
        return [*found, math.log1p(count) / 6, float(count < 60), float(count < 120)]


def normalise(text: str) -> str:
    """Lower case, one form of each character and apostrophe, and no invisible ones, which would hide a word."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").lower()
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cf", "Cc", "Mn")).strip()


def words(text: str) -> list[str]:
    """The words of a normalised text."""
    return _WORD.findall(text)


def weighted(grams: Iterable[str], idf: dict[str, tuple[int, float]]) -> tuple[Sequence[int], Sequence[float]]:
    """Columns and values of a text's n-grams that are known: (1 + ln count) × idf, scaled to length 1."""
    counts = Counter(gram for gram in grams if gram in idf)
    columns = [idf[gram][0] for gram in counts]
    values = [(1 + math.log(count)) * idf[gram][1] for gram, count in counts.items()]
    length = math.sqrt(math.fsum(value * value for value in values)) or 1.0
    return columns, [value / length for value in values]
