"""Documents → token ids in files, then → the corpus: sources mixed by weight, split in train and validation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from llama2.data import contamination, shards
from llama2.data.heldout import HeldOut
from llama2.data.overlap import Coverage, Matcher
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Shard, Split
from llama2.data.stage import Stage, counts, fraction
from llama2.data.vocabulary import encoder, open_tokenizer
from llama2.errors import DataError

SPLITS: tuple[Split, Split] = ("train", "validation")


class Tokenize(Stage):
    """Writes each source's documents as token ids, in a folder of its own, by split."""

    name = "tokenize"

    def __init__(self, recipe: BuildRecipe, samples: Path | None, file: Path, held: Path, folder: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.held = held
        self.samples = samples  # of the benchmarks, where there are some
        self.file = file
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        opened = open_tokenizer(self.file)
        encode, held = encoder(opened), HeldOut(self.recipe, self.held)
        begin = [opened.bos_id] if opened.add_bos and opened.bos_id is not None else []
        settings = self.recipe.decontamination
        samples = contamination.load(self.samples)[0] if self.samples else []
        matcher = Matcher(samples, length=settings.length, skips=settings.skips)
        before, after = Coverage(samples), Coverage(samples)
        self.folder.mkdir(exist_ok=True)
        writers: dict[tuple[str, Split], shards.Writer] = {}
        with ExitStack() as open_writers:
            for document in data:
                source = document.metadata["source"]
                for split, text in held.parts(document):
                    if (source, split) not in writers:
                        place = self.folder / source
                        place.mkdir(parents=True, exist_ok=True)
                        writer = shards.Writer(place, split, rank, opened.vocab_size)
                        writers[source, split] = open_writers.enter_context(writer)
                    ids = np.array(encode(text), np.int64)
                    parts = [ids]
                    if samples:
                        runs = list(matcher.runs(ids))
                        parts = contamination.cut(ids, runs, samples, settings)
                        for run in runs:
                            before.add(run)
                        for run in (run for part in parts if runs for run in matcher.runs(part)):
                            after.add(run)
                        if len(parts) != 1 or len(parts[0]) != len(ids):
                            self.count(source, "contaminated documents")
                            self.count(source, "contaminated tokens", len(ids) - sum(map(len, parts)))
                    for part in parts:
                        whole = np.concatenate([begin, part, [opened.eos_id]]).astype(np.int64)
                        writers[source, split].add(whole)
                        self.count(source, f"{split} documents")
                        self.count(source, f"{split} tokens", len(whole))
        if samples:
            before.save(self.folder / f"before-{rank:05d}.npy")
            after.save(self.folder / f"after-{rank:05d}.npy")
        yield from ()


def epochs(recipe: BuildRecipe, tokens: Mapping[str, float]) -> dict[str, float]:
    """How often each source's training tokens are in the corpus: each at least once, in all as the weights say.

    Without weights each is there once. Raises DataError when weights need more than `max_epochs` repetitions.
    """
    weights = {name: source.weight for name, source in recipe.sources.items()}
    if all(weight is None for weight in weights.values()):
        return dict.fromkeys(weights, 1.0)
    if missing := [name for name, weight in weights.items() if weight is None]:
        raise DataError(f"sources.{missing[0]}.weight: is missing; give every source a weight, or none")
    if empty := [name for name in weights if not tokens[name]]:
        raise DataError(f"sources.{empty[0]}: none of its documents is left, so it has no weight; leave it out")
    wanted = {name: float(weight or 0) / tokens[name] for name, weight in weights.items()}
    least = min(wanted.values())
    times = {name: value / least for name, value in wanted.items()}
    most = max(times, key=times.__getitem__)
    if times[most] > recipe.max_epochs:
        raise DataError(
            f"sources.{most}.weight: needs its documents {times[most]:.2f} times, and max_epochs is "
            f"{recipe.max_epochs:g}; lower the weight, or raise max_epochs"
        )
    return times


class Mix(Stage):
    """Writes a task's part of the corpus: the documents of every source, repeated as `epochs` says."""

    name = "mix"

    def __init__(self, recipe: BuildRecipe, file: Path, tokens: Path, logs: Path, folder: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.file = file
        self.tokens = tokens
        self.logs = logs  # of Tokenize
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        vocabulary = open_tokenizer(self.file).vocab_size
        counted = counts(self.logs)
        times = epochs(self.recipe, {name: counted[name]["train tokens"] for name in self.recipe.sources})
        written = {}
        self.folder.mkdir(exist_ok=True)
        for split in SPLITS:
            each = dict.fromkeys(self.recipe.sources, 0)
            with shards.Writer(self.folder, split, rank, vocabulary) as writer:
                for source in self.recipe.sources:
                    repeats = times[source] if split == "train" else 1.0
                    for number, ids in enumerate(_documents(self.tokens / source, split, rank, vocabulary)):
                        extra = fraction(f"{rank}/{number}", source) < repeats % 1
                        for _ in range(int(repeats) + extra):
                            writer.add(ids)
                            each[source] += 1
                            self.count(source, f"{split} documents")
                            self.count(source, f"{split} tokens", len(ids))
            assert writer.shard  # noqa: S101
            written[split] = writer.shard.model_copy(update={"sources": each}).model_dump()
        (self.tokens / f"{rank:05d}.json").write_text(json.dumps(written))
        yield from ()


def _documents(folder: Path, split: Split, rank: int, vocabulary: int) -> Iterator[NDArray[Any]]:
    """Token ids of each document that `Tokenize` wrote for a source, split and task."""
    tokens, starts = (folder / f"{split}-{rank:05d}.{kind}" for kind in ("tokens", "documents"))
    if not tokens.exists() or not tokens.stat().st_size:
        return
    ids = np.memmap(tokens, np.dtype(shards.dtype_of(vocabulary)).newbyteorder("<"), "r")
    bounds = [*np.fromfile(starts, "<u8").tolist(), len(ids)]
    for start, stop in pairwise(bounds):
        yield ids[start:stop]


def written(tokens: Path, tasks: int) -> dict[Split, list[Shard]]:
    """The shards that all tasks of `Mix` wrote."""
    each = [json.loads((tokens / f"{rank:05d}.json").read_text()) for rank in range(tasks)]
    return {split: [Shard(**task[split]) for task in each] for split in SPLITS}
