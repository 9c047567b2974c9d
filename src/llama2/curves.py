"""Curves of training runs: loss, and validation loss beside it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Literal

from llama2.console import visible
from llama2.errors import RunError

Axis = Literal["tokens", "step", "hours"]

#: Kinds of files, and titles of the horizontal axes.
FORMATS = (".png", ".svg", ".pdf")
AXES: dict[Axis, str] = {"tokens": "tokens", "step": "steps", "hours": "hours of steps"}
#: Half-life in steps of a curve's mean.
_HALF_LIFE = 20


def draw(curves: dict[str, list[dict[str, Any]]], against: Axis, file: Path) -> None:
    """Draw loss, each step's and their mean with a half-life of 20 steps, and beside it validation loss, if any.

    Raises RunError when no run has metrics, or matplotlib is missing.
    """
    if not any(curves.values()):
        raise RunError("no run has metrics to draw; let one do a step")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("drawing needs matplotlib: pip install 'whole-llama[train]'") from None
    validated = any(line.get("validation") is not None for lines in curves.values() for line in lines)
    figure = Figure(figsize=(12 if validated else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for number, (name, lines) in enumerate(curves.items()):
        x = places(lines, against)
        losses = [math.nan if line.get("loss") is None else line["loss"] for line in lines]
        colour, label = f"C{number % 10}", _label(name)
        panels[0].plot(x, losses, color=colour, alpha=0.25, linewidth=0.7)
        panels[0].plot(x, smooth(losses), color=colour, label=label)
        if validated:
            points = [(at, y) for at, line in zip(x, lines, strict=True) if (y := line.get("validation")) is not None]
            panels[1].plot(*zip(*points, strict=True) if points else ((), ()), "o-", color=colour, label=label)
    for panel, title in zip(panels, ("training loss", "validation loss"), strict=False):
        panel.set(title=title, xlabel=AXES[against], ylabel="nats a token")
        panel.grid(alpha=0.3)
        panel.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name may have letters that the font lacks
        figure.savefig(file, dpi=150)


def _label(name: str) -> str:
    """A run's name, in which matplotlib is to see no formula, and nothing that has no UTF-8."""
    return visible(" ".join(name.split())).encode("utf-8", "replace").decode().replace("$", r"\$")


def places(lines: list[dict[str, Any]], against: Axis) -> list[float]:
    """Where a run's steps are on the horizontal axis."""
    if against != "hours":
        return [line.get(against) or 0 for line in lines]
    total = 0.0
    return [(total := total + (line.get("seconds") or 0) / 3600) for line in lines]


def smooth(losses: list[float]) -> list[float]:
    """Mean of the losses up to each, whose weights halve every 20 steps; what is not finite weighs nothing."""
    keep = 0.5 ** (1 / _HALF_LIFE)
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = total * keep, weight * keep
        if math.isfinite(loss):
            total, weight = total + loss, weight + 1
        means.append(total / weight if weight else math.nan)
    return means
