"""What the paper published of Llama 2 and the models beside it, and its means of groups (2.3, A.2.2, A.4).

Figures are in percent. BOLD's sentiment is in hundredths, and from -1 to 1 in `published.toml`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llama2.evaluate.intervals import Interval, weighted_mean

#: The models whose rows are shown beside ours.
LLAMA_2 = ("Llama 2 7B", "Llama 2 13B", "Llama 2 34B", "Llama 2 70B")


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """A column of the paper's table of groups: the mean of some tasks.

    The mean is weighted by the members' `questions` where there are some. `shots` are those that a member counts with,
    of members that were published with several.
    """

    name: str
    title: str
    members: tuple[str, ...]
    shots: Mapping[str, int] = field(default_factory=dict)
    questions: tuple[int, ...] | None = None

    def mean(self, scores: Mapping[str, Interval]) -> Interval | None:
        """The group's mean of its members' scores, by task; None where one is missing."""
        if self.missing(scores):
            return None
        return weighted_mean([scores[member] for member in self.members], self.questions)

    def missing(self, scores: Mapping[str, Interval]) -> list[str]:
        """The members that have no score."""
        return [member for member in self.members if member not in scores]


@cache
def groups() -> tuple[TaskGroup, ...]:
    """The groups, in the order of the paper's columns."""
    return tuple(
        TaskGroup(
            name=name,
            title=group["title"],
            members=tuple(group["members"]),
            shots=group.get("shots", {}),
            questions=tuple(group["questions"]) if "questions" in group else None,
        )
        for name, group in _tables()["groups"].items()
    )


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """A task's published figures by model, and the examples in their prompts; None where these were not stated."""

    shots: int | None
    by_model: Mapping[str, float]


def figures(column: str, shots: int) -> PublishedFigures | None:
    """Published figures in percent of a task, or of a part of one such as "mmlu stem"; None for what was not published.

    Of a task that was published with several numbers of examples, those with `shots`, and None for another number. Of
    other tasks, those that there are.
    """
    found: dict[int | None, dict[str, float]] = {}
    for table in _tables()["tables"].values():
        for index, name in enumerate(table["columns"]):
            if name == column:
                row = found.setdefault(table["shots"][index] if "shots" in table else None, {})
                scale = table.get("scale", 1)
                row |= {
                    model: scale * figures[index]
                    for model, figures in table["rows"].items()
                    if not math.isnan(figures[index])
                }
    unstated = found.pop(None, {})
    if not found:
        return PublishedFigures(None, unstated) if unstated else None
    number = shots if shots in found else next(iter(found))
    return PublishedFigures(number, unstated | found[number]) if shots in found or len(found) == 1 else None


def group_means(model: str) -> dict[str, float]:
    """A model's published means by group; empty for a model that the paper does not have."""
    table = _tables()["tables"]["group_means"]
    return dict(zip(table["columns"], table["rows"].get(model, ()), strict=False))


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
