"""What a recipe of `llama2 data build` may say."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llama2.recipe import Settings

#: A `dir` that means the folder of Python's standard library, which every machine has.
STDLIB = "stdlib"

Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
Share = Annotated[float, Field(ge=0, le=1)]


class SourceSettings(Settings):
    """Files of one kind and origin."""

    files: list[str] = Field(["**/*"], min_length=1, description="patterns in `dir`, where ** means any folders")
    exclude: list[str] = Field([], description="patterns of files to leave out")
    format: Literal["suffix", "text", "docstrings", "jsonl", "parquet", "warc", "html"] = Field(
        "suffix",
        description="what the files are; suffix: .jsonl, .parquet, .warc and .html by their names, all others text. "
        "All but .parquet may be compressed: .gz, .bz2, .xz, .zst",
    )
    text: str = Field("text", description="where JSON or Parquet has the text; else content, else body")
    separator: str | None = Field(None, description="expression between the documents of a text file; none: one each")
    licence: str = Field("not stated", description="under which it may be used, for the card")
    weight: float | None = Field(None, gt=0, description="its share of the corpus, relative to other sources' weights")
    languages: list[str] = Field([], description="languages to keep (ISO 639); none: all, known or not")
    quality: bool = Field(False, description="drop what is not prose by the rules of Gopher (Rae et al. 2021)")


class TokenizerSettings(Settings):
    """The tokenizer: a file, or one that is trained on the corpus."""

    file: Path | None = Field(None, description="tokenizer.model or tokenizer.json")
    vocabulary: int | None = Field(None, ge=300, description="tokens of one to be trained")

    @model_validator(mode="after")
    def _one(self) -> TokenizerSettings:
        if (self.file is None) == (self.vocabulary is None):
            raise ValueError("needs either file or vocabulary")
        return self


class Dedup(Settings):
    """Which documents count as one."""

    exact: bool = Field(True, description="those with the same text")
    near: bool = Field(True, description="those that share most of their n-grams of words, by MinHash")
    words: int = Field(5, ge=1, description="words of an n-gram")
    bands: int = Field(14, ge=1, le=100, description="bands of 8 hashes; more find documents that are less alike")


class Personal(Settings):
    """Personal information."""

    replace: bool = Field(True, description="put [EMAIL], [PHONE] and their like in place of such information")
    blocked: list[str] = Field([], description="sites to leave out, besides those that are known for searching people")


class Card(Settings):
    """What the corpus card looks at."""

    sample: Share = Field(0.1, description="share of the English documents whose toxicity is scored")


class Benchmark(Settings):
    """Samples that a model is to be measured by."""

    files: list[str] = Field(min_length=1, description="patterns in `dir`: JSON, JSON lines, CSV, or a line a sample")
    fields: list[str] = Field([], description="what of a record the prompt shows, in order; none: every text")


class Decontamination(Settings):
    """Removal of benchmarks' samples from the corpus (paper A.6)."""

    benchmarks: dict[Name, Benchmark] = Field({})
    dir: str | None = Field(None, description="folder of the benchmarks' files; none: the sources'")
    length: int = Field(10, ge=1, description="tokens of the shortest run that counts")
    skips: int = Field(4, ge=0, description="tokens of a run, after the first ten, that may differ")
    threshold: float = Field(0.2, gt=0, le=1, description="share of a sample from which its runs are cut out")
    margin: int = Field(50, ge=0, description="tokens that go with a run on either side")


class Executor(Settings):
    """Who does the work. The corpus depends on `tasks`, never on who did them."""

    kind: Literal["local", "slurm", "ray"] = Field("local", description="this machine, or a cluster's queue")
    tasks: int = Field(4, ge=1, description="parts that the files are dealt to, and files of each split")
    workers: int | None = Field(None, ge=1, description="tasks at a time; none: local, the cores; else all")
    memory: float = Field(2.0, gt=0, description="GB for each worker, which Slurm and Ray reserve")
    time: str = Field("24:00:00", description="Slurm: the limit for a task")
    partition: str | None = Field(None, description="Slurm: where to run; required")

    @model_validator(mode="after")
    def _partition(self) -> Executor:
        if self.kind == "slurm" and not self.partition:
            raise ValueError("Slurm needs a partition")
        return self


#: All documents of a folder: what a recipe reads that names no sources.
DOCUMENTS = {"documents": SourceSettings(exclude=[".*", "*/.*", "__pycache__/*", "*/__pycache__/*"])}


class BuildRecipe(Settings):
    """A corpus: sources, what is done with them, and where it is written."""

    output: Path = Field(description="folder to make")
    dir: str = Field(".", description="folder of the sources' files, perhaps remote; stdlib: Python's own library")
    sources: dict[Name, SourceSettings] = Field(
        DOCUMENTS, min_length=1, description="none: all documents of the folder"
    )
    tokenizer: TokenizerSettings = TokenizerSettings(vocabulary=4096)
    validation: Share = Field(
        0.01, description="share of the documents kept for validation, chosen by their place; of few documents, parts"
    )
    document_limit: int = Field(1 << 22, ge=1, description="bytes of a document; longer text is cut at a line's end")
    max_epochs: float = Field(4.0, ge=1, description="times that a document may be repeated for its source's weight")
    dedup: Dedup = Dedup()
    personal: Personal = Personal()
    decontamination: Decontamination = Decontamination()
    card: Card = Card()
    executor: Executor = Executor()

    @property
    def folder(self) -> str:
        """Where the sources are: an absolute path, or an address."""
        return _absolute(self.dir)

    @property
    def benchmarks_folder(self) -> str:
        """Where the benchmarks are, in the same way."""
        return _absolute(self.decontamination.dir or self.dir)


def _absolute(place: str) -> str:
    if place == STDLIB:
        return sysconfig.get_path("stdlib")
    return place if "://" in place else str(Path(place).resolve())
