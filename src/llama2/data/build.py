"""From sources to a corpus: the stages of `llama2 data build`, each a pipeline of datatrove's.

    read → clean → sign      a task's files → its documents, and signatures of them
    pair → cluster           equal signatures → documents to leave out
    learn                    a tokenizer, where none is given
    tokenise                 documents → token ids, by source and split
    mix                      sources by their weights → shards
    finish                   the manifest and the corpus card

Between stages, files stand in `work` in the output folder, and a build that was stopped goes on where it stopped. The
last stage writes the manifest, and without one a folder is no corpus.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llama2.data import card, contamination, dedup, describe, read, shards
from llama2.data.clean import Clean
from llama2.data.executor import executor
from llama2.data.read import File
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Manifest
from llama2.data.stage import Stage, counts
from llama2.data.tokens import SPLITS, Mix, Tokenise, split_of, written
from llama2.data.vocabulary import open_tokenizer
from llama2.errors import DataError
from llama2.text import trainer


def build(
    recipe: BuildRecipe,
    *,
    force: bool = False,
    toxicity: describe.Scorer = describe.word_list,
    announce: Callable[[str], None] | None = None,
) -> Manifest | None:
    """Make the corpus that a recipe describes, and return its manifest; None when a cluster's queue was given the work.

    `toxicity` scores lines for the corpus card. On this machine `announce` is told each stage's name when it begins.

    Raises DataError or TokenizerError before anything is done for sources that are missing and a tokenizer that cannot
    be used, and later when a source has nothing to use. Without `force` a corpus that is there already is left alone,
    which is a DataError. With more than one worker, a script that calls this must do so behind
    `if __name__ == "__main__"`, since workers import it.
    """
    output = recipe.output.resolve()  # since tasks may run elsewhere, and libraries remember relative folders
    if (output / shards.MANIFEST).exists() and not force:
        raise DataError(f"{recipe.output}: holds a corpus already; choose another output, or replace it with --force")
    files = read.find(recipe)
    for name, benchmark in recipe.decontamination.benchmarks.items():
        contamination.find(recipe.benchmarks_folder, name, benchmark)
    if recipe.tokenizer.file:
        open_tokenizer(recipe.tokenizer.file)
    _check_folder(output)
    work = output / "work" / _identity(recipe, files)
    work.mkdir(parents=True, exist_ok=True)
    last = _stages(recipe.model_copy(update={"output": output}), files, work, toxicity, announce)
    last.run()
    if recipe.executor.kind == "slurm":
        return None
    shutil.rmtree(output / "work")
    return shards.read_manifest(output)


def _belongs(path: Path) -> bool:
    """Whether a file or folder is one that a build writes."""
    return path.name in ("work", "card", "recipe.json", shards.MANIFEST) or path.name.startswith(
        ("train-", "validation-", "tokenizer.")
    )


def _check_folder(output: Path) -> None:
    """Raise DataError when the folder has anything in it that is no part of a corpus."""
    if output.exists() and (others := [path for path in output.iterdir() if not _belongs(path)]):
        raise DataError(f"{others[0]}: is no part of a corpus; choose another output folder")


def _identity(recipe: BuildRecipe, files: list[File]) -> str:
    """What tells the work of this recipe on these files from that of another."""
    tokenizer = shards.sha256(recipe.tokenizer.file) if recipe.tokenizer.file else None
    told = json.dumps([recipe.model_dump(mode="json", exclude={"executor": {"workers"}}), files, tokenizer])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _stages(
    recipe: BuildRecipe,
    files: list[File],
    work: Path,
    toxicity: describe.Scorer,
    announce: Callable[[str], None] | None,
) -> Any:
    """The executor of the last stage, which runs those before it."""
    tasks = recipe.executor.tasks
    logs = work / "logs"
    clean, tokens = work / "clean", work / "tokens"
    tokenizer = recipe.tokenizer.file.resolve() if recipe.tokenizer.file else work / "tokenizer.model"
    signatures, pairs, removed = work / "signatures", work / "pairs", work / "removed"
    bands = dedup.bands(recipe.dedup)
    sign = [dedup.Sign(recipe.dedup, signatures)] if bands else []
    unique = [dedup.Unique(recipe.dedup, pairs, removed)] if bands else []
    stages: list[tuple[str, list[PipelineStep], int]] = [
        ("clean", [read.Read(recipe, files), Clean(recipe, toxicity), *sign, Write(clean)], tasks),
    ]
    if bands:
        stages += [
            ("pair", [dedup.pair(recipe.dedup, signatures, pairs)], bands),
            ("cluster", [dedup.cluster(recipe.dedup, pairs, removed)], 1),
        ]
    if recipe.tokenizer.vocabulary:
        stages.append(("learn", [Learn(recipe, recipe.tokenizer.vocabulary, clean, unique, tokenizer)], 1))
    samples = work / "samples.npz" if recipe.decontamination.benchmarks else None
    if samples:
        stages.append(("prepare", [contamination.Prepare(recipe, tokenizer, samples)], 1))
    stages += [
        ("tokenise", [Load(clean), *unique, card.Describe(), Tokenise(recipe, samples, tokenizer, tokens)], tasks),
        ("mix", [Mix(recipe, tokenizer, tokens, logs / "tokenise", work / "mixed")], tasks),
        ("finish", [Finish(recipe, samples, tokenizer, work)], 1),
    ]
    last = None
    for name, steps, count in stages:
        last = executor(recipe.executor, name, steps, count, logs / name, last, announce)
    return last


class Write(Stage):
    """Keeps a task's documents in a file."""

    name = "write"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{rank:05d}.jsonl").open("w", encoding="utf-8") as file:
            for document in data:
                file.write(json.dumps([document.text, document.id, document.metadata]) + "\n")
        yield from ()


class Load(Stage):
    """A task's documents, as `Write` kept them."""

    name = "load"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        with (self.folder / f"{rank:05d}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                text, key, metadata = json.loads(line)
                yield Document(text, key, metadata=metadata)


class Learn(Stage):
    """Learns the tokenizer from all tasks' documents for training, each once."""

    name = "learn"

    def __init__(
        self, recipe: BuildRecipe, vocabulary: int, folder: Path, unique: list[dedup.Unique], file: Path
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.vocabulary = vocabulary
        self.folder = folder
        self.unique = unique  # where the recipe asks for it
        self.file = file

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        trained = trainer.train(self._texts(), self.vocabulary)
        self.file.write_bytes(trained.model)
        self.count("tokenizer", "lines", trained.lines)
        self.count("tokenizer", "lines too long", trained.too_long)
        yield from ()

    def _texts(self) -> Iterator[str]:
        tasks = self.recipe.executor.tasks
        for task in range(tasks):
            documents = Load(self.folder).documents(iter(()), task, tasks)
            for step in self.unique:
                documents = step.documents(documents, task, tasks)
            yield from (each.text for each in documents if split_of(each, self.recipe) == "train")


class Finish(Stage):
    """Writes what says that the corpus is whole."""

    name = "finish"

    def __init__(self, recipe: BuildRecipe, samples: Path | None, tokenizer: Path, work: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.samples = samples
        self.tokenizer = tokenizer
        self.work = work

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        opened = open_tokenizer(self.tokenizer)
        mixed, kept = counts(self.work / "logs" / "mix"), counts(self.work / "logs" / "tokenise")
        for name in self.recipe.sources:
            if not kept[name]["kept"]:
                reasons = ", ".join(
                    f"{count:g} {what}" for what, count in counts(self.work / "logs" / "clean")[name].items()
                )
                raise DataError(f"sources.{name}: none of its documents was kept ({reasons}); mend it, or leave it out")
        output = self.recipe.output
        manifest = shards.Manifest.of(
            self.tokenizer,
            opened,
            shards=written(self.work / "tokens", self.recipe.executor.tasks),
            sources={
                name: {
                    split: {what: int(mixed[name][f"{split} {what}"]) for what in ("documents", "tokens")}
                    for split in SPLITS
                }
                for name in self.recipe.sources
            },
        )
        samples, numbers = contamination.load(self.samples) if self.samples else ([], [])
        coverages = [contamination.Coverage(samples) for _ in range(2)]
        for when, coverage in zip(("before", "after"), coverages, strict=True):
            for file in sorted((self.work / "tokens").glob(f"{when}-*.npy")):
                coverage.load(file)
        (output / shards.MANIFEST).unlink(missing_ok=True)  # from here on the corpus that was there is none
        for path in output.iterdir():
            if path.name.startswith(("train-", "validation-", "tokenizer.")):
                path.unlink()
        for path in (self.work / "mixed").iterdir():
            path.replace(output / path.name)
        card.write(
            output / "card",
            card.facts(self.recipe, manifest, counts(self.work / "logs" / "clean"), kept, numbers, *coverages),
        )
        (output / "recipe.json").write_text(self.recipe.model_dump_json(indent=1) + "\n")
        shards.finish(output, self.tokenizer, manifest)
        yield from ()
