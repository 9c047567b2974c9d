"""`llama2 rounds`: rejection sampling, tuning, and PPO, round after round, with a lineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import Json, RecipeSettings, ShowSettings
from llama2.cli.output import warn
from llama2.cli.progress import Bar
from llama2.cli.training import ConsoleReporter
from llama2.console import data, say

EXAMPLE = "Example: llama2 rounds recipes/rounds.toml --out rounds"
RECIPES = {"llama2 rounds": "llama2.align.rounds_settings:RoundsRecipe"}


def command(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/rounds.toml.", show_default=False),
    ] = None,
    settings: RecipeSettings = None,
    output: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder of all rounds.")] = Path("rounds"),
    verify: Annotated[
        bool, typer.Option("--verify", help="Walk the chain of hashes of a folder, and compute all of them again.")
    ] = False,
    as_json: Json = False,
    show_settings: ShowSettings = False,
) -> None:
    """Tune a model round after round: draw from the last round's model, tune the base on the best of all rounds.

    A round may have dialogs of Ghost Attention, distilled answers, and PPO on top. Held-out prompts measure each.

    lineage.json links what each stage read and left by hashes. A stage that is done is not done again. What was changed
    meanwhile is refused. The same command goes on where it was stopped.
    """
    from llama2 import hub
    from llama2 import recipe as recipes
    from llama2.align import rounds
    from llama2.align.rounds_settings import RoundsRecipe

    if verify:
        for line in rounds.verify(output):
            say(line)
        say(f"{output}: the chain holds")
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --verify", param_hint="RECIPE")
    chosen = recipes.load(recipe, RoundsRecipe, settings or ())
    lineage = rounds.rounds(
        chosen,
        output,
        beside=recipe.parent,
        locate=hub.locate,
        note=warn,
        progress=Bar(),
        reporter=ConsoleReporter(),
    )
    if as_json:
        data(json.dumps({"stages": lineage.stages, "run": lineage.run}))
        return
    for name in chosen.rounds:
        stage = lineage.find(f"{name}/measure")
        scores = stage["scores"] if stage else {}
        say(
            f"{name}: " + ", ".join(f"{k} {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in scores.items())
        )
    say(f"{output}: done; check it with: llama2 rounds --verify --out {output}")
