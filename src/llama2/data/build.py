"""From sources to a corpus: the stages of `llama2 data build`, each a pipeline of datatrove's.

    read → clean → sign      a task's files → its documents, and MinHash signatures of them
    pair → cluster           equal signatures → documents to leave out
    hold                     what small sources hold out for validation
    train-tokenizer          a tokenizer, where none is given
    tokenize                 documents → token ids, by source and split
    mix                      sources by their weights → shards
    finish                   the manifest and the corpus card

Between stages, files are in `work` in the output folder, and a build that was stopped continues where it stopped. The
last stage writes the manifest, and without one a folder is not a corpus.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llama2 import files as safely
from llama2.data import card, contamination, dedup, describe, heldout, origin, read, shards
from llama2.data.clean import Clean
from llama2.data.executor import executor
from llama2.data.overlap import Coverage
from llama2.data.read import File
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Manifest
from llama2.data.stage import Stage, counts
from llama2.data.tokens import SPLITS, Mix, Tokenize, written
from llama2.data.vocabulary import open_tokenizer
from llama2.errors import DataError
from llama2.text import trainer


def build(
    recipe: BuildRecipe,
    *,
    force: bool = False,
    toxicity: describe.Scorer = describe.word_list,
    announce: Callable[[str], None] | None = None,
    note: Callable[[str], None] | None = None,
    files: list[File] | None = None,
) -> Manifest | None:
    """Make the corpus that a recipe describes, and return its manifest; None when a cluster's queue was given the work.

    `toxicity` scores lines for the corpus card. On this machine `announce` is called with each stage's name when it
    begins. `note` is called with a line for each thing that was left out, converted, or otherwise not as expected.
    `files` are the sources' files, where the caller has them from `read.find`.

    Raises DataError or TokenizerError before anything is done, for sources that are missing and a tokenizer that cannot
    be used. Raises DataError later when a source has nothing to use. A corpus that was built from the same is not
    changed. One that was built from something else is a DataError without `force`. With more than one worker, a script
    that calls this must do so behind `if __name__ == "__main__"`, since workers import it.
    """
    output = recipe.output.resolve()  # since tasks may run elsewhere, and libraries remember relative folders
    note = note or (lambda _: None)
    files = read.find(recipe) if files is None else files
    if recipe.tokenizer.file:
        open_tokenizer(recipe.tokenizer.file)
    now = origin.facts(recipe, files)
    if (output / shards.MANIFEST).exists() and not force:
        if changed := origin.differences(output, now):
            raise DataError(
                f"{recipe.output}: holds a corpus already, of something else: {'; '.join(changed)}; replace it with "
                "--force, or choose another output"
            )
        note(f"{recipe.output}: is there already, and nothing that it was built from has changed")
        return shards.read_manifest(output)
    _check_folder(output)
    with_files = {file.source for file in files}
    for name, source in recipe.sources.items():
        if name not in with_files:
            note(f"sources.{name}: no file in {recipe.dir} matches {', '.join(source.files)}, so it is left out")
    work = output / "work" / hashlib.sha256(json.dumps([now, recipe.executor.tasks]).encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    sources = {name: source for name, source in recipe.sources.items() if name in with_files}
    last = _stages(
        recipe.model_copy(update={"output": output, "sources": sources}), files, now, work, toxicity, announce
    )
    last.run()
    if recipe.executor.kind == "slurm":
        return None
    shutil.rmtree(output / "work")
    manifest = shards.read_manifest(output)
    for line in notes(recipe, manifest):
        note(line)
    return manifest


def differences(recipe: BuildRecipe, files: Sequence[File]) -> list[str] | None:
    """What a recipe's corpus was built from that has changed since, in words. None: there is no corpus.

    `files` are the sources' files, from `read.find`.
    """
    if not (recipe.output / shards.MANIFEST).exists():
        return None
    return origin.differences(recipe.output, origin.facts(recipe, files))


def notes(recipe: BuildRecipe, manifest: Manifest) -> Iterator[str]:
    """What of a corpus that was built is not as one might expect, in lines."""
    facts = json.loads((recipe.output / "card" / card.CARD).read_bytes())
    for name, source in facts["sources"].items():
        for encoding, times in source["converted"].items():
            yield f"sources.{name}: {times:,} converted from {encoding}"
        lost = {what: source["steps"][what] for what in card.LOST if what in source["steps"]}
        if lost:
            named = [f"{path} ({reason})" for where, path, reason in facts["left_out"] if where == name]
            first = f"; first {named[0]}" if named else ""
            counted = ", ".join(f"{count:,} {what}" for what, count in lost.items())
            yield f"sources.{name}: left out: {counted}{first}; {recipe.output / 'card' / 'README.md'} says more"
    wanted = recipe.tokenizer.vocabulary
    if wanted and manifest.tokenizer.vocabulary < wanted:
        yield f"the vocabulary has {manifest.tokenizer.vocabulary:,} tokens, not {wanted:,}: so little text has no more"


def _belongs(path: Path) -> bool:
    """Whether a file or folder is one that a build writes."""
    names = ("work", "card", "recipe.json", origin.ORIGIN, shards.MANIFEST)
    return path.name.removesuffix(".part") in names or path.name.startswith(("train-", "validation-", "tokenizer."))


def _check_folder(output: Path) -> None:
    """Raise DataError when the folder has anything in it that is not part of a corpus, such as a link."""
    for path in output.rglob("*"):
        if path.is_symlink() or (path.parent == output and not _belongs(path)):
            raise DataError(f"{path}: is not part of a corpus; choose another output folder")


def _stages(
    recipe: BuildRecipe,
    files: list[File],
    now: origin.Facts,
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
    sign = [dedup.MinhashSignatures(recipe.dedup, signatures)] if bands else []
    unique = [dedup.Unique(recipe.dedup, pairs, removed)] if bands else []
    listed, held, left_out = work / "listed", work / "held.json", work / "left_out"
    documents = [
        read.Read(recipe, files, left_out),
        Clean(recipe, toxicity),
        *sign,
        heldout.List(listed),
        WriteDocuments(clean),
    ]
    stages: list[tuple[str, list[PipelineStep], int]] = [
        ("clean", documents, tasks),
    ]
    if bands:
        stages += [
            ("pair", [dedup.pair(recipe.dedup, signatures, pairs)], bands),
            ("cluster", [dedup.cluster(recipe.dedup, pairs, removed)], 1),
        ]
    stages.append(("hold", [heldout.HoldOut(recipe, listed, removed, logs / "clean", held)], 1))
    if recipe.tokenizer.vocabulary:
        stages.append(("train-tokenizer", [TrainTokenizer(recipe, clean, unique, held, tokenizer)], 1))
    samples = work / "samples.npz" if recipe.decontamination.benchmarks else None
    if samples:
        stages.append(("prepare", [contamination.Prepare(recipe, tokenizer, samples)], 1))
    stages += [
        (
            "tokenize",
            [ReadDocuments(clean), *unique, card.Describe(), Tokenize(recipe, samples, tokenizer, held, tokens)],
            tasks,
        ),
        ("mix", [Mix(recipe, tokenizer, tokens, logs / "tokenize", work / "mixed")], tasks),
        ("finish", [Finish(recipe, now, samples, tokenizer, work)], 1),
    ]
    last = None
    for name, steps, count in stages:
        last = executor(recipe.executor, name, steps, count, logs / name, last, announce)
    return last


class WriteDocuments(Stage):
    """Writes a task's documents to a file."""

    name = "write documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{rank:05d}.jsonl").open("w", encoding="utf-8") as file:
            for document in data:
                file.write(json.dumps([document.text, document.id, document.metadata]) + "\n")
        yield from ()


class ReadDocuments(Stage):
    """A task's documents, as `WriteDocuments` wrote them."""

    name = "read documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        with (self.folder / f"{rank:05d}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                text, key, metadata = json.loads(line)
                yield Document(text, key, metadata=metadata)


class TrainTokenizer(Stage):
    """Trains the tokenizer on all tasks' documents of the training split, each once."""

    name = "train tokenizer"

    def __init__(self, recipe: BuildRecipe, folder: Path, unique: list[dedup.Unique], held: Path, file: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.folder = folder
        self.unique = unique  # where the recipe wants it
        self.held = held
        self.file = file

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        trained = trainer.train(self._texts(), self.recipe.tokenizer.vocabulary or 0, exact=False)
        self.file.write_bytes(trained.model)
        self.count("tokenizer", "lines", trained.lines)
        self.count("tokenizer", "lines too long", trained.too_long)
        yield from ()

    def _texts(self) -> Iterator[str]:
        tasks, held = self.recipe.executor.tasks, heldout.HeldOut(self.recipe, self.held)
        for task in range(tasks):
            documents = ReadDocuments(self.folder).documents(iter(()), task, tasks)
            for step in self.unique:
                documents = step.documents(documents, task, tasks)
            yield from (text for each in documents for split, text in held.parts(each) if split == "train")


class Finish(Stage):
    """Writes the manifest, which says that the corpus is whole."""

    name = "finish"

    def __init__(
        self, recipe: BuildRecipe, now: origin.Facts, samples: Path | None, tokenizer: Path, work: Path
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.now = now
        self.samples = samples
        self.tokenizer = tokenizer
        self.work = work

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        opened = open_tokenizer(self.tokenizer)
        mixed, kept = counts(self.work / "logs" / "mix"), counts(self.work / "logs" / "tokenize")
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
        before, after = Coverage(samples), Coverage(samples)
        for when, coverage in (("before", before), ("after", after)):
            for path in sorted((self.work / "tokens").glob(f"{when}-*.npy")):
                coverage.load(path)
        (output / shards.MANIFEST).unlink(missing_ok=True)  # from here on the corpus that was there does not count
        for path in output.iterdir():
            if path.name.startswith(("train-", "validation-", "tokenizer.")):
                path.unlink()
        for path in (self.work / "mixed").iterdir():
            path.replace(output / path.name)
        named = [json.loads(path.read_bytes()) for path in sorted((self.work / "left_out").iterdir())]
        cleaned, left_out = counts(self.work / "logs" / "clean"), [each for some in named for each in some]
        card.write(output / "card", card.facts(self.recipe, manifest, cleaned, kept, numbers, before, after, left_out))
        with safely.create(output / "recipe.json", error=DataError) as file:
            file.write(self.recipe.model_dump_json(indent=1).encode() + b"\n")
        origin.write(output, self.now)
        shards.finish(output, self.tokenizer, manifest)
        yield from ()
