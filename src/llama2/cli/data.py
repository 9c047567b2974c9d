"""`llama2 data build`: from documents to a corpus of token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import RecipeSettings

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Build a corpus to train on.")


@app.callback(epilog="Example: llama2 data build recipes/data/nano.toml")
def _data() -> None:
    """Build a corpus to train on."""


@app.command(epilog="Example: llama2 data build recipes/data/nano.toml dir=texts output=corpora/mine")
def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/data/nano.toml.")],
    settings: RecipeSettings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a corpus that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")] = False,
) -> None:
    """Read, clean, deduplicate, mix and tokenise documents, and write a card that says what is in them.

    A build that was stopped goes on where it stopped.
    """
    from rich.console import Console

    from llama2 import recipe as recipes
    from llama2.data.build import build as run
    from llama2.data.settings import BuildRecipe

    asked = recipes.load(recipe, BuildRecipe, settings or ())
    with Console(stderr=True).status("Looking for documents") as status:  # nothing where there is no terminal
        manifest = run(asked, force=force, announce=lambda stage: status.update(f"Building {asked.output}: {stage}"))
    if manifest is None:
        print(f"{asked.output}: is being built by {asked.executor.kind}; it is whole once it has a manifest.json")
    elif as_json:
        print(manifest.model_dump_json())
    else:
        for split, each in manifest.splits.items():
            tokens, documents = sum(shard.tokens for shard in each), sum(shard.documents for shard in each)
            print(f"{asked.output}: {split}: {tokens:,} tokens in {documents:,} documents")
