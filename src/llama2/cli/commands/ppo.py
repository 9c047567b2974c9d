"""`llama2 ppo`: a policy that reward models teach."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import RecipeSettings
from llama2.cli.training import RunOptions, run
from llama2.console import say

EXAMPLE = "Example: llama2 ppo recipes/ppo.toml --name v5 iterations=100"
RECIPES = {"llama2 ppo": "llama2.align.ppo_recipe:PpoRecipe"}


def command(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/ppo.toml.")],
    settings: RecipeSettings = None,
    *,
    options: RunOptions,
) -> None:
    """Tune a chat model towards what reward models say of its answers (PPO, proximal policy optimisation).

    In each iteration the model answers prompts. Two rewards become one: safety where it is low or the prompt is tagged,
    helpfulness elsewhere. The KL divergence from the start is subtracted from it, token by token.

    Rewards, divergence, length and entropy are in metrics.jsonl. A policy that collapses ends the run.

    The time is estimated first. The run is a folder in runs/. It opens like any model: llama2 chat -m runs/NAME
    """
    from llama2 import recipe as recipes
    from llama2.align.ppo import ppo
    from llama2.align.ppo_recipe import PpoRecipe

    folder = options.folder(file)
    run(ppo, recipes.load(file, PpoRecipe, settings or ()), folder, options)
    say(f"{folder}: done; talk with it: llama2 chat -m {folder}")
