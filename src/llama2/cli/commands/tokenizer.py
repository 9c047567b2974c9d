"""`llama2 tokenizer train`: train a tokenizer on text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import Json, read_text
from llama2.cli.output import warn
from llama2.console import data, say

group = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@group.callback(epilog="Example: llama2 tokenizer train book.txt --vocabulary 4096")
def _tokenizer() -> None:
    """Train a tokenizer."""


@group.command(epilog="Example: llama2 tokenizer train *.txt --vocabulary 4096 --output tokenizer.model")
def train(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="UTF-8 text.")],
    vocabulary: Annotated[
        int, typer.Option(min=300, help="Tokens, 256 bytes and 3 control tokens among them.")
    ] = 32000,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The model to make.")] = Path(
        "tokenizer.model"
    ),
    sample: Annotated[int, typer.Option(min=101, help="Lines to train on at most, chosen at random.")] = 2_000_000,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads that compute.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Train a SentencePiece tokenizer with Llama 2's settings: byte-pair merges, bytes for the rest, single digits."""
    from llama2.errors import TokenizerError
    from llama2.files import create
    from llama2.text import trainer

    if output.exists() and not force:
        raise TokenizerError(f"{output}: already exists; choose another name, or replace it with --force")

    def texts() -> Iterator[str]:
        yield from map(read_text, files)

    trained = trainer.train(texts(), vocabulary, sample=sample, threads=threads)
    with create(output) as file:
        file.write(trained.model)
    if trained.too_long:
        warn(f"{trained.too_long} lines have more than {trainer.LONGEST_LINE} bytes, and were skipped")
    report = {"path": str(output), "vocabulary": vocabulary, "lines": trained.lines, "lines_too_long": trained.too_long}
    data(json.dumps(report)) if as_json else say(f"{output}: {vocabulary:,} tokens, trained on {trained.lines:,} lines")
