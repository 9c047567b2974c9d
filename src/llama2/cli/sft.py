"""`llama2 sft`: a model that answers, from one that continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import RecipeSettings, Resume, RunName, RunsFolder
from llama2.cli.pretrain import Shown

EXAMPLE = "Example: llama2 sft recipes/nano-sft.toml start=runs/nano data.files='[\"dialogs.jsonl\"]'"


def sft(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/nano-sft.toml.")],
    settings: RecipeSettings = None,
    *,
    name: RunName = None,
    runs: RunsFolder = Path("runs"),
    resume: Resume = False,
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
