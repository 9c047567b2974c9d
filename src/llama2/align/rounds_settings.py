"""Settings of `llama2 rounds`: which stages each round has, and the recipes of these stages (paper 3.2.3)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from llama2.data.settings import Name
from llama2.recipe import Settings


class RoundSettings(Settings):
    """The stages of a round, besides rejection sampling and tuning."""

    gatt: bool = Field(False, description="make dialogs for Ghost Attention; the paper did so after its third round")
    distil: bool = Field(False, description="distil safer answers of the round's policy")
    ppo: bool = Field(False, description="PPO on top of the tuned model; the paper did so after its fourth round")


class MeasureSettings(Settings):
    """How each round's model is measured: on the held-out prompts of the recipe for rejection sampling."""

    samples: int = Field(1, ge=1, le=1024, description="answers to each held-out prompt, at temperature 1")


class RoundsRecipe(Settings):
    """A recipe of `llama2 rounds`. Those of stages lie beside it; what they say of models, data and output is replaced.

    Each round draws answers from the model of the round before, and tunes the base on the best answers of all rounds.
    """

    start: str = Field(description="the model that every round's tuning begins with")
    first: str = Field(
        "", description="the model that draws in the first round; none: the base, tuned on dialogs alone"
    )
    sft: Path = Field(description="recipe of `llama2 sft`; its dialogs are part of every round's data")
    reject: Path = Field(description="recipe of `llama2 reject`; its reward models and held-out prompts measure rounds")
    gatt: Path | None = Field(None, description="recipe of `llama2 gatt`")
    distil: Path | None = Field(None, description="recipe of `llama2 distil`")
    ppo: Path | None = Field(None, description="recipe of `llama2 ppo`")
    rounds: dict[Name, RoundSettings] = Field(min_length=1, description="by name, in order")
    measure: MeasureSettings = MeasureSettings()

    @model_validator(mode="after")
    def _recipes(self) -> RoundsRecipe:
        for name, stages in self.rounds.items():
            for stage in ("gatt", "distil", "ppo"):
                if getattr(stages, stage) and getattr(self, stage) is None:
                    raise ValueError(f"rounds.{name}.{stage}: needs {stage}, the recipe of that stage")
        return self
