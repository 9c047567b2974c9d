"""What a recipe of `llama2 data build` may say."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llama2.recipe import Settings

#: A `dir` that stands for the folder of Python's standard library, which every machine has.
STDLIB = "stdlib"

Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
Share = Annotated[float, Field(ge=0, le=1)]


class Source(Settings):
    """Files of one kind and origin."""

    files: list[str] = Field(min_length=1, description="patterns in `dir`, where ** stands for any folders")
    exclude: list[str] = Field([], description="patterns of files to leave out")
    format: Literal["suffix", "text", "docstrings", "jsonl", "parquet", "warc"] = Field(
        "suffix",
        description="what the files are; suffix: .jsonl, .parquet, .warc, each perhaps compressed, and all others text",
    )
    text: str = Field("text", description="where JSON or Parquet has the text")
    separator: str | None = Field(None, description="expression between the documents of a text file; none: one each")
    licence: str = "not stated"
    weight: float | None = Field(None, gt=0, description="its share of the corpus, relative to other sources' weights")
    languages: list[str] = Field([], description="languages to keep (ISO 639); none: all, known or not")
    quality: bool = Field(False, description="drop what is no prose by the rules of Gopher (Rae et al. 2021)")


class TokenizerSettings(Settings):
    """The tokenizer: a file, or one that is trained on the corpus."""

    file: Path | None = Field(None, description="tokenizer.model or tokenizer.json")
    vocabulary: int | None = Field(None, ge=300, description="tokens of one to be trained")

    @model_validator(mode="after")
    def _one(self) -> TokenizerSettings:
        if (self.file is None) == (self.vocabulary is None):
            raise ValueError("needs either file or vocabulary")
        return self


class Executor(Settings):
    """Who does the work. The corpus depends on `tasks`, never on who did them."""

    kind: Literal["local", "slurm", "ray"] = "local"
    tasks: int = Field(4, ge=1, description="parts that the files are dealt to, and files of each split")
    workers: int | None = Field(None, ge=1, description="tasks at a time; none: local, the cores; else all")
    memory: float = Field(2.0, gt=0, description="GB for each worker, which Slurm and Ray reserve")
    time: str = Field("24:00:00", description="Slurm: the limit for a task")
    partition: str | None = Field(None, description="Slurm: where to run")


class BuildRecipe(Settings):
    """A corpus: sources, what is done with them, and where it is written."""

    output: Path = Field(description="folder to make")
    dir: str = Field(".", description="folder of the sources' files, perhaps remote; stdlib: Python's own library")
    sources: dict[Name, Source] = Field(min_length=1)
    tokenizer: TokenizerSettings
    validation: Share = Field(0.01, description="share of the documents kept for validation, chosen by their place")
    document_limit: int = Field(1 << 22, ge=1, description="bytes of a document; longer text is cut at a line's end")
    max_epochs: float = Field(4.0, ge=1, description="times that a document may be repeated for its source's weight")
    executor: Executor = Executor()

    @property
    def folder(self) -> str:
        """Where the sources are: an absolute path, or an address."""
        if self.dir == STDLIB:
            return sysconfig.get_path("stdlib")
        return self.dir if "://" in self.dir else str(Path(self.dir).resolve())
