"""`llama2 runs`: what training runs did, in a table and as curves side by side."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llama2.cli.output import one_line
from llama2.errors import RunError
from llama2.records import ORIGIN, Run

EXAMPLE = "Example: llama2 runs first second --plot curves.png"

#: Last steps whose mean loss a run is told by, and half-life in steps of a curve's mean.
_LAST, _HALF_LIFE = 50, 20

_FORMATS = (".png", ".svg", ".pdf")
_AXES = {"tokens": "tokens", "step": "steps", "hours": "hours of steps"}


def runs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Runs, by default all of the folder.", show_default=False)
    ] = None,
    *,
    folder: Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where runs are kept.")] = Path("runs"),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw loss and validation loss: a .png, .svg or .pdf.")
    ] = None,
    against: Annotated[Literal["tokens", "step", "hours"], typer.Option(help="The drawing's horizontal axis.")] = (
        "tokens"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List training runs, and draw them side by side.

    LOSS is the mean of the last 50 steps, with the 95 % interval of a mean of as many independent ones. VALIDATION is
    the last that was measured; PPL is its perplexity.
    """
    if plot is not None and plot.suffix not in _FORMATS:
        raise typer.BadParameter(f"--plot {plot}: the name must end in one of {', '.join(_FORMATS)}")
    chosen = {name: _find(folder, name) for name in names} if names else _all(folder)
    rows = [summary(name, run) for name, run in chosen.items()]
    if plot is not None:
        draw({name: curve(run) for name, run in chosen.items()}, against, plot)
    if as_json:
        print(json.dumps({"runs": rows}))
    elif not rows:
        print(f"No runs in {folder} yet; `llama2 pretrain recipes/nano.toml` begins one.")
    else:
        _print(rows)
        if plot is not None:
            print(f"{plot}: {len(rows)} runs")


def _all(folder: Path) -> dict[str, Run]:
    """Runs in a folder, the oldest first."""
    found = [Run.open(path.parent) for path in folder.glob(f"*/{ORIGIN}")]
    return {run.folder.name: run for run in sorted(found, key=lambda run: (run.origin["date"], run.folder.name))}


def _find(folder: Path, name: str) -> Run:
    """A run by its name, or its own folder."""
    for path in (folder / name, Path(name)):
        if (path / ORIGIN).is_file():
            return Run.open(path)
    there = ", ".join(_all(folder)) or "none"
    raise RunError(f"{name}: is no run of {folder} (there: {there}); name one of them, or a run's folder")


def curve(run: Run) -> list[dict[str, Any]]:
    """A run's figures by step; of those that were done again after the run went back, the later ones."""
    return [line for _, line in sorted({line["step"]: line for line in run.metrics()}.items())]


def summary(name: str, run: Run) -> dict[str, Any]:
    """What a run has come to; None for what it has no figures of."""
    origin, lines = run.origin, curve(run)
    last = lines[-1] if lines else {}
    losses = [line["loss"] for line in lines[-_LAST:] if line["loss"] is not None]
    speeds = [line["tokens_per_second"] for line in lines]
    validation = next((line["validation"] for line in reversed(lines) if "validation" in line), None)
    return {
        "name": name,
        "folder": str(run.folder),
        "begun": origin["date"],
        "commit": origin["commit"],
        "seed": origin.get("seed"),
        "parameters": origin.get("parameters"),
        "step": last.get("step", 0),
        "steps": run.recipe.get("steps"),
        "tokens": last.get("tokens", 0),
        "loss": statistics.fmean(losses) if losses else None,
        "loss_interval": 1.96 * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None,
        "validation": validation,
        "perplexity": None if validation is None else math.exp(validation),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(line["mfu"] for line in lines) if lines else None,
        "notes": sum("note" in line for line in lines),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    titles = ("NAME", "PARAMETERS", "STEP", "TOKENS", "LOSS", "VALIDATION", "PPL", "TOKENS/S", "MFU", "BEGUN")
    table = [titles, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        rest = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"{name:{widths[0]}}", *rest]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    loss = shown(row["loss"], ".4f")
    if row["loss_interval"] is not None:
        loss += f" ± {row['loss_interval']:.4f}"
    return (
        one_line(row["name"]),
        shown(row["parameters"], ","),
        f"{row['step']:,}/{shown(row['steps'], ',')}",
        f"{row['tokens']:,}",
        loss,
        shown(row["validation"], ".4f"),
        shown(row["perplexity"], ".2f"),
        shown(row["tokens_per_second"], ",.0f"),
        shown(row["mfu"], ".1%"),
        row["begun"],
    )


def draw(curves: dict[str, list[dict[str, Any]]], against: Literal["tokens", "step", "hours"], file: Path) -> None:
    """Draw loss, each step's and their mean with a half-life of 20 steps, and beside it validation loss, if any.

    Raises RunError when no run has figures, or matplotlib is missing.
    """
    if not any(curves.values()):
        raise RunError("no run has figures to draw; let one do a step")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("drawing needs matplotlib: pip install 'whole-llama[train]'") from None
    validated = any("validation" in line for lines in curves.values() for line in lines)
    figure = Figure(figsize=(12 if validated else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for number, (name, lines) in enumerate(curves.items()):
        places = axis(lines, against)
        losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
        colour = f"C{number % 10}"
        panels[0].plot(places, losses, color=colour, alpha=0.25, linewidth=0.7)
        panels[0].plot(places, smooth(losses), color=colour, label=name)
        if validated:
            points = [(x, line["validation"]) for x, line in zip(places, lines, strict=True) if "validation" in line]
            panels[1].plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=name)
    for panel, title in zip(panels, ("training loss", "validation loss"), strict=False):
        panel.set(title=title, xlabel=_AXES[against], ylabel="nats a token")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(file, dpi=150)


def axis(lines: list[dict[str, Any]], against: Literal["tokens", "step", "hours"]) -> list[float]:
    """Where a run's steps stand on the horizontal axis."""
    if against != "hours":
        return [line[against] for line in lines]
    total = 0.0
    return [(total := total + line["seconds"] / 3600) for line in lines]


def smooth(losses: list[float]) -> list[float]:
    """Mean of the losses up to each, whose weights halve every 20 steps; what is no number weighs nothing."""
    keep = 0.5 ** (1 / _HALF_LIFE)
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = total * keep, weight * keep
        if math.isfinite(loss):
            total, weight = total + loss, weight + 1
        means.append(total / weight if weight else math.nan)
    return means
