"""A run's scores as a person reads them: the paper's table of groups, a line a task, and bars with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2.errors import EvaluationError
from llama2.evaluate.abstention import COVERAGES
from llama2.evaluate.intervals import Interval
from llama2.evaluate.published import LLAMA_2, group_means, groups
from llama2.evaluate.scores import score

#: Kinds of files that a plot can be.
FORMATS = (".png", ".svg", ".pdf")
_NONE = "-"


def lines(record: Mapping[str, Any]) -> list[str]:
    """The record as text: groups as columns, tasks as rows, then what was not run and why."""
    shown = [*_group_table(record), *_task_table(record)]
    shown += _contamination_table(record["tasks"])
    shown += _abstention_table(record["tasks"])
    for label, task in record["tasks"].items():
        if found := task.get("by"):
            shown += ["", *_by_table(label, found)]
    if spread := record.get("formats"):
        shown += ["", *_format_table(spread)]
    return [line.rstrip() for line in shown]


def _group_table(record: Mapping[str, Any]) -> list[str]:
    """The model's row above the paper's, in percent, of groups with tasks in the run.

    A group with a missing member has a dash, and a line below that says why.
    """
    touched = [group for group in groups() if any(name in record["tasks"] for name in group.members)]
    if not touched:
        return []
    found = {group.name: record["groups"][group.name] for group in touched}
    means = {name: group["mean"] for name, group in found.items()}
    rows = [
        ["", *(group.title for group in touched)],
        [record["model"], *(_percent(mean and mean["mean"]) for mean in means.values())],
    ]
    if any(mean and mean["low"] is not None for mean in means.values()):
        rows.append(["  95 % interval", *(_bounds(mean) for mean in means.values())])
    for model in LLAMA_2:
        published = group_means(model)
        rows.append([model, *(f"{published[name]:.1f}" for name in found)])
    missing = [
        f"{group['title']} does not have a mean: without {', '.join(group['missing'])}"
        for group in found.values()
        if group["missing"]
    ]
    return [*columns(rows), *missing, ""]


def _task_table(record: Mapping[str, Any]) -> list[str]:
    """Each task's score, its interval, and its distance to Llama 2 7B, in percent and points."""
    rows = [["", "shots", "items", "score", "95 % interval", "metric", "Llama 2 7B", "distance"]]
    rest = []
    for label, task in record["tasks"].items():
        name = f"{task['title']} {label.partition('@')[2]}".rstrip()
        if (found := score(task)) is None:
            rest.append(f"{name}: not run, {task['not_run']}")
            continue
        published = task.get("published") or {}
        percent = published.get("percent", {}).get(LLAMA_2[0])
        distance = published.get("distance", {}).get(LLAMA_2[0])
        other = published.get("shots") not in (None, task["shots"])
        interval = "" if math.isinf(found.se) and found.method != "Wilson" else _bounds(found.to_json())
        rows.append(
            [
                name,
                str(task["shots"]),
                f"{found.n:,}",
                _percent(found.mean) if _is_fraction(found) else f"{found.mean:.3f}",
                interval,
                task["metric"],
                _NONE if percent is None else f"{percent:.1f}" + (f" ({published['shots']}-shot)" if other else ""),
                _NONE if distance is None else f"{distance:+.1f}",
            ]
        )
        if task["refused"]:
            rest.append(f"{name}: {task['refused']} of {task['refused'] + found.n:,} items do not fit the context")
        for judge, agrees in task.get("judges", {}).items():
            shown = f"{_percent(agrees['mean'])} % {_bounds(agrees)}"
            rest.append(f"{name}: its judge of {judge} agrees with {shown} of held-out labels")
        if task.get("lacking"):
            rest.append(f"{name}: is not the paper's mean, without the groups {', '.join(task['lacking'])}")
        if task.get("not_judged"):
            rest.append(f"{name}: {task['not_judged']} answers were not judged; the samples say why")
        if task.get("cut"):
            rest.append(f"{name}: {task['cut']} answers were cut by their limit of tokens")
    return [*(columns(rows) if len(rows) > 1 else ()), *rest]


def _contamination_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each subset's items, score in percent and Z, at the largest L that shows an effect, or else the smallest."""
    rows = [["items in the corpus", "L", "clean", "not clean", "not dirty", "dirty", "contaminated"]]
    for label, task in tasks.items():
        if found := task.get("contamination"):
            length = found["length"] or min(map(int, found["lengths"]))
            parts = found["lengths"][str(length)].values()
            rows.append([label, str(length), *map(_subset, parts), "no" if found["length"] is None else "yes"])
    return ["", *columns(rows)] if len(rows) > 1 else []


def _subset(part: Mapping[str, Any]) -> str:
    if not part["n"]:
        return _NONE
    return f"{part['n']:,}: {_percent(part['mean'])}" + ("" if part["z"] is None else f" (Z {part['z']:+.2f})")


def _abstention_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy where the model answers only what it is surest of, by the share that it answers."""
    rows = [["answering the surest", *(f"{100 * share:g} %" for share in COVERAGES), "AURC", "calibration error"]]
    for label, task in tasks.items():
        if found := task.get("abstention"):
            accuracies = (_percent(found["accuracy"][f"{share:g}"]) for share in COVERAGES)
            rows.append([label, *accuracies, f"{found['aurc']:.3f}", f"{found['calibration_error']:.3f}"])
    return ["", *columns(rows)] if len(rows) > 1 else []


def _by_table(label: str, found: Mapping[str, Any]) -> list[str]:
    """A task's score by group."""
    rows = [[label, "items", "score", "95 % interval", LLAMA_2[0]]]
    for name, part in found.items():
        interval = Interval.from_json(part["interval"])
        published = part.get("published", {}).get(LLAMA_2[0])
        theirs = _NONE if published is None else f"{published:g}"
        rows.append([f"  {name}", f"{interval.n:,}", _percent(interval.mean), _bounds(interval.to_json()), theirs])
    if not any("published" in part for part in found.values()):
        rows = [row[:-1] for row in rows]
    return columns(rows)


def _format_table(spread: Mapping[str, Any]) -> list[str]:
    rows = [["prompt formats", "lowest", "highest", "range"]]
    for name, found in spread.items():
        scores = found["scores"].values()
        rows.append([name, _percent(min(scores)), _percent(max(scores)), f"{100 * found['range']:.1f}"])
    return columns(rows)


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """A comparison of two runs, as `comparison.compare_runs` returns it, in points."""
    rows = [["difference", "points", "95 % interval", "p", "p (Holm)", "smallest", "only ours", "only theirs", "items"]]
    for name, task in found["tasks"].items():
        rows.append(
            [
                name,
                f"{100 * task['difference']:+.1f}",
                _bounds(task),
                f"{task['p']:.3g}",
                f"{task['p_holm']:.3g}",
                _NONE if task["smallest"] is None else f"{100 * task['smallest']:.1f}",
                str(task["only_a"]),
                str(task["only_b"]),
                f"{task['n']:,}",
            ]
        )
    rest = [f"not compared, in one run only: {', '.join(found['not_compared'])}"] if found["not_compared"] else []
    return [f"against {found['against']}:", *columns(rows), *rest]


def _is_fraction(found: Interval) -> bool:
    return -1 <= found.mean <= 1


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _bounds(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["low"] is None:
        return ""
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{first:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def draw(record: Mapping[str, Any], file: Path) -> None:
    """Draw each task's score as a bar with its 95 % interval, with Llama 2's published figures as marks.

    Raises EvaluationError when no task has a score, or matplotlib is missing.
    """
    drawn = [
        (label, task, found)
        for label, task in record["tasks"].items()
        if (found := score(task)) is not None and _is_fraction(found)
    ]
    if not drawn:
        raise EvaluationError(f"{file}: no task has a score to draw; evaluate one whose files are there")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EvaluationError("drawing needs matplotlib: pip install 'whole-llama[evaluate]'") from None
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    places = range(len(drawn))
    means = [100 * found.mean for *_, found in drawn]
    sides = [(found.mean - found.low, found.high - found.mean) for *_, found in drawn]
    errors = [[100 * side if math.isfinite(side) else 0 for side in some] for some in zip(*sides, strict=True)]
    axes.barh(places, means, xerr=errors, color="C0", alpha=0.75, capsize=3, label=record["model"].replace("$", r"\$"))
    for model, marker in ((LLAMA_2[0], "o"), (LLAMA_2[-1], "D")):
        points = [
            (percent[model], place)
            for place, (_, task, _) in zip(places, drawn, strict=True)
            if model in (percent := (task.get("published") or {}).get("percent", {}))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color="C1", label=f"{model}, published")
    axes.set_yticks(places, [f"{label} ({found.n:,})" for label, _, found in drawn])
    axes.invert_yaxis()
    axes.set(xlabel="percent, with 95 % intervals", xlim=(min(0, *means), 100))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small")
    figure.savefig(file, dpi=150)
