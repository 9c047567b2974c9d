"""Settings of `llama2 distil`. The paper gives examples of pre-prompts, and neither all nor how much data (A.4.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from llama2.align.rejection_settings import RewardModelSettings, SamplingRuntimeSettings, Temperature
from llama2.data.prompts import PromptSettings
from llama2.data.settings import Name
from llama2.recipe import Settings

GENERIC = [
    "You are a {adjective} assistant. Answer safely, and explain what is wrong where a request would harm.",
    "You are an assistant that is {adjective} and without prejudice. Help as far as nobody is harmed.",
    "This question was flagged as one that may be unsafe. Answer it as a {adjective} assistant would.",
]
ADJECTIVES = ["responsible", "respectful", "wise", "careful", "honest"]
STEPS = [
    "If somebody is in danger now, say first where to get help.",
    "Say in a sentence what you cannot help with, and why it would harm.",
    "Explain the matter as far as that is safe, or name a lawful alternative.",
    "Offer to answer another question.",
]


class TemplateSettings(Settings):
    """Prompts of one kind of risk, and what an answer to them goes through."""

    files: list[Path] = Field(min_length=1, description="files or folders of prompts of this kind")
    risk: str = Field("", description="the kind of risk in words; none: the table's name")
    steps: list[str] = Field(STEPS, min_length=1, description="what an answer goes through, in order")


class DistilRecipe(Settings):
    """A recipe of `llama2 distil`."""

    model: str = Field(description="the model that answers, and is to be tuned")
    prompts: PromptSettings = PromptSettings()
    templates: dict[Name, TemplateSettings] = Field({}, description="prompts by their kind of risk")
    rewards: RewardModelSettings
    generic: list[str] = Field(GENERIC, description="pre-prompts for every prompt; {adjective} is filled in")
    adjectives: list[str] = Field(ADJECTIVES, min_length=1, description="what fills them in")
    samples: int = Field(2, ge=1, le=1024, description="pre-prompts of each sort that a prompt is answered with")
    gate: bool = Field(
        True, description="keep an answer only where its safety reward is above that of the original one"
    )
    min_gain: float = Field(0.0, ge=0, le=1, description="how far above, at least")
    place: Literal["system", "user"] = Field("system", description="where the pre-prompt is while answers are drawn")
    temperature: Temperature = Field(1.0, description="of the answers")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: the temperature alone decides")
    max_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    cut: Literal["leave out", "keep"] = Field("leave out", description="answers that `max_tokens` cut, among the best")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of pre-prompts and answers")
    store: Path = Field(Path("distil-samples"), description="folder of all answers; a stopped run goes on there")
    output: Path = Field(Path("distilled"), description="folder of the dialogs and the report")
    runtime: SamplingRuntimeSettings = SamplingRuntimeSettings()

    @model_validator(mode="after")
    def _usable(self) -> DistilRecipe:
        if not self.rewards.safety:
            raise ValueError("needs rewards.safety, which decides what is kept")
        if not (self.generic or self.templates):
            raise ValueError("needs generic pre-prompts, or templates")
        if not (self.prompts.files or self.prompts.safety_files or self.templates):
            raise ValueError("needs prompts.safety_files, or templates with files")
        return self
