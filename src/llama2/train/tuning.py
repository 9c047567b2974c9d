"""Settings of `llama2 sft`, and what is fitted to dialogs and model where a recipe leaves them open.

The paper tunes models of width 4,096 and more on 27,540 dialogs (3.1): 64 rows a step, two epochs, a peak of 2e-5. With
twenty dialogs that would be a single step. So these are the rules for what a recipe leaves open:

- a row has as many tokens as the longest dialog, at least 256, in steps of 64; at most 4,096, and what the model reads;
- a tenth of the dialogs is held out, at most 100, and none of fewer than ten;
- a step reads a 16th of the rows, at least one and at most 64;
- there are two epochs, or more to make 40 steps, but nothing is read more than ten times for that;
- the learning rate rises through the first tenth of the steps, at most 100, then falls along a cosine to a tenth;
- its peak is 2e-5 × 4096 / width, and 2e-5 for wider models; 1e-4 in place of 2e-5 where an adapter is trained, as in
  Meta's llama-recipes. That rates of Adam go with 1 / width is what Yang et al.
  (2022, "Tensor Programs V") derive and measure; the paper's own rate is the same for all of its widths;
- there are four evaluations, and a network is compiled where it reads a million tokens or more;
- products are done in bfloat16 where the processor has instructions for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from llama2.data.dialogs import DialogSettings, Packed
from llama2.train import settings

#: The paper's, of the width that its smallest model has.
LR, WIDTH, ROWS, EPOCHS, LENGTH = 2e-5, 4096, 64, 2, 4096
#: The peak of Meta's llama-recipes, for adapters.
LORA_LR = 1e-4

_LEAST_LENGTH, _UNIT = 256, 64
_HELD, _MOST_HELD = 10, 100
_STEPS_AN_EPOCH, _LEAST_STEPS, _MOST_EPOCHS = 16, 40, 10
_WARMUP, _MOST_WARMUP = 10, 100
_FEW_DIALOGS, _FEW_STEPS = 10, 20  # of which a person is warned
_EVALUATIONS, _COMPILED = 4, 10**6
_AT_ONCE = 2048  # tokens that a process reads at once, unless a row has more


class SftOptimizerSettings(settings.OptimizerSettings):
    """AdamW and its schedule. The paper states peak and decay."""

    lr: float = Field(LR, gt=0, description="the peak; unless given, by the model's width")
    warmup: int = Field(0, ge=0, description="steps; unless given, a tenth of all")


class SftBatchSettings(settings.BatchSettings):
    """How many rows a step reads on all processes together, and how many of them a process at once."""

    size: settings.Width = Field(ROWS, description="rows of a step; unless given, a 16th of all, at most this")
    micro_size: settings.Width = Field(
        1, description="rows that a process reads at once; unless given, 2,048 tokens' worth"
    )


class SftRecipe(settings.TuningSettings):
    """A run of `llama2 sft`. Defaults are the paper's. A setting that says "unless given" is fitted to the data."""

    data: DialogSettings
    epochs: float = Field(EPOCHS, gt=0, description="how often each dialog is read; unless given, 40 steps or more")
    batch: SftBatchSettings = SftBatchSettings()
    optimizer: SftOptimizerSettings = SftOptimizerSettings()


def fit_rows(data: DialogSettings, sizes: Sequence[int], context: int) -> DialogSettings:
    """The settings for dialogs of so many tokens each, and a model that reads `context`; what was given stays."""
    fitted: dict[str, Any] = {}
    length = data.length
    if "length" not in data.model_fields_set:
        longest = max(sizes, default=1)
        if data.skip_bad or data.too_long == "leave out":
            longest = max((size for size in sizes if size <= min(LENGTH, context)), default=1)
        length = max(_LEAST_LENGTH, -(-longest // _UNIT) * _UNIT)
        fitted["length"] = length = min(length, LENGTH, context)
    if "validation" not in data.model_fields_set:
        count = sum(size <= length for size in sizes)
        fitted["validation"] = min(_MOST_HELD, count // _HELD)
    return data.model_copy(update=fitted)


def fit(recipe: SftRecipe, rows: int, *, width: int, dp_size: int = 1, bf16: bool = True) -> SftRecipe:
    """The recipe for so many `rows`, a model of that width, and `dp_size` processes; what is given stays.

    `bf16`: the processor has instructions for bfloat16.
    """
    batch, optimizer = recipe.batch, recipe.optimizer
    unit = dp_size * (batch.micro_size if "micro_size" in batch.model_fields_set else 1)
    step = batch.size
    if "size" not in batch.model_fields_set:
        step = max(unit, min(ROWS, rows // _STEPS_AN_EPOCH) // unit * unit)
    micro_size = batch.micro_size
    if "micro_size" not in batch.model_fields_set and step % dp_size == 0:
        micro_size = settings.rows_at_once(step, dp_size, _AT_ONCE // recipe.data.length)
    epochs = recipe.epochs
    if "epochs" not in recipe.model_fields_set:
        minimum = min(_MOST_EPOCHS, _LEAST_STEPS * step / rows)
        epochs = recipe.steps * step / rows if recipe.steps else max(EPOCHS, minimum)
    steps = recipe.steps or math.ceil(round(epochs * rows / step, 6))
    peak = LR if recipe.lora is None else LORA_LR
    fitted = {"lr": float(f"{peak * max(1.0, WIDTH / width):.3g}"), "warmup": _warmup(steps)}
    free = {name: value for name, value in fitted.items() if name not in optimizer.model_fields_set}
    changed: dict[str, Any] = {
        "steps": steps,
        "epochs": epochs,
        "batch": batch.model_copy(update={"size": step, "micro_size": micro_size}),
        "optimizer": optimizer.model_copy(update=free),
    }
    if "evaluate" not in recipe.model_fields_set:
        changed["evaluate"] = -(-steps // _EVALUATIONS)
    changed["precision"] = settings.precision_of(recipe, bf16)
    if "compile" not in recipe.model_fields_set:
        changed["compile"] = steps * step * recipe.data.length >= _COMPILED
    return recipe.model_copy(update=changed)


def _warmup(steps: int) -> int:
    """At least one step, because the schedule's first is at its peak then, and a single one not at its end."""
    return max(1, min(_MOST_WARMUP, steps // _WARMUP))


def describe(recipe: SftRecipe) -> str:
    """The fitted settings, in a line."""
    r = recipe
    held = f"{r.data.validation:,} dialogs held out" if r.data.validation else "none held out"
    return _describe_lora(r.lora) + (
        f"rows of {r.data.length:,} tokens, {held}; {r.steps:,} steps of {r.batch.size:,} rows, {r.epochs:.3g} epochs; "
        f"learning rate {r.optimizer.lr:.3g} after {r.optimizer.warmup:,} steps of warm-up"
    )


def _describe_lora(lora: settings.LoraSettings | None) -> str:
    if lora is None:
        return ""
    frozen = f" of the model in {lora.quantize}" if lora.quantize else ""
    return f"adapter{frozen}, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(sorted({*lora.targets}))}; "


def warnings(recipe: SftRecipe, train: Packed) -> list[str]:
    """Warnings about these settings and these data, a sentence each."""
    found = []
    if train.dialogs < _FEW_DIALOGS:
        found.append(f"few dialogs, {train.dialogs}: the model may learn them by heart, and little beyond them")
    if recipe.steps < _FEW_STEPS:
        found.append(f"{recipe.steps} steps change little; steps={_LEAST_STEPS} would change more")
    if recipe.batch.size > len(train):
        found.append(
            f"batch.size={recipe.batch.size} is more than the {len(train)} rows there are: a step repeats some"
        )
    if not recipe.data.validation:
        found.append("no dialog is held out, so nothing shows whether the model learns more than these dialogs")
    return found
