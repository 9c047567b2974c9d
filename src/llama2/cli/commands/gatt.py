"""`llama2 gatt`: dialogs that teach a model to keep an instruction, probes of whether it does, and the figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.groups import with_default
from llama2.cli.options import Json, RecipeSettings, ShowSettings, expand
from llama2.cli.output import warn
from llama2.cli.progress import Bar
from llama2.console import data, say

RECIPES = {"llama2 gatt make": "llama2.align.gatt_settings:GattRecipe"}

group = typer.Typer(cls=with_default("make"), rich_markup_mode=None, no_args_is_help=True)

_Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/gatt.toml.")]


@group.callback(epilog="Example: llama2 gatt recipes/gatt.toml dialogs=200")
def _gatt() -> None:
    """Teach a model to keep an instruction to the end of a dialog (Ghost Attention), and see whether it does.

    `llama2 gatt RECIPE` makes the dialogs.
    """


def make(
    file: _Recipe,
    settings: RecipeSettings = None,
    as_json: Json = False,
    show_settings: ShowSettings = False,
) -> None:
    """Make dialogs whose instruction is in the first turn alone, and whose last answer still follows it.

    A model answers while every user's message begins with the instruction. The best of some answers stays: one that
    passes the instruction's check, with the best reward. The data then have the instruction at the beginning alone,
    and a loss on the last answer alone.

    The output has gatt.jsonl for `llama2 sft`, and report.json. The time is estimated first. A run that was stopped
    goes on with the same command, to the same bytes.
    """
    from llama2 import recipe as recipes
    from llama2.align import gatt
    from llama2.align.gatt_settings import GattRecipe
    from llama2.align.scorers import open_scorers

    recipe = recipes.load(file, GattRecipe, settings or ())
    with open_scorers(recipe.reward_models, recipe.runtime) as scorers:
        report = gatt.gatt(recipe, scorers, note=warn, progress=Bar())
    if as_json:
        data(json.dumps(report))
        return
    dialogs = recipe.output / gatt.DIALOGS
    for reason, count in report["left_out"].items():
        say(f"{count:,} dialogs left out: {reason}")
    say(f"{dialogs}: {report['dialogs']:,} dialogs, {report['checked']:,} of them with checked instructions")
    say(f"tune with them: llama2 sft -m MODEL {dialogs}")


group.command(epilog="Example: llama2 gatt recipes/gatt.toml samples=8 place=user")(expand(make))


@group.command(epilog="Example: llama2 gatt probe recipes/gatt.toml smollm2-135m-instruct runs/gatt")
def probe(
    file: _Recipe,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Models; the others are compared with the first.")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether models still follow an instruction of the first turn at turns 2, 4, 6 and 20.

    Dialogs are made of held-out prompts, and each model's own answers. Instructions are those that a program can check.
    """
    from llama2 import recipe as recipes
    from llama2.align import gatt
    from llama2.align.gatt_settings import GattRecipe

    recipe = recipes.load(file, GattRecipe, settings or ())
    report = gatt.probe(recipe, models, note=warn, progress=Bar())
    if as_json:
        data(json.dumps(report))
        return
    for name, found in report["models"].items():
        for turn, rate in found["turns"].items():
            line = f"{name}: turn {turn}: {rate['mean']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}] follow"
            if "chance" in found:
                line += f", {found['chance'][turn]['mean']:.0%} by chance"
            if "compared" in found:
                pair = found["compared"][turn]
                line += f"; {pair['difference']:+.0%} to {models[0]}, p = {pair['p']:.2g}"
            say(line)
    say(f"{recipe.output / gatt.PROBES}: rates by turn and by instruction")


@group.command(epilog="Example: llama2 gatt attention dialog.jsonl smollm2-135m-instruct runs/gatt")
def attention(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Dialogs as for sft; the first one is read.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Models, drawn side by side.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The figure.")] = Path("attention.png"),
    as_json: Json = False,
) -> None:
    """Draw how strongly each answer of a dialog reads its first message: the largest weight of all heads and layers."""
    from llama2 import api
    from llama2.align import gatt_attention
    from llama2.data import dialogs
    from llama2.errors import DataError

    dialog = next((dialog.dialog for _, dialog in dialogs.read([file])), None)
    if dialog is None:
        raise DataError(f"{file}: holds no dialog; give one a line")
    found = {}
    for name in models:
        with api.open_checkpoint(name) as opened:
            found[name] = gatt_attention.look(opened, dialog)
    gatt_attention.draw(found, output)
    if as_json:
        data(json.dumps(found))
        return
    for name, each in found.items():
        say(f"{name}: weight on the first message by answer: {', '.join(f'{w:.2f}' for w in each['answers'])}")
    say(f"{output}: the figure")
