"""`llama2 data build`: from documents to a corpus of token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama2 import files
from llama2.cli.options import RecipeSettings, ShowSettings
from llama2.console import data, say, visible

RECIPES = {"llama2 data build": "llama2.data.settings:BuildRecipe"}

group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Build a corpus to train on.")


@group.callback(epilog="Example: llama2 data build texts")
def _data() -> None:
    """Build a corpus to train on."""


@group.command(epilog="Example: llama2 data build texts output=corpora/mine tokenizer.vocabulary=8192")
def build(
    recipe: Annotated[
        Path, typer.Argument(metavar="FOLDER|RECIPE", help="Documents, or a TOML file such as recipes/data/nano.toml.")
    ],
    settings: RecipeSettings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a corpus that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")] = False,
    show_settings: ShowSettings = False,
) -> None:
    """Read, clean, deduplicate, mix and tokenise documents, and write a card that says what is in them.

    All documents of a FOLDER are read: texts, Markdown, code, HTML, JSON lines, Parquet and WARC, also compressed.
    Hidden files, and files without text, are left out. A RECIPE chooses by patterns. The corpus is written to
    corpora/FOLDER, or to output=.

    A stopped build continues where it stopped. An existing corpus stays, if it was built from the same documents.
    """
    from rich.console import Console
    from rich.text import Text

    from llama2 import recipe as recipes
    from llama2.cli.output import warn
    from llama2.data.build import build as run
    from llama2.data.settings import BuildRecipe

    if recipe.is_dir():
        named = files.named(recipe).name
        table = {"dir": str(recipe), "output": str(Path("corpora") / named)}
        chosen = recipes.make(table, BuildRecipe, settings or (), where=str(recipe))
    else:
        chosen = recipes.load(recipe, BuildRecipe, settings or ())
    with Console(stderr=True).status("Looking for documents") as status:  # nothing where there is no terminal

        def announce(stage: str) -> None:
            status.update(Text(visible(f"Building {chosen.output}: {stage}")))

        manifest = run(chosen, force=force, announce=announce, note=warn)
    if manifest is None:
        say(f"{chosen.output}: is being built by {chosen.executor.kind}; it is whole once it has a manifest.json")
    elif as_json:
        data(manifest.model_dump_json())
    else:
        for split, each in manifest.splits.items():
            tokens, documents = sum(shard.tokens for shard in each), sum(shard.documents for shard in each)
            say(f"{chosen.output}: {split}: {tokens:,} tokens in {documents:,} documents")
