"""`llama2 sft`: a model that answers as one's own dialogs do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama2 import files
from llama2.cli.options import Template
from llama2.cli.training import RunOptions, run
from llama2.console import say

if TYPE_CHECKING:
    from llama2.train.sft import Tuned
    from llama2.train.tuning import SftRecipe

EXAMPLE = "Example: llama2 sft -m smollm2-135m-instruct dialogs.jsonl --out mine"
RECIPES = {"llama2 sft": "llama2.train.tuning:SftRecipe"}

_OVERRIDE = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)*=")


@dataclass(frozen=True)
class AdapterOptions:
    """An adapter that is trained in place of the model's own weights."""

    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter of low rank (LoRA).")] = False
    qlora: Annotated[
        bool, typer.Option("--qlora", help="Train an adapter, and hold the model's matrices in 4 bits (QLoRA).")
    ] = False
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="An adapter to continue: a run, or a folder of peft's.")
    ] = None

    def settings(self) -> list[str]:
        """Those of [lora] that are chosen."""
        chosen = {"lora.quantize": "Q4_1" if self.qlora else None, "lora.adapter": self.adapter}
        return [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]


def command(
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
    options: RunOptions,
    template: Template = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count rows that are not dialogs, or too long.")
    ] = False,
    adapters: AdapterOptions,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train every weight, also of a model above a billion parameters."),
    ] = False,
) -> None:
    """Tune a model on dialogs, with loss on the assistant's messages alone.

    Dialogs are JSON lines, a JSON array, CSV or Parquet. Their form is OpenAI's (messages), ShareGPT's (conversations),
    TRL's (prompt and completion), Alpaca's or Dolly's, question and answer, or text with [INST] or ChatML in it.

    Steps, length and learning rate are fitted to the data, and shown before the first step. KEY=VALUE changes them,
    such as epochs=3 or optimizer.lr=1e-4.

    The run is a folder in runs/. It opens like any model: llama2 chat -m runs/NAME. With --lora or --qlora the run has
    an adapter: llama2 chat -m MODEL --adapter runs/NAME.
    """
    from llama2 import recipe as recipes
    from llama2.train.sft import sft
    from llama2.train.tuning import SftRecipe

    words = [*(words or ())]
    if recipe is None and words and words[0].endswith(".toml"):
        recipe = Path(words.pop(0))
    flags: dict[str, Any] = {"start": model, "template": template}
    flags |= {"data.skip_bad": skip_bad or None, "full": full or None}
    chosen = _recipe(recipe, [*adapters.settings(), *words], flags)
    if adapters.lora and chosen.lora is None:
        table = chosen.model_dump(mode="json", exclude_unset=True) | {"lora": {}}
        chosen = recipes.make(table, SftRecipe, where="--lora")
    folder = options.folder(recipe or chosen.data.files[0])
    _summary(run(sft, chosen, folder, options, sample=answers), folder, chosen.start if chosen.lora else None)


def _recipe(recipe: Path | None, words: list[str], flags: dict[str, Any]) -> SftRecipe:
    """The recipe, or one that is made of words and flags alone; KEY=VALUE is a setting unless a file is called so."""
    from llama2 import hub
    from llama2 import recipe as recipes
    from llama2.train.tuning import SftRecipe

    settings = [word for word in words if _OVERRIDE.match(word) and not files.exists(Path(word))]
    data = [word for word in words if word not in settings]
    if recipe is None and not data and not any(setting.startswith("data.files=") for setting in settings):
        raise typer.BadParameter("give files of dialogs, or a recipe", param_hint="DATA")
    flags = {**flags, "start": flags["start"] or (None if recipe else hub.DEFAULT), "data.files": data or None}
    settings += [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return recipes.load(recipe, SftRecipe, settings) if recipe else recipes.make({}, SftRecipe, settings, where="sft")


def _summary(tuned: Tuned, folder: Path, base: str | None) -> None:
    """Print losses before and after, and what to type next; `base` is the model of an adapter."""
    before, after = tuned.before, tuned.after
    _losses("held out", before and before.validation, after.validation)
    _losses("trained on", before and before.train, after.train)
    if before and (before.validation or 0) < (after.validation or 0):
        say("what is held out became less likely: try fewer epochs=, a lower optimizer.lr=, or more dialogs")
    model, merged = (f"-m {folder}", folder) if base is None else (f"-m {base} --adapter {folder}", base)
    end = "" if base is None else f" --adapter {folder}"
    say(f"{folder}: done; talk with it: llama2 chat {model}")
    say(f"for llama.cpp: llama2 convert {merged} {folder.name}.gguf --to gguf --format Q8_0{end}")
    say(f"for transformers: llama2 convert {merged} {folder.name}-hf --to hf{end}")


def _losses(dialogs: str, before: float | None, after: float | None) -> None:
    if after is not None:
        change = "" if before is None else f"{before:.3f} before, "
        say(f"loss of answers in dialogs {dialogs}: {change}{after:.3f} after")


def answers(model: Path, prompts: Sequence[str], tokens: int, adapter: Path | None = None) -> list[str]:
    """Questions with answers, by the engine that people will use the model with."""
    from llama2 import api

    with api.load(model, adapter=[adapter] if adapter else ()) as loaded:
        return [
            f"{prompt}\n{loaded.chat([{'role': 'user', 'content': prompt}], max_tokens=tokens, seed=0).text}"
            for prompt in prompts
        ]
