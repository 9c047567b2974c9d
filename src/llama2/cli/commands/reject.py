"""`llama2 reject`: many answers to each prompt, and the best of them as data to tune with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama2.cli.options import Json, RecipeSettings, ShowSettings
from llama2.cli.output import warn
from llama2.cli.progress import Bar
from llama2.console import data, say

if TYPE_CHECKING:
    from llama2.align.rejection_settings import RejectionRecipe

EXAMPLE = "Example: llama2 reject recipes/reject.toml samples=8 --json"
RECIPES = {"llama2 reject": "llama2.align.rejection_settings:RejectionRecipe"}


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/reject.toml.")],
    settings: RecipeSettings = None,
    as_json: Json = False,
    show_settings: ShowSettings = False,
) -> None:
    """Draw answers to prompts, score them with reward models, and write the best as data (rejection sampling).

    K answers to each prompt come from one model, or from those of several rounds. One store keeps them all.
    Each model's temperature is chosen by the rewards of a sweep. Two rewards become one: safety where it is low or
    the prompt is tagged, helpfulness elsewhere.

    The output has best.jsonl for `llama2 sft`, preferences.jsonl for TRL's trainers, and report.json with curves.

    The time is estimated first. A run that was stopped goes on with the same command, to the same bytes.
    """
    from llama2 import recipe as recipes
    from llama2.align.rejection import reject
    from llama2.align.rejection_settings import RejectionRecipe
    from llama2.align.scorers import open_scorers

    chosen = recipes.load(recipe, RejectionRecipe, settings or ())
    with open_scorers(chosen.rewards.models, chosen.runtime) as scorers:
        report = reject(chosen, scorers, note=warn, progress=Bar())
    if as_json:
        data(json.dumps(report))
    else:
        _summary(chosen, report)


def _summary(recipe: RejectionRecipe, report: dict[str, Any]) -> None:
    """Print each round's rewards, what was chosen, and what to type next."""
    for name, each in report["rounds"].items():
        first, last = each["curve"][0], each["curve"][-1]
        say(
            f"{name}: reward {first['maximum']:.3f} of one answer, {last['maximum']:.3f} of the best of {last['k']}, "
            f"{last['median']:.3f} of the median, at temperature {each['temperature']:g}; "
            f"{each['tokens']:.0f} tokens an answer, {last['tokens']:.0f} of the best"
        )
        if each["cut"] or each["empty"]:
            say(f"{name}: of {each['answers']:,} answers, max_tokens cut {each['cut']:,}; {each['empty']:,} are empty")
    best = report["best"]
    without = f", {best['without']:,} prompts without one" if best["without"] else ""
    say(
        f"{recipe.output}: {best['dialogs']:,} best answers{without}, reward {best['reward']['best']:.3f} "
        f"(all answers: {best['reward']['all']:.3f}), KL at most {best['kl_bound']:.2f} nats from what drew them; "
        f"{best['pairs']:,} pairs"
    )
    say(f"tune with them: llama2 sft -m MODEL {recipe.output / 'best.jsonl'}")
