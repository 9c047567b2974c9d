"""`llama2 sft`: a model that answers as one's own dialogs do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama2 import files
from llama2.cli.options import Resume, RunsFolder, ShowSettings, Template
from llama2.cli.pretrain import Shown
from llama2.console import say

if TYPE_CHECKING:
    from llama2.train.sft import Tuned

EXAMPLE = "Example: llama2 sft -m smollm2-135m-instruct dialogs.jsonl --out mine"

_OVERRIDE = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)*=")


def sft(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA|KEY=VALUE",
            help="Files and folders of dialogs; settings in place of the fitted ones. A first word that ends in .toml "
            "is a recipe.",
        ),
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="The model to begin with.",
            show_default="the recipe's, or our default",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file, such as recipes/nano-sft.toml.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--out", "--name", metavar="NAME", help="The run's name.", show_default="the recipe's, or the data's"
        ),
    ] = None,
    runs: RunsFolder = Path("runs"),
    resume: Resume = False,
    template: Template = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count rows that are no dialogs, or too long.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train every weight, also of a model above a billion parameters."),
    ] = False,
    show_settings: ShowSettings = False,
) -> None:
    """Tune a model on dialogs, with loss on what the assistant says alone.

    Dialogs are JSON lines, a JSON array, CSV or Parquet, in OpenAI's form (messages), ShareGPT's (conversations), TRL's
    (prompt and completion), Alpaca's or Dolly's, as question and answer, or as text with [INST] or ChatML in it.

    How many steps, how long, at what rate: fitted to the data, and shown before the first step. KEY=VALUE changes it,
    such as epochs=3 or optimizer.rate=1e-4.

    The run is a folder in runs/. It opens like any model: llama2 chat -m runs/NAME.
    """
    from llama2 import hub
    from llama2 import recipe as recipes
    from llama2.train.sft import sft as run
    from llama2.train.tuning import SftRecipe

    given = [*(words or ())]
    if recipe is None and given and given[0].endswith(".toml"):
        recipe = Path(given.pop(0))
    settings = [word for word in given if _OVERRIDE.match(word) and not files.exists(Path(word))]
    data = [word for word in given if word not in settings]
    if recipe is None and not data and not any(setting.startswith("data.files=") for setting in settings):
        raise typer.BadParameter("give files of dialogs, or a recipe", param_hint="DATA")
    start = model or (None if recipe else hub.DEFAULT)
    chosen: dict[str, Any] = {"start": start, "data.files": data or None, "template": template}
    chosen |= {"data.skip_bad": skip_bad or None, "full": full or None}
    settings += [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    asked = recipes.load(recipe, SftRecipe, settings) if recipe else recipes.make({}, SftRecipe, settings, where="sft")
    folder = runs / (name or (recipe or asked.data.files[0].absolute()).stem)
    _tell(run(asked, folder, locate=hub.locate, resume=resume, sample=sample, watch=Shown()), folder)


def _tell(tuned: Tuned, folder: Path) -> None:
    """What was learnt, and what to type next."""
    before, after = tuned.before, tuned.after
    _tell_loss("held out", before and before.validation, after.validation)
    _tell_loss("learnt", before and before.train, after.train)
    if before and (before.validation or 0) < (after.validation or 0):
        say("what is held out became less likely: try fewer epochs=, a lower optimizer.rate=, or more dialogs")
    say(f"{folder}: done; talk with it: llama2 chat -m {folder}")
    say(f"for llama.cpp: llama2 convert {folder} {folder.name}.gguf --to gguf --format Q8_0")
    say(f"for transformers: llama2 convert {folder} {folder.name}-hf --to hf")


def _tell_loss(what: str, before: float | None, after: float | None) -> None:
    if after is not None:
        say(f"loss of answers in dialogs {what}: {'' if before is None else f'{before:.3f} before, '}{after:.3f} after")


def sample(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Questions with the answers that the engine people will use gives."""
    import llama2

    with llama2.load(model) as loaded:
        return [
            f"{prompt}\n{loaded.chat([{'role': 'user', 'content': prompt}], max_tokens=tokens, seed=0).text}"
            for prompt in prompts
        ]
