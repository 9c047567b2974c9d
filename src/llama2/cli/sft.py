"""`llama2 sft`: a model that answers, from one that continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.pretrain import Shown

EXAMPLE = "Example: llama2 sft recipes/nano-sft.toml start=runs/nano data.files='[\"dialogs.jsonl\"]'"


def sft(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/nano-sft.toml.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the recipe's.")
    ] = None,
    *,
    name: Annotated[str | None, typer.Option(help="The run's name, by default the recipe's.")] = None,
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs are kept.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
) -> None:
    """Tune a model on dialogs, with loss on what the assistant says alone.

    Dialogs are JSON lines: {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}, or
    {"prompt": …, "completion": …}, or Alpaca's or Dolly's fields.

    The run is a folder in runs/. It opens like any model: llama2 chat -m runs/NAME.
    """
    from llama2 import hub
    from llama2 import recipe as recipes
    from llama2.train.sft import SftRecipe
    from llama2.train.sft import sft as run

    asked = recipes.load(recipe, SftRecipe, settings or ())
    folder = runs / (name or recipe.stem)
    run(asked, folder, locate=hub.locate, resume=resume, sample=sample, watch=Shown())
    print(f"{folder}: done; talk with it: llama2 chat -m {folder}")


def sample(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Questions with the answers that the engine people will use gives."""
    import llama2

    with llama2.load(model) as loaded:
        return [
            f"{prompt}\n{loaded.chat([{'role': 'user', 'content': prompt}], max_tokens=tokens, seed=0).text}"
            for prompt in prompts
        ]
