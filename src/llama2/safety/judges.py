"""What judges a text: the small classifiers, phrases, and the seam where a guard model comes in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llama2.classify.classifier import Classifier, bundled
from llama2.classify.features import normalise
from llama2.safety.policy import WINDOW, Policy

#: Messages with role and content, the last of which is judged.
Dialog = Sequence[Mapping[str, Any]]

_WORD = re.compile(r"\S+\s*")
_LETTERS = re.compile(r"\w*")
_LAST = re.compile(r"\w+$")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of our categories, from 0 to 1; or why there are none. What was not judged has no score."""

    by_category: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None  # why nothing was judged
    codes: tuple[str, ...] = ()  # of a guard, as it wrote them


class Judge(Protocol):
    """Judges the last message of a dialog; safe to call from several threads."""

    name: str
    judges: frozenset[str]  # the categories that it distinguishes
    windowed: bool  # whether a long text is judged in windows; else whole

    def judge(self, dialog: Dialog, start: int = 0) -> Scores:
        """Scores of the last message, of which the text from `start` on is the window."""
        ...


class Classifiers:
    """The classifier of toxicity that comes with the package. It judges `harassment` alone, and English alone."""

    name = "llama2-classifiers"
    judges = frozenset({"harassment"})
    windowed = True

    def __init__(self) -> None:
        self._toxicity: Classifier = bundled("toxicity")

    def judge(self, dialog: Dialog, start: int = 0) -> Scores:
        """The probability that the window is toxic. A window without words has nothing to judge."""
        verdict = self._toxicity.judge(dialog[-1]["content"][start:])
        if verdict.label is None:
            return Scores(reason=verdict.reason)
        return Scores({"harassment": verdict.probabilities["toxic"]})


class Phrases:
    """The phrases of a policy, found in any case, spacing and form of their characters, as whole words.

    A phrase that began before the window is found too.
    """

    def __init__(self, policy: Policy) -> None:
        self.judges = frozenset(name for name, rule in policy.categories.items() if rule.phrases)
        self._patterns = {
            name: re.compile("|".join(_pattern(phrase) for phrase in policy.categories[name].phrases))
            for name in self.judges
        }
        longest = max((len(p) for rule in policy.categories.values() for p in rule.phrases), default=0)
        self._reach = 4 * longest  # characters before a window in which a phrase may begin, its spaces wider

    def judge(self, dialog: Dialog, start: int = 0, *, whole: bool = True) -> Scores:
        """1 for each category with a phrase in the text, and 0 for the others that have phrases.

        Unless it is `whole`, its last word may go on, and is left for the next window.
        """
        text, begin = dialog[-1]["content"], max(0, start - self._reach)
        if begin and text[begin - 1].isalnum():
            begin += len(_LETTERS.match(text, begin)[0])  # type: ignore[index]  # it matches nothing too
        text = _spaced(text[begin:] if whole else _LAST.sub("", text[begin:]))
        return Scores({name: float(bool(pattern.search(text))) for name, pattern in self._patterns.items()})


def _spaced(text: str) -> str:
    return " ".join(normalise(text).split())


def _pattern(phrase: str) -> str:
    words = re.escape(_spaced(phrase))
    return rf"(?<!\w){words}(?!\w)" if words else "(?!)"


def windows(text: str, size: int = WINDOW) -> Iterator[tuple[int, int]]:
    """Where a whole text is cut into windows of `size` words, each with half of the one before: (start, end)."""
    words = [match.span() for match in _WORD.finditer(text)]
    step = size // 2
    for first in range(0, max(1, len(words) - step), step):
        part = words[first : first + size]
        yield (part[0][0] if part else 0), (part[-1][1] if part else len(text))
