"""Settings of `llama2 reject`. Where the paper is silent (K, prompts, temperatures to try), the choice is ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llama2.align.combined_reward import THRESHOLD
from llama2.data.prompts import PromptSettings
from llama2.data.settings import Name
from llama2.recipe import Settings

Temperature = Annotated[float, Field(gt=0, le=100)]


class RewardModelSettings(Settings):
    """Reward models, one or two, and how their rewards become one (paper 3.2.3)."""

    helpful: str = Field("", description="the helpfulness reward model: a run, a folder, or a name")
    safety: str = Field("", description="the safety reward model")
    threshold: float = Field(
        THRESHOLD, ge=0, le=1, description="below this safety reward, or for a tagged prompt, the safety reward counts"
    )

    @model_validator(mode="after")
    def _one(self) -> RewardModelSettings:
        if not (self.helpful or self.safety):
            raise ValueError("needs rewards.helpful, rewards.safety, or both")
        return self

    @property
    def models(self) -> dict[str, str]:
        """Those that are given, by name."""
        return {name: model for name, model in (("helpful", self.helpful), ("safety", self.safety)) if model}


class SweepSettings(Settings):
    """The temperature of each round's model, chosen by rewards of answers to some of the prompts."""

    temperatures: list[Temperature] = Field(
        [0.6, 0.8, 1.0, 1.2, 1.4], min_length=1, description="what is tried, unless `temperature` is given"
    )
    prompts: int = Field(50, ge=1, description="prompts that it is tried on, the first ones")
    choose_by: Literal["maximum", "spread"] = Field(
        "maximum", description="the greatest expected best of K; or the greatest distance of it from the median"
    )


class PreferenceSettings(Settings):
    """Pairs of answers to one prompt for other methods of tuning."""

    rejected: Literal["worst", "median", "random"] = Field("worst", description="the answer beside the best one")
    min_gap: float = Field(0.0, ge=0, le=1, description="the least difference of their rewards; equal ones never pair")


class SamplingRuntimeSettings(Settings):
    """How models run."""

    threads: int | None = Field(None, ge=1, le=1024, description="threads that compute; none: every core")
    context: int | None = Field(None, ge=1, description="tokens of prompt and answer; none: the model's own")
    sequences: int = Field(4, ge=1, description="answers of the whole context that the cache holds")


class RejectionRecipe(Settings):
    """A recipe of `llama2 reject`."""

    models: dict[Name, str] = Field(min_length=1, description="a round's name, and the model that draws in it")
    prompts: PromptSettings
    rewards: RewardModelSettings
    store: Path = Field(Path("samples"), description="folder of all samples and rewards, for every round the same one")
    output: Path = Field(Path("best"), description="folder of the data that are made of them")
    samples: int = Field(20, ge=1, le=1024, description="answers to each prompt, K; the paper's figures have up to 100")
    temperature: Temperature | None = Field(None, description="of every model; none: chosen by the sweep")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: the temperature alone decides")
    max_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    seed: int = Field(0, ge=0, description="of prompts and answers")
    pool: Literal["all rounds", "these models"] = Field(
        "all rounds", description="whose answers compete: all that the store has, or those of `models`"
    )
    cut: Literal["leave out", "keep"] = Field("leave out", description="answers that `max_tokens` cut, among the best")
    min_reward: float = Field(0.0, ge=0, le=1, description="the least reward of a best answer")
    plots: bool = Field(True, description="draw the curves, which needs matplotlib")
    sweep: SweepSettings = SweepSettings()
    preferences: PreferenceSettings = PreferenceSettings()
    runtime: SamplingRuntimeSettings = SamplingRuntimeSettings()
