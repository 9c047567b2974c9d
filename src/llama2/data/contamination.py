"""Benchmark samples of a recipe: reading them, and removing from documents the runs of tokens that both share."""

from __future__ import annotations

import csv
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.io import get_datafolder
from numpy.typing import NDArray

from llama2.data import compressed
from llama2.data.overlap import Ids, SharedRun
from llama2.data.settings import Benchmark, BuildRecipe, Decontamination
from llama2.data.stage import Stage
from llama2.data.vocabulary import open_tokenizer
from llama2.errors import DataError

_LONGEST = 1 << 28  # bytes of a benchmark's file


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
