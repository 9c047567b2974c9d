"""`llama2 pretrain`: a base model from a corpus."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama2.cli.options import RecipeSettings, Resume, RunName, RunsFolder, ShowSettings
from llama2.cli.output import warn
from llama2.console import rewrite, say

if TYPE_CHECKING:
    from llama2.train.loop import Line

EXAMPLE = "Example: llama2 pretrain recipes/nano.toml --name first steps=500 optimizer.rate=2e-3"


def pretrain(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/nano.toml.")],
    settings: RecipeSettings = None,
    *,
    name: RunName = None,
    runs: RunsFolder = Path("runs"),
    resume: Resume = False,
    show_settings: ShowSettings = False,
) -> None:
    """Train a model on a corpus, which is built first if the recipe says how.

    data.dir=FOLDER takes any folder of documents: texts, Markdown, code, HTML, JSON lines, Parquet, also compressed.

    start=MODEL goes on from a model that is there, with its shape and tokenizer: a run, a folder, a GGUF file, a name.
    The learning rate then warms up again, from zero to optimizer.rate in optimizer.warmup steps, and falls from there;
    choose a peak well below that of the first training, as recipes/continue.toml does.

    One process uses all cores or one GPU. For more:
    torchrun --nproc-per-node N $(which llama2) pretrain RECIPE, with mesh.tensor=M to share matrices among M.

    The run is a folder in runs/. It opens like any model: llama2 generate -m runs/NAME "Once upon a time".
    """
    from llama2 import hub
    from llama2 import recipe as recipes
    from llama2.train.pretrain import pretrain as run
    from llama2.train.settings import PretrainRecipe

    asked = recipes.load(recipe, PretrainRecipe, settings or ())
    folder = runs / (name or recipe.stem)
    run(asked, folder, beside=recipe.parent, locate=hub.locate, resume=resume, sample=sample, watch=Shown())
    say(f"{folder}: done; continue a text with: llama2 generate -m {folder} TEXT")


def sample(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Continue texts with the engine that people will use the model with."""
    import llama2

    with llama2.load(model) as loaded:
        return [prompt + loaded.generate(prompt, max_tokens=tokens, temperature=0.8, seed=0).text for prompt in prompts]


class Shown:
    """The run on the screen: a line that changes, or where nobody sees it change, a line now and then."""

    def __init__(self) -> None:
        self._changes = sys.stderr.isatty()
        self._last = 0.0

    def begin(self, facts: Sequence[str]) -> None:
        """What the run is."""
        for fact in facts:
            say(fact, file=sys.stderr)

    def line(self, line: Line) -> None:
        """A step was done."""
        told = line.validation is not None or line.note
        if not (self._changes or told or line.step in (1, line.steps) or time.monotonic() - self._last > 10):
            return
        self._last = time.monotonic()
        text = (
            f"step {line.step}/{line.steps}  loss {line.loss:.4f}  {line.tokens_per_second:,.0f} tokens/s  "
            f"MFU {line.mfu:.0%}  {clock(line.seconds_left)} left"
        )
        if line.validation is not None:
            text += f"  validation {line.validation:.4f}"
        if line.sources:
            text += f" ({', '.join(f'{name} {loss:.4f}' for name, loss in line.sources.items())})"
        if line.note:
            text += f"  {line.note}"
        ended = bool(told) or line.step == line.steps
        if self._changes:
            rewrite(text, ended=ended)
        else:
            say(text, file=sys.stderr, flush=True)

    def note(self, note: str) -> None:
        """Something happened between steps."""
        warn(note)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
