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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document

from llama2.data import read, shards
from llama2.data.executor import executor
from llama2.data.read import File
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Manifest
from llama2.data.stage import Stage, counts
from llama2.data.tokens import SPLITS, Mix, Tokenise, open_tokenizer, written
from llama2.errors import DataError
from llama2.text import trainer


def build(recipe: BuildRecipe, *, force: bool = False) -> Manifest | None:
    """Make the corpus that a recipe describes, and return its manifest; None when a cluster's queue was given the work.

    Raises DataError or TokenizerError before anything is done for sources that are missing and a tokenizer that cannot
    be used, and later when a source has nothing to use. Without `force` a corpus that is there already is left alone,
    which is a DataError. With more than one worker on Windows or macOS, and from a script anywhere, the call must
    stand behind `if __name__ == "__main__"`, since workers import the script.
    """
    output = recipe.output.resolve()  # since tasks may run elsewhere, and libraries remember relative folders
    if (output / shards.MANIFEST).exists() and not force:
        raise DataError(f"{recipe.output}: holds a corpus already; choose another output, or replace it with --force")
    files = read.find(recipe)
    if recipe.tokenizer.file:
        open_tokenizer(recipe.tokenizer.file)
    if output.exists():
        _clear(output)
    work = output / "work" / _identity(recipe, files)
    work.mkdir(parents=True, exist_ok=True)
    last = _stages(recipe.model_copy(update={"output": output}), files, work)
    last.run()
    if recipe.executor.kind == "slurm":
        return None
    shutil.rmtree(output / "work")
    return shards.read_manifest(output)


def _clear(output: Path) -> None:
    """Remove the corpus that was there, and refuse a folder with anything else in it."""
    (output / shards.MANIFEST).unlink(missing_ok=True)
    for path in output.iterdir():
        if path.name.startswith(("train-", "validation-", "tokenizer.")):
            path.unlink()
        elif path.name not in ("work", "card", "recipe.json"):
            raise DataError(f"{path}: is no part of a corpus; choose another output folder")


def _identity(recipe: BuildRecipe, files: list[File]) -> str:
    """What tells the work of this recipe on these files from that of another."""
    told = json.dumps([recipe.model_dump(mode="json", exclude={"executor": {"workers"}}), files])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _stages(recipe: BuildRecipe, files: list[File], work: Path) -> Any:
    """The executor of the last stage, which runs those before it."""
    tasks = recipe.executor.tasks
    logs = work / "logs"
    clean, tokens = work / "clean", work / "tokens"
    tokenizer = recipe.tokenizer.file.resolve() if recipe.tokenizer.file else work / "tokenizer.model"
    stages: list[tuple[str, list[Stage], int]] = [
        ("clean", [read.Read(recipe, files), Write(clean)], tasks),
    ]
    if recipe.tokenizer.vocabulary:
        stages.append(("learn", [Learn(clean, tasks, recipe.tokenizer.vocabulary, tokenizer)], 1))
    stages += [
        ("tokenise", [Load(clean), Tokenise(recipe, tokenizer, tokens)], tasks),
        ("mix", [Mix(recipe, tokenizer, tokens, logs / "tokenise", recipe.output)], tasks),
        ("finish", [Finish(recipe, tokenizer, tokens, logs)], 1),
    ]
    last = None
    for name, steps, count in stages:
        last = executor(recipe.executor, name, steps, count, logs / name, last)
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


def _load(folder: Path, rank: int) -> Iterator[Document]:
    with (folder / f"{rank:05d}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            text, key, metadata = json.loads(line)
            yield Document(text, key, metadata=metadata)


class Load(Stage):
    """A task's documents, as `Write` kept them."""

    name = "load"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        yield from _load(self.folder, rank)


class Learn(Stage):
    """Learns the tokenizer from all tasks' documents."""

    name = "learn"

    def __init__(self, folder: Path, tasks: int, vocabulary: int, file: Path) -> None:
        super().__init__()
        self.folder = folder
        self.tasks = tasks
        self.vocabulary = vocabulary
        self.file = file

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        texts = (document.text for task in range(self.tasks) for document in _load(self.folder, task))
        trained = trainer.train(texts, self.vocabulary)
        self.file.write_bytes(trained.model)
        self.count("tokenizer", "lines", trained.lines)
        self.count("tokenizer", "lines too long", trained.too_long)
        yield from ()


class Finish(Stage):
    """Writes what says that the corpus is whole."""

    name = "finish"

    def __init__(self, recipe: BuildRecipe, tokenizer: Path, tokens: Path, logs: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.logs = logs

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        opened = open_tokenizer(self.tokenizer)
        mixed = counts(self.logs / "mix")
        output = self.recipe.output
        (output / "recipe.json").write_text(self.recipe.model_dump_json(indent=1) + "\n")
        shards.finish(
            output,
            self.tokenizer,
            vocabulary=opened.vocab_size,
            bos_id=opened.bos_id or 0,
            eos_id=opened.eos_id or 0,
            shards=written(self.tokens, self.recipe.executor.tasks),
            sources={
                name: {
                    split: {what: int(mixed[name][f"{split} {what}"]) for what in ("documents", "tokens")}
                    for split in SPLITS
                }
                for name in self.recipe.sources
            },
        )
        yield from ()
