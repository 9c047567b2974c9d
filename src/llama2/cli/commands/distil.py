"""`llama2 distil`: safer answers of a pre-prompt as data, without the pre-prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.options import Json, RecipeSettings, ShowSettings
from llama2.cli.output import warn
from llama2.cli.progress import Bar
from llama2.console import data, say

EXAMPLE = "Example: llama2 distil recipes/distil.toml samples=4"
RECIPES = {"llama2 distil": "llama2.align.distillation_settings:DistilRecipe"}


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/distil.toml.")],
    settings: RecipeSettings = None,
    as_json: Json = False,
    show_settings: ShowSettings = False,
) -> None:
    """Draw answers to risky prompts behind safety pre-prompts, and keep those that are safer (context distillation).

    Pre-prompts are generic, or a template of steps for a kind of risk. What is written has the prompt without them.
    An answer is kept only where the safety reward rises over the original answer's.

    The output has distilled.jsonl for `llama2 sft`, and report.json. The time is estimated first. A run that was
    stopped goes on with the same command, to the same bytes.
    """
    from llama2 import recipe as recipes
    from llama2.align import distillation
    from llama2.align.distillation_settings import DistilRecipe
    from llama2.align.scorers import open_scorers

    chosen = recipes.load(recipe, DistilRecipe, settings or ())
    with open_scorers(chosen.rewards.models, chosen.runtime) as scorers:
        report = distillation.distil(chosen, scorers, note=warn, progress=Bar())
    if as_json:
        data(json.dumps(report))
        return
    for name, each in report["rewards"].items():
        if each:
            refusals = "" if each["refused"] is None else f", {each['refused']:.0%} refuse"
            say(f"{name}: safety {each['safety']['median']:.3f} (median), {each['tokens']:.0f} tokens{refusals}")
    for reason, count in report["left_out"].items():
        say(f"{count:,} of {report['prompts']:,} prompts left out: {reason}")
    output = chosen.output / distillation.DISTILLED
    say(f"{output}: {report['kept']:,} dialogs; tune with them: llama2 sft -m MODEL {output}")
