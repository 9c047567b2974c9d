"""What the training commands share: their options, how a run begins, and how it is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama2.cli.options import RecipeSettings, ShowSettings
from llama2.cli.output import warn
from llama2.cli.progress import clock
from llama2.console import rewrite, say

if TYPE_CHECKING:
    from llama2.train.loop import StepReport


@dataclass(frozen=True)
class RunOptions:
    """The run that a training command makes, or resumes."""

    name: Annotated[
        str | None,
        typer.Option(
            "--out", "--name", metavar="NAME", help="The run's name.", show_default="the recipe's, or the data's"
        ),
    ] = None
    runs: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of all runs.")] = Path("runs")
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of this name.")] = False
    show_settings: ShowSettings = False

    def folder(self, default: Path) -> Path:
        """The run's folder; without --name it has the name of a file."""
        return self.runs / (self.name or default.absolute().stem)


def training_command(
    *, recipe: str, train: str, sample: Callable[[Path, Sequence[str], int], list[str]], advice: str, help: str
) -> Callable[..., None]:
    """A command that trains by a recipe: RECIPE, KEY=VALUE, and RunOptions.

    `recipe` is its class of settings and `train` its function, as `module:name`, since both import PyTorch. `sample`
    continues texts with a state of the run. `advice` says what to type next, with `{folder}` for the run.
    """

    def command(
        file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/nano.toml.")],
        settings: RecipeSettings = None,
        *,
        options: RunOptions,
    ) -> None:
        from llama2 import recipe as recipes

        chosen = recipes.load(file, resolve_name(recipe), settings or ())
        folder = options.folder(file)
        run(resolve_name(train), chosen, folder, options, sample=sample, beside=file.parent)
        say(f"{folder}: done; {advice.format(folder=folder)}")

    command.__doc__ = help
    return command


def run(train: Callable[..., Any], recipe: Any, folder: Path, options: RunOptions, **arguments: Any) -> Any:
    """Train with the console as reporter, names of models found by the hub. Returns what `train` does."""
    from llama2 import hub

    return train(recipe, folder, locate=hub.locate, resume=options.resume, reporter=ConsoleReporter(), **arguments)


class ConsoleReporter:
    """A run on standard error: one line that is rewritten, or outside a terminal, a line every ten seconds."""

    def __init__(self) -> None:
        self._rewrites = sys.stderr.isatty()
        self._last = 0.0

    def begin(self, header: Sequence[str]) -> None:
        """Print what the run is."""
        for line in header:
            say(line, file=sys.stderr)

    def step(self, report: StepReport) -> None:
        """Print a step."""
        notable = report.validation is not None or report.note
        if not (self._rewrites or notable or report.step in (1, report.steps) or time.monotonic() - self._last > 10):
            return
        self._last = time.monotonic()
        text = (
            f"step {report.step}/{report.steps}  loss {report.loss:.4f}  {report.tokens_per_second:,.0f} tokens/s  "
            f"MFU {report.mfu:.0%}  {clock(report.seconds_left)} left"
        )
        if report.validation is not None:
            text += f"  validation {report.validation:.4f}"
        if report.sources:
            text += f" ({', '.join(f'{name} {loss:.4f}' for name, loss in report.sources.items())})"
        if report.note:
            text += f"  {report.note}"
        if self._rewrites:
            rewrite(text, ended=bool(notable) or report.step == report.steps)
        else:
            say(text, file=sys.stderr, flush=True)

    def note(self, note: str) -> None:
        """Print what happened between steps."""
        warn(note)
