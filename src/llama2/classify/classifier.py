"""A linear classifier of texts: logistic regression over n-grams, in one file.

K classes · F features
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from llama2 import files
from llama2.classify.features import NGrams, Phrases, normalise, weighted, words
from llama2.errors import ClassifierError

WEIGHTS = Path(__file__).parent / "weights"
#: The classifiers that come with the package.
NAMES = ("refusal", "toxicity", "truth", "information")

#: Below this share of known words, a text is of a language or kind that the classifier was not trained on.
_KNOWN = 0.3
#: Words from which on that is decided; a shorter text may have a name or two alone.
_FEW = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a classifier says of a text: the likeliest label and all probabilities; or why it cannot say."""

    label: str | None
    probabilities: dict[str, float]
    reason: str | None = None


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    `vocabularies` has, for each of `ngrams`, every n-gram's column and its inverse document frequency. The columns of
    `phrases` come first, then those of `given` numbers. `temperature` divides the logits, so that probabilities are as
    often right as they say. `agreement` is with labels of texts that were not trained on: n, mean, and a 95 % interval.
    """

    name: str
    labels: tuple[str, ...]
    ngrams: tuple[NGrams, ...]
    phrases: Phrases
    vocabularies: tuple[dict[str, tuple[int, float]], ...]
    weights: NDArray[np.float32]  # (F, K)
    bias: NDArray[np.float32]  # (K,)
    temperature: float
    words: frozenset[str]  # of the texts it was trained on
    given: int = 0  # numbers that come with each text
    agreement: Mapping[str, float] = field(default_factory=dict)

    def logits(self, text: str, given: Sequence[float] = ()) -> NDArray[np.float64]:
        """Logits (K,) of a text, before softmax, divided by the temperature."""
        return self._logits(normalise(text), given)

    def _logits(self, text: str, given: Sequence[float]) -> NDArray[np.float64]:
        """The logits of a normalised text."""
        found = self.bias.astype(np.float64)
        if dense := [*self.phrases.of(text), *given]:
            found += np.asarray(dense) @ self.weights[: len(dense)]
        for kind, vocabulary in zip(self.ngrams, self.vocabularies, strict=True):
            columns, values = weighted(kind.of(text), vocabulary)
            found += np.asarray(values, np.float64) @ self.weights[np.asarray(columns, np.int64)]
        return np.asarray(found / self.temperature)

    def probabilities(
        self, texts: Sequence[str], given: Sequence[Sequence[float]] | None = None
    ) -> NDArray[np.float64]:
        """Probabilities (n, K) of n texts, with the numbers given to each, known words or not."""
        numbers = given or [()] * len(texts)
        logits = np.array([self.logits(*each) for each in zip(texts, numbers, strict=True)])
        return softmax(logits.reshape(len(texts), len(self.labels)))

    def judge(self, text: str, given: Sequence[float] = ()) -> Verdict:
        """The label of a text; none for an empty one, and for one in words that the classifier does not know."""
        text = normalise(text)
        found = words(text)
        if not found:
            return Verdict(None, {}, "the text has no words")
        known = sum(word in self.words for word in found) / len(found)
        if len(found) >= _FEW and known < _KNOWN:
            return Verdict(None, {}, f"{known:.0%} of its words are known; it was trained on English")
        (row,) = softmax(self._logits(text, given)[None]).tolist()
        shares = dict(zip(self.labels, row, strict=True))
        return Verdict(max(shares, key=lambda label: shares[label]), shares)

    def save(self, path: Path) -> None:
        """Write it as one file of arrays. Raises ClassifierError when the system refuses."""
        about = {
            "name": self.name,
            "labels": self.labels,
            "ngrams": [asdict(each) for each in self.ngrams],
            "phrases": self.phrases.patterns,
            "temperature": self.temperature,
            "given": self.given,
            "agreement": dict(self.agreement),
        }
        arrays: dict[str, Any] = {"about": _bytes(json.dumps(about)), "words": _bytes("\n".join(sorted(self.words)))}
        arrays |= {"weights": self.weights.astype(np.float16), "bias": self.bias}
        for index, vocabulary in enumerate(self.vocabularies):
            arrays[f"ngrams{index}"] = _bytes("\n".join(vocabulary))
            arrays[f"idf{index}"] = np.array([idf for _, idf in vocabulary.values()], np.float32)
        with files.create(path, error=ClassifierError) as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def open(cls, path: Path) -> Classifier:
        """Read what `save` wrote. Raises ClassifierError for a file that is not a classifier's."""
        try:
            with files.open_file(path, error=ClassifierError) as file, np.load(file, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                phrases = Phrases(tuple(about["phrases"]))
                ngrams = tuple(NGrams(**each) for each in about["ngrams"])
                vocabularies, start = [], len(phrases) + about["given"]
                for index in range(len(ngrams)):
                    grams, idf = arrays[f"ngrams{index}"].tobytes().decode().split("\n"), arrays[f"idf{index}"].tolist()
                    columns = range(start, start + len(grams))
                    vocabularies.append(dict(zip(grams, zip(columns, idf, strict=True), strict=True)))
                    start += len(grams)
                return cls(
                    name=about["name"],
                    labels=tuple(about["labels"]),
                    ngrams=ngrams,
                    phrases=phrases,
                    vocabularies=tuple(vocabularies),
                    weights=arrays["weights"].astype(np.float32).reshape(start, len(about["labels"])),
                    bias=arrays["bias"].astype(np.float32),
                    temperature=float(about["temperature"]),
                    given=about["given"],
                    agreement=about["agreement"],
                    words=frozenset(arrays["words"].tobytes().decode().split("\n")),
                )
        except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
            raise ClassifierError(
                f"{path}: is not a classifier ({error}); train one with `llama2 classify train`"
            ) from None


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities (n, K) from logits (n, K)."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


@cache
def bundled(name: str) -> Classifier:
    """A classifier that comes with the package, by one of NAMES. Raises ClassifierError for another name."""
    if name not in NAMES:
        raise ClassifierError(f"{name}: is not a classifier; there are {', '.join(NAMES)}")
    return Classifier.open(WEIGHTS / f"{name}.npz")
