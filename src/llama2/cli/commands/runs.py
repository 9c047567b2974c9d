"""`llama2 runs`: what training runs did, in a table and as curves side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llama2 import files
from llama2.cli.options import Json
from llama2.cli.output import one_line, warn
from llama2.console import data, say
from llama2.curves import FORMATS, Axis, draw
from llama2.errors import RunError
from llama2.records import ORIGIN, Run
from llama2.train.card import LAST, perplexity

EXAMPLE = "Example: llama2 runs first second --plot curves.png"

#: Where a number gets an exponent, letters of a text in the table, and names of runs in a message.
_WIDE, _WIDEST, _NAMES = 10**15, 60, 20


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Runs, by default all of the folder.", show_default=False)
    ] = None,
    *,
    folder: Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Folder of all runs.")] = Path("runs"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw loss and validation loss: a .png, .svg or .pdf.")
    ] = None,
    against: Annotated[Axis, typer.Option(help="The drawing's horizontal axis.")] = "tokens",
    as_json: Json = False,
) -> None:
    """List training runs, and draw them side by side.

    LOSS is the mean of the last 50 steps, with the 95 % interval of a mean of as many independent ones. VALIDATION is
    the last measured loss, and --json has each source's; PPL is its perplexity. A dash marks metrics that a run does
    not have, or that are damaged.
    """
    if plot is not None and plot.suffix not in FORMATS:
        raise typer.BadParameter(f"--plot {plot}: the name must end in one of {', '.join(FORMATS)}")
    chosen = {name: _find(folder, name) for name in names} if names else _all(folder)
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, run in chosen.items():
        row, lines = summary(name, run)
        rows.append(row)
        if plot is not None:
            curves[name] = lines
        for damage in row["damage"]:
            warn(damage)
    if not names:
        rows.sort(key=lambda row: (row["begun"] is None, row["begun"], row["name"]))
    if plot is not None:
        draw({row["name"]: curves[row["name"]] for row in rows}, against, plot)
    if as_json:
        data(json.dumps({"runs": rows}))
    elif not rows:
        say(f"No runs in {folder} yet; `llama2 pretrain recipes/nano.toml` begins one.")
    else:
        _print(rows)
        if plot is not None:
            say(f"{plot}: {len(rows)} runs")


def _all(folder: Path) -> dict[str, Run]:
    """Every run in a folder."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: Run(path) for path in paths if files.exists(path / ORIGIN)}


def _find(folder: Path, name: str) -> Run:
    """A run by its name, or its own folder."""
    for path in (folder / name, Path(name)):
        if files.exists(path / ORIGIN):
            return Run(path)
    there = ", ".join([*_all(folder)][:_NAMES]) or "none"
    raise RunError(f"{name}: is not a run of {folder} (there: {there}); name one of them, or a run's folder")


def summary(name: str, run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's metrics, None for those it does not have, and its curve.

    `damage` says which of its files cannot be read; their metrics are None too.
    """
    damage: list[str] = []

    def read(what: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return what()
        except (RunError, OSError) as error:
            damage.append(str(error) if isinstance(error, RunError) else f"{run.folder}: {error.strerror}")
            return otherwise

    origin: dict[str, Any] = read(lambda: run.origin, {})
    lines: list[dict[str, Any]] = read(run.curve, [])
    steps = read(lambda: run.recipe, {}).get("steps")
    last, nothing = lines[-1] if lines else {}, None if damage else 0
    losses = _metric(lines[-LAST:], "loss")
    speeds, shares = _metric(lines, "tokens_per_second"), _metric(lines, "mfu")
    measured: dict[str, Any] = next((line for line in reversed(lines) if line.get("validation") is not None), {})
    validation = measured.get("validation")
    row = {
        "name": name,
        "folder": str(run.folder),
        "begun": origin.get("date"),
        "commit": origin.get("commit"),
        "seed": origin.get("seed"),
        "parameters": origin.get("parameters"),
        "step": last.get("step", nothing),
        "steps": steps if type(steps) is int and abs(steps) < _WIDE else None,
        "tokens": last.get("tokens", nothing),
        "loss": statistics.fmean(losses) if losses else None,
        "loss_interval": 1.96 * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None,
        "validation": validation,
        "perplexity": perplexity(validation),
        "sources": measured.get("sources", {}),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(shares) if shares else None,
        "notes": sum("note" in line for line in lines),
        "damage": damage,
    }
    return row, lines


def _metric(lines: list[dict[str, Any]], name: str) -> list[float]:
    """A metric, of the lines that have it."""
    return [line[name] for line in lines if line.get(name) is not None]


def _print(rows: list[dict[str, Any]]) -> None:
    titles = ("NAME", "PARAMETERS", "STEP", "TOKENS", "LOSS", "VALIDATION", "PPL", "TOKENS/S", "MFU", "BEGUN")
    table = [titles, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        rest = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        say("  ".join([f"{name:{widths[0]}}", *rest]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if abs(value) >= _WIDE else f"{value:{form}}"

    def text(value: str) -> str:
        line = one_line(value)
        return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"

    loss = shown(row["loss"], ".4f")
    if row["loss_interval"] is not None:
        loss += f" ± {shown(row['loss_interval'], '.4f')}"
    return (
        text(row["name"]),
        shown(row["parameters"], ","),
        f"{shown(row['step'], ',')}/{shown(row['steps'], ',')}",
        shown(row["tokens"], ","),
        loss,
        shown(row["validation"], ".4f"),
        shown(row["perplexity"], ".2f"),
        shown(row["tokens_per_second"], ",.0f"),
        shown(row["mfu"], ".1%"),
        text(row["begun"] or "-"),
    )
