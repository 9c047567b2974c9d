"""`llama2 embed`: vectors of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import Json, ModelOptions, inputs
from llama2.console import data
from llama2.engine.request import Pooling

EXAMPLE = "Example: llama2 embed 'The sky is blue.' 'Grass is green.' --pooling mean --json"


def command(
    *,
    model: ModelOptions,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="One input each.", show_default="standard input's lines")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="More inputs, one a line.")] = None,
    pooling: Annotated[Pooling, typer.Option(help="The last token's hidden state, or the mean of all.")] = "last",
    normalise: Annotated[
        bool, typer.Option("--normalise/--no-normalise", help="Make each vector 1 long, or leave it as it is.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Embed texts: a vector of each, from the model's hidden states after the final norm.

    Prints a line of numbers for each input. Lines that are empty are left out.
    """
    given = inputs(texts, file)
    with model.load() as loaded:
        vectors = loaded.embed(given, pooling=pooling, normalise=normalise)
    if as_json:
        record = {"model": model.name, "pooling": pooling, "normalised": normalise, "embeddings": vectors.tolist()}
        data(json.dumps(record))
        return
    for vector in vectors:
        data(" ".join(map(str, vector)))
