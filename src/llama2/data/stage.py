"""A step of the pipeline, as datatrove runs them, which counts what happens to each source's documents."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep


class Stage(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """A step whose counts end up among datatrove's statistics, which it merges over tasks and machines."""

    type = "llama2"

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def count(self, source: str, what: str, value: float = 1) -> None:
        """Add to a figure of a source."""
        self._counts[f"{source}/{what}"] += value  # type: ignore[assignment]

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        """This task's documents for the next step."""
        raise NotImplementedError

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """As datatrove calls it."""
        yield from self.documents(data or iter(()), rank, world_size)
        for key, value in self._counts.items():
            self.stat_update(key, value=value)


def counts(logs: Path) -> dict[str, Counter[str]]:
    """The figures of one stage of the pipeline, added up over its tasks: source → what → value."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for file in sorted((logs / "stats").glob("*.json")):
        for step in json.loads(file.read_bytes()):
            for key, value in step["stats"].items():
                source, slash, what = key.partition("/")
                if slash:
                    total[source][what] += value["total"] if isinstance(value, dict) else value
    return total


def fraction(key: str, purpose: str) -> float:
    """A number in [0, 1) that is random but always the same for a key and a purpose."""
    digest = hashlib.blake2b(f"{purpose}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
