"""Settings of `llama2 reward`, and what is fitted to pairs and model where a recipe leaves it open (spec 6.4).

The paper trains on more than a million pairs: one epoch, 512 pairs a step, a peak of 1e-5, and of 5e-6 for 70B. With a
few thousand pairs that would be a few steps. So these are the rules for what a recipe leaves open:

- a step reads a 64th of the pairs, at least one and at most 512, a multiple of 8 if there are so many;
- the learning rate rises through 3 % of the steps, at least 5, then falls along a cosine to a tenth;
- its peak is 1e-5 × 4096 / width for narrower models, and 5e-6 from the width of 70B on. For an adapter it is ten times
  that;
- there are four evaluations, and products are done in bfloat16 where the processor has instructions for them.

The paper does not publish the margin of its last models, nor the formula and weight of the loss for safety.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from llama2.data.comparisons import Safety
from llama2.recipe import Settings
from llama2.train import settings
from llama2.train.tuning import LORA_LR

#: Pairs of a step, and the learning rate's peak of a width, as in the paper; that of 70B's width and more.
PAIRS, LR, WIDTH, WIDE_LR, WIDE = 512, 1e-5, 4096, 5e-6, 8192
#: Margins by grade, from negligibly to significantly better (paper, table 27).
MARGINS: dict[str, tuple[float, float, float, float]] = {
    "none": (0, 0, 0, 0),
    "small": (0, 1 / 3, 2 / 3, 1),
    "large": (0, 1, 2, 3),
}

_STEPS, _MULTIPLE, _LEAST_WARMUP, _WARMUP, _EVALUATIONS = 64, 8, 5, 0.03, 4
_AT_ONCE = 4096  # tokens that a process reads at once, unless a pair has more


class MixedPairSettings(Settings):
    """Pairs of another kind, of which some are mixed in: for a helpfulness model those of safety, and the reverse."""

    files: list[Path] = Field([], description="files or folders")
    safety: Safety | None = Field(None, description="the label of pairs that have none; none: not labelled")


class PairSettings(Settings):
    """Which preference pairs, and how many of them are held out."""

    files: list[Path] = Field(min_length=1, description="files or folders of the model's own kind")
    safety: Safety | None = Field(None, description="the label of pairs that have none; none: not labelled")
    mixed: MixedPairSettings = MixedPairSettings()
    share: float = Field(
        0.5, gt=0, le=1, description="of `files` among all pairs: the paper's 0.5 for helpfulness, 0.9 for safety"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="of the pairs that would be trained on, for curves over data")
    held_out: int = Field(800, ge=1, description="pairs of each set, and at most two fifths, by their prompts")
    length: int = Field(4096, ge=2, description="tokens of the longest side, and what the model reads; none is cut")
    neutralise: bool = Field(False, description="break role markers that messages contain instead of leaving them out")
    skip_bad: bool = Field(False, description="leave out and count records that are not pairs, instead of refusing")


class RewardOptimizerSettings(settings.OptimizerSettings):
    """AdamW and its schedule. The paper states all of it."""

    lr: float = Field(LR, gt=0, description="the peak; unless given, by the model's width")
    warmup: int = Field(0, ge=0, description="steps; unless given, 3 % of all, at least 5")


class RewardBatchSettings(settings.BatchSettings):
    """How many pairs a step reads on all processes together, and how many of them a process at once."""

    size: settings.Width = Field(PAIRS, description="pairs of a step; unless given, a 64th of all, at most this")
    micro_size: settings.Width = Field(
        1, description="pairs that a process reads at once; unless given, 4,096 tokens' worth"
    )


class RewardRecipe(settings.TuningSettings):
    """A run of `llama2 reward`. Defaults are the paper's. A setting that says "unless given" is fitted to the data.

    The head is trained beside every weight, or beside an adapter.
    """

    data: PairSettings
    margin: Literal["none", "small", "large"] = Field(
        "small", description="by a pair's grade, subtracted from the scores' difference; not graded: 0"
    )
    safety_weight: float = Field(
        0.0, ge=0, description="of the loss for classifying labelled answers as safe; the paper's is not published"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="below this score, an answer counts as unsafe in the report")
    epochs: float = Field(1.0, gt=0, description="how often each pair is read; the paper's models overfit with more")
    batch: RewardBatchSettings = RewardBatchSettings()
    optimizer: RewardOptimizerSettings = RewardOptimizerSettings()
    compile: bool = Field(
        False, description="torch.compile; all rows then have the longest side's length, which is slow for short pairs"
    )

    @model_validator(mode="after")
    def _possible(self) -> RewardRecipe:
        if self.mesh.tensor > 1:
            raise ValueError("mesh.tensor: reward models are not trained by tensor parallelism; leave mesh.tensor out")
        if self.samples.prompts:
            raise ValueError("samples.prompts: a reward model writes no text; leave them out")
        return self

    @property
    def margins(self) -> dict[int | None, float]:
        """Margins by grade."""
        return dict(enumerate(MARGINS[self.margin]))


def fit(
    recipe: RewardRecipe, pairs: int, tokens: int, *, width: int, dp_size: int = 1, bf16: bool = True
) -> RewardRecipe:
    """The recipe for so many pairs of `tokens` each on average, and a model of that width; what is given stays.

    `bf16`: the processor has instructions for bfloat16.
    """
    batch, optimizer = recipe.batch, recipe.optimizer
    unit = dp_size * (batch.micro_size if "micro_size" in batch.model_fields_set else 1)
    step = batch.size
    if "size" not in batch.model_fields_set:
        wanted = min(PAIRS, pairs // _STEPS)
        unit *= _MULTIPLE if wanted >= _MULTIPLE * unit else 1
        step = max(unit, wanted // unit * unit)
    micro_size = batch.micro_size
    if "micro_size" not in batch.model_fields_set and step % dp_size == 0:
        micro_size = settings.rows_at_once(step, dp_size, _AT_ONCE // tokens)
    steps = recipe.steps or math.ceil(round(recipe.epochs * pairs / step, 6))
    peak = (LR if width < WIDE else WIDE_LR) * max(1.0, WIDTH / width)
    if recipe.lora is not None:
        peak *= LORA_LR / LR
    fitted = {"lr": float(f"{peak:.3g}"), "warmup": min(steps, max(_LEAST_WARMUP, round(_WARMUP * steps)))}
    free = {name: value for name, value in fitted.items() if name not in optimizer.model_fields_set}
    changed: dict[str, Any] = {
        "steps": steps,
        "epochs": recipe.steps * step / pairs if recipe.steps else recipe.epochs,
        "batch": batch.model_copy(update={"size": step, "micro_size": micro_size}),
        "optimizer": optimizer.model_copy(update=free),
        "precision": settings.precision_of(recipe, bf16),
    }
    if "evaluate" not in recipe.model_fields_set:
        changed["evaluate"] = -(-steps // _EVALUATIONS)
    return recipe.model_copy(update=changed)


def describe(recipe: RewardRecipe) -> list[str]:
    """The fitted settings, and what the paper does not publish, for a person."""
    r = recipe
    what = "every weight" if r.lora is None else f"the head and an adapter of rank {r.lora.rank}"
    safety = f"the loss for safety has weight {r.safety_weight:g}" if r.safety_weight else "without a loss for safety"
    return [
        f"trains {what}: {r.steps:,} steps of {r.batch.size:,} pairs, {r.epochs:.3g} epochs; learning rate "
        f"{r.optimizer.lr:.3g} after {r.optimizer.warmup:,} steps of warm-up",
        f"margin by grade: {r.margin}; {safety}; the paper does not publish which it used",
    ]
