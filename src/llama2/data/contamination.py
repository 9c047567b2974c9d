"""Which tokens of benchmark samples are in a corpus, by the paper's method (A.6, spec 9.9), and their removal.

A sample's token is contaminated if it lies in a run of at least `length` tokens that sample and corpus share. A run
begins with ten equal tokens, may differ in up to `skips` places after them, and ends with an equal token. A sample of
which less than 20 % is contaminated is clean, and one of which at least 80 % is, dirty.

Runs are found by hashes of their first ten tokens, and are then extended token by token.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from numpy.typing import NDArray

from llama2.data import compressed
from llama2.data.settings import Benchmark, BuildRecipe, Decontamination
from llama2.data.stage import Stage
from llama2.data.vocabulary import open_tokenizer
from llama2.data.words import grams, mix
from llama2.errors import DataError

Ids = NDArray[np.int64]

#: Tokens with which a run begins, all of them equal.
SEED = 10
#: Shares of a sample's tokens from which it is no longer clean, and from which it is dirty.
NOT_CLEAN, DIRTY = 0.2, 0.8

_LONGEST = 1 << 28  # bytes of a benchmark's file
_BITS = 26  # of a hash, by which most places of a document are ruled out at once; a byte for each value


@dataclass(frozen=True)
class SharedRun:
    """Tokens that a sample and a document share, but for some of them."""

    sample: int
    in_sample: int
    in_document: int
    length: int


class Matcher:
    """Finds runs of samples, each an array of token ids, in documents. `length` and `skips` as in the module's text."""

    def __init__(self, samples: Sequence[Ids], *, length: int = 10, skips: int = 4) -> None:
        self.samples = samples
        self.length = length
        self.skips = skips
        self._seed = min(SEED, length)
        keys = [_keys(sample, self._seed) for sample in samples]
        numbers = np.repeat(np.arange(len(keys)), [len(each) for each in keys])
        starts = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(each)) for each in keys)])
        flat = np.concatenate([np.zeros(0, np.uint64), *keys])
        order = np.argsort(flat, kind="stable")
        self._keys, self._numbers, self._starts = flat[order], numbers[order], starts[order]
        self._known = np.zeros(1 << _BITS, bool)
        self._known[_low(flat)] = True

    def runs(self, document: Ids) -> Iterator[SharedRun]:
        """The longest run that begins at each place of a sample and the document, but for ends of longer ones."""
        keys = _keys(document, self._seed)
        maybe = np.flatnonzero(self._known[_low(keys)])
        first, last = (np.searchsorted(self._keys, keys[maybe], side=side) for side in ("left", "right"))
        for i in np.flatnonzero(first < last).tolist():
            at = int(maybe[i])
            for place in range(int(first[i]), int(last[i])):
                number, start = int(self._numbers[place]), int(self._starts[place])
                sample = self.samples[number]
                if start and at and self._equal(sample, start - 1, document, at - 1):
                    continue  # the end of a run that begins one earlier
                length = self._extend(sample[start:], document[at:])
                if length >= self.length:
                    yield SharedRun(number, start, at, length)

    def _equal(self, sample: Ids, start: int, document: Ids, at: int) -> bool:
        return bool((sample[start : start + self._seed] == document[at : at + self._seed]).all())

    def _extend(self, sample: Ids, document: Ids) -> int:
        """Tokens of the run with which both begin; 0 where their seeds differ."""
        size = min(len(sample), len(document))
        wrong = np.flatnonzero(sample[:size] != document[:size])
        if len(wrong) and wrong[0] < self._seed:
            return 0
        end = int(wrong[self.skips]) if len(wrong) > self.skips else size
        while end and sample[end - 1] != document[end - 1]:
            end -= 1
        return end


def _low(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys & np.uint64((1 << _BITS) - 1)).astype(np.int64)


def _keys(ids: Ids, n: int) -> NDArray[np.uint64]:
    return grams(mix(ids.astype(np.uint64) + np.uint64(1)), n)


class Coverage:
    """Which tokens of samples are contaminated."""

    def __init__(self, samples: Sequence[Ids]) -> None:
        self.masks = [np.zeros(len(sample), bool) for sample in samples]

    def add(self, run: SharedRun) -> None:
        """Count a run's tokens. All of it counts, differing tokens too, as a run is what they lie in."""
        self.masks[run.sample][run.in_sample : run.in_sample + run.length] = True

    def shares(self) -> NDArray[np.float64]:
        """Contaminated share of each sample's tokens."""
        return np.array([np.count_nonzero(mask) / max(len(mask), 1) for mask in self.masks])

    def save(self, file: Path) -> None:
        """Write what was counted to a file."""
        np.save(file, np.packbits(np.concatenate([*self.masks, np.zeros(0, bool)])))

    def load(self, file: Path) -> None:
        """Add what `save` wrote, of the same samples."""
        bits = np.unpackbits(np.load(file)).astype(bool)
        ends = np.cumsum([len(mask) for mask in self.masks])
        for mask, end in zip(self.masks, ends.tolist(), strict=True):
            np.logical_or(mask, bits[end - len(mask) : end], out=mask)


def subsets(shares: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """The paper's four subsets of samples, which overlap."""
    return {
        "clean": shares < NOT_CLEAN,
        "not clean": shares >= NOT_CLEAN,
        "not dirty": shares < DIRTY,
        "dirty": shares >= DIRTY,
    }


def cut(document: Ids, runs: Sequence[SharedRun], samples: Sequence[Ids], settings: Decontamination) -> list[Ids]:
    """What is left of a document's tokens without the runs of samples that it makes not clean, in one part or more.

    A run goes with `margin` tokens on either side, and a part of no more than so many tokens goes too.
    """
    covered: dict[int, NDArray[np.bool_]] = {}
    for run in runs:
        mask = covered.setdefault(run.sample, np.zeros(len(samples[run.sample]), bool))
        mask[run.in_sample : run.in_sample + run.length] = True
    spoilt = {number for number, mask in covered.items() if mask.mean() >= settings.threshold}
    keep = np.ones(len(document), bool)
    for run in runs:
        if run.sample in spoilt:
            keep[max(run.in_document - settings.margin, 0) : run.in_document + run.length + settings.margin] = False
    if keep.all():
        return [document]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return [document[a:b] for a, b in edges.reshape(-1, 2).tolist() if b - a > settings.margin]


def find(folder: str, name: str, benchmark: Benchmark) -> list[str]:
    """A benchmark's files. Raises DataError when there are none."""
    place = get_datafolder(folder)
    paths = sorted({str(path) for pattern in benchmark.files for path in place.glob(pattern)})
    if not paths:
        raise DataError(f"decontamination.benchmarks.{name}: no file matches {', '.join(benchmark.files)}; fix files")
    return paths


def read_samples(folder: str, name: str, benchmark: Benchmark) -> list[str]:
    """A benchmark's samples as text: the fields of each record, a line each. Raises DataError for unfit files."""
    place = get_datafolder(folder)
    texts = []
    for path in find(folder, name, benchmark):
        try:
            with place.open(path, "rb", compression=None) as file:
                data = compressed.unpacked(file, path, place.size(path)).read(_LONGEST + 1)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); fix the file") from None
        if len(data) > _LONGEST:
            raise DataError(f"{path}: has more than {_LONGEST >> 20} MB, which no benchmark has; fix files")
        try:
            records = list(_records(str(path), data.decode("utf-8-sig")))
            found = [_verbalise(record, benchmark.fields) for record in records]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: does not have the fields {benchmark.fields} ({error}); fix fields") from None
        texts += [text for text in found if text.strip()]
    return texts


def _records(path: str, text: str) -> Iterator[Any]:
    path = compressed.bare(path)
    if path.endswith(".csv"):
        yield from csv.reader(io.StringIO(text))
    elif path.endswith((".jsonl", ".ndjson")):
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
    elif path.endswith(".json"):
        records = json.loads(text)
        if isinstance(records, Mapping):  # such as {"examples": [...]}
            records = next((value for value in records.values() if isinstance(value, list)), [])
        yield from records
    else:
        yield from text.split("\n")


def _verbalise(record: Any, fields: Sequence[str]) -> str:
    """The fields' texts; without fields all that are text. A field of a CSV file is its column's number, from 0."""
    if isinstance(record, str):
        return record
    if isinstance(record, list):
        return "\n".join(record[int(field)] for field in fields) if fields else "\n".join(map(str, record))
    values = [record[field] for field in fields] if fields else list(record.values())
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return "\n".join(str(part) for part in parts if isinstance(part, str))


class Prepare(Stage):
    """Writes benchmarks' samples as token ids, as they are in a prompt: without BOS."""

    name = "prepare"

    def __init__(self, recipe: BuildRecipe, tokenizer: Path, file: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.file = file

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        opened = open_tokenizer(self.tokenizer)
        ids: list[Ids] = []
        numbers = []
        for name, benchmark in self.recipe.decontamination.benchmarks.items():
            texts = read_samples(self.recipe.benchmarks_folder, name, benchmark)
            ids += [np.array(opened.encode(text), np.int64) for text in texts]
            numbers.append(len(texts))
        np.savez(
            self.file, ids=np.concatenate([np.zeros(0, np.int64), *ids]), lengths=list(map(len, ids)), numbers=numbers
        )
        yield from ()


def load(file: Path) -> tuple[list[Ids], list[int]]:
    """What `Prepare` wrote: all samples, and how many of them are of each benchmark."""
    with np.load(file) as saved:
        return np.split(saved["ids"], np.cumsum(saved["lengths"])[:-1].astype(np.int64)), saved["numbers"].tolist()
