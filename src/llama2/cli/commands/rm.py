"""`llama2 rm`: delete a model that was fetched."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from llama2.cli.local_models import Name
from llama2.cli.options import Json
from llama2.cli.output import size
from llama2.console import data, say, visible

EXAMPLE = "Example: llama2 rm smollm2-135m-instruct --yes"


def command(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a model that was fetched, and its repacked weights. Files of your own are never touched."""
    from llama2 import hub

    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask in; --yes deletes without asking")
    if not yes and not typer.confirm(f"Delete {visible(name)}?", err=True):
        raise typer.Exit(1)
    freed = hub.remove(name)
    data(json.dumps({"name": name, "freed": freed})) if as_json else say(f"{name}: deleted, {size(freed)} freed")
