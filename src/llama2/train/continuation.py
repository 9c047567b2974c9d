"""A run's record at its beginning and when it is resumed: what may differ then, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.data.loader import RowSource
from llama2.errors import RecipeError, RunError
from llama2.recipe import leaves, with_new_names
from llama2.records import Run
from llama2.train.schedule import SchedulePart, lr_of
from llama2.train.settings import LoopSettings

#: Settings and tables that may differ between a run and what resumes it. They change no loss but by rounding, or say
#: where the data are, which must be the same.
_FREE = {"mesh", "compile", "recompute", "save", "samples", "evaluate", "watts", "spikes", "batch.micro_size"}
_FREE |= {"optimizer.rewarm", "data.corpus", "data.recipe", "data.dir", "data.files"}
#: What may differ where a new warm-up is requested.
_SCHEDULE = {"steps", "epochs", "optimizer.lr", "optimizer.warmup", "optimizer.min_lr_ratio"}


def schedule_of(recipe: LoopSettings, *, begin: int = 0, start: float = 0.0, warmup: int | None = None) -> SchedulePart:
    """The schedule of a recipe, from a step and a learning rate on."""
    o = recipe.optimizer
    return SchedulePart(
        begin=begin,
        start=start,
        peak=o.lr,
        warmup=o.warmup if warmup is None else warmup,
        min_lr_ratio=o.min_lr_ratio,
        steps=recipe.steps,
    )


@dataclass(frozen=True, slots=True)
class Continuation:
    """A run that is resumed."""

    run: Run
    schedule: list[SchedulePart]
    other: bool  # the recipe has another schedule, which needs a new warm-up

    @classmethod
    def open(cls, folder: Path, recipe: LoopSettings, source: RowSource[Any]) -> Continuation:
        """The run in `folder`. Raises RunError where recipe or data are not those that it was begun with."""
        run = Run.open(folder)
        origin = run.origin
        try:
            begun = type(recipe).model_validate(with_new_names(run.recipe, type(recipe)))
            schedule = [SchedulePart.model_validate(part) for part in origin["schedule"]]
        except (ValueError, TypeError, KeyError):
            raise RunError(f"{folder}: its recipe is damaged, or of another version; begin another run") from None
        other = _differences(folder, begun, recipe)
        if origin.get("corpus") != source.sha256:
            raise RunError(
                f"{source.name}: is not the data that {folder} was begun with; give the same data, or begin another run"
            )
        return cls(run, schedule, other)

    def rewarm(self, recipe: LoopSettings, step: int, *, record: bool) -> None:
        """Continue after `step` by the recipe's schedule, which begins at the learning rate of that step.

        With `record`, the run's folder has it from now on.
        """
        warmup = recipe.optimizer.rewarm or 0
        if recipe.steps < step + max(1, warmup):
            raise RunError(
                f"{self.run.folder}: {step} steps are done, and steps={recipe.steps} leaves no room for a warm-up of "
                f"{warmup}; choose steps={step + max(1, warmup)} or more"
            )
        start = lr_of(self.schedule, step) if step else 0.0
        self.schedule.append(schedule_of(recipe, begin=step, start=start, warmup=warmup))
        if record:
            self.run.change(recipe.model_dump(mode="json"), schedule=[part.model_dump() for part in self.schedule])


def _differences(folder: Path, begun: LoopSettings, recipe: LoopSettings) -> bool:
    """Whether a recipe has another schedule than the run's. Raises RunError for differences that are refused."""
    before, now = (leaves(each.model_dump(mode="json")) for each in (begun, recipe))
    other = [name for name in sorted(now) if now[name] != before.get(name) and not _in(name, _FREE)]
    other.sort(key=lambda name: name in _SCHEDULE)
    if not other or (other[0] in _SCHEDULE and recipe.optimizer.rewarm is not None):
        return bool(other)
    name = other[0]
    differs = (
        f"{folder}: the run was begun with {name} = {json.dumps(before.get(name))}, and the recipe says "
        f"{json.dumps(now[name])}"
    )
    if name not in _SCHEDULE:
        raise RunError(f"{differs}; continue it with what it was begun with, or begin another")
    raise RunError(
        f"{differs}, so the learning rate would jump; continue it with what it was begun with, or give "
        "optimizer.rewarm=N, a new warm-up of N steps"
    )


def _in(name: str, names: set[str]) -> bool:
    """Whether a setting, or the table that it is in, is among the names."""
    return name in names or name.partition(".")[0] in names


def refuse_rewarm(recipe: LoopSettings) -> None:
    """Raise RecipeError where a new run has a setting of resumed ones."""
    if recipe.optimizer.rewarm is not None:
        raise RecipeError("optimizer.rewarm: is for a run that is resumed; give --resume, or optimizer.warmup")
