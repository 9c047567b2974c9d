"""`llama2 reward`: train a reward model on preference pairs, and score dialogs with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llama2.cli.groups import with_default
from llama2.cli.options import RecipeSettings, Threads, expand
from llama2.cli.progress import Bar
from llama2.cli.training import RunOptions, run
from llama2.console import data, say

RECIPES = {"llama2 reward train": "llama2.align.reward_recipe:RewardRecipe"}


group = typer.Typer(cls=with_default("train"), rich_markup_mode=None, no_args_is_help=True)


@group.callback(epilog="Example: llama2 reward recipes/reward-helpful.toml --name helpful")
def _reward() -> None:
    """Train a reward model on preference pairs, or score dialogs with one.

    `llama2 reward RECIPE` trains.
    """


def train(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/reward-helpful.toml.")],
    settings: RecipeSettings = None,
    *,
    options: RunOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Train a reward model from a chat model: which of two answers people prefer.

    Pairs are JSON lines of prompt, chosen and rejected, as TRL writes them, Anthropic's dialogues, or OpenAssistant's
    trees. A grade gives a margin, a safety label a loss beside the ranking.

    Pairs whose prompts were held out are scored at the end. The table has accuracy by grade, by safety and by which
    answer is longer, calibration, and two baselines.

    The run is a folder in runs/. It opens like any model: llama2 reward score runs/NAME dialogs.jsonl
    """
    from llama2 import recipe as recipes
    from llama2.align.reward_recipe import RewardRecipe
    from llama2.align.reward_training import reward

    chosen = recipes.load(file, RewardRecipe, settings or ())
    folder = options.folder(file)
    done = run(reward, chosen, folder, options, progress=Bar())
    if done.report is None:
        return
    if as_json:
        data(json.dumps(done.report.sets))
        return
    for line in done.report.lines():
        say(line)
    say(f"{folder}: done; score dialogs with it: llama2 reward score {folder} dialogs.jsonl")


group.command(epilog="Example: llama2 reward recipes/reward-safety.toml --name safety data.held_out=400")(expand(train))


@group.command(epilog="Example: llama2 reward score runs/helpful dialogs.jsonl --json")
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model: a run, a folder, or a name.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Dialogs that end with the assistant, as for sft.")],
    sigmoid: Annotated[bool, typer.Option("--sigmoid", help="Scores from 0 to 1, as the paper reports them.")] = False,
    neutralise: Annotated[
        bool, typer.Option("--neutralise", help="Break role markers in messages instead of refusing them.")
    ] = False,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each dialog.")] = False,
) -> None:
    """Score the last answer of each dialog: a line with the score, and the dialog's place.

    Only scores of one reward model compare. Progress is on standard error.
    """
    from llama2 import api
    from llama2.align.reward import score_tokens, tokens_of
    from llama2.data import dialogs
    from llama2.errors import DataError, DialogError

    report = dialogs.ReadReport()
    read = [(where, dialog.dialog) for where, dialog in dialogs.read([file], report)]
    if not read:
        raise DataError(f"{file}: holds no dialog; give one a line")
    with api.load(model, threads=threads) as loaded:
        rows: list[Any] = []
        for where, dialog in read:
            try:
                rows += tokens_of(loaded.checkpoint, [dialog], neutralise=neutralise)
            except DialogError as error:
                raise DataError(f"{where}: {str(error).removeprefix('dialog 0: ')}") from None
        bar, total = Bar(), len(rows)
        scores = score_tokens(loaded, rows, sigmoid=sigmoid, progress=lambda done: bar("scoring", done, total))
    for (where, _), found in zip(read, scores.tolist(), strict=True):
        if as_json:
            data(json.dumps({"where": where, "score": found}))
        else:
            data(f"{found:.6f}\t{where}")
