"""Settings of `llama2 gatt`. The paper publishes neither how many dialogs there were nor how long they are (3.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from llama2.align.rejection_settings import RewardModelSettings, SamplingRuntimeSettings, Temperature
from llama2.align.standing_instructions import VERIFIABLE, InstructionSettings
from llama2.data.prompts import PromptSettings
from llama2.recipe import Settings


class ProbeSettings(Settings):
    """Dialogs on held-out prompts, in which the instruction is given once."""

    dialogs: int = Field(40, ge=1, description="dialogs, which take the instructions by turns")
    turns: list[int] = Field([2, 4, 6, 20], min_length=1, description="turns whose answers are checked")
    instructions: list[str] = Field([*VERIFIABLE], min_length=1, description="which, by the names of `verifiable`")
    temperature: float = Field(0.0, ge=0, le=100, description="of the answers; 0: the likeliest tokens")
    chance: bool = Field(
        True, description="also run each dialog without its instruction: how often it is met by chance"
    )

    @model_validator(mode="after")
    def _known(self) -> ProbeSettings:
        if wrong := next((name for name in self.instructions if name not in VERIFIABLE), None):
            raise ValueError(f"instructions: {wrong!r} is unknown; there are {', '.join(VERIFIABLE)}")
        if min(self.turns) < 1 or sorted({*self.turns}) != self.turns:
            raise ValueError("turns: are numbers from 1 on, in order")
        return self


class GattRecipe(Settings):
    """A recipe of `llama2 gatt`, and of its probes."""

    model: str = Field(description="the model that answers while it sees the instruction at every turn")
    prompts: PromptSettings
    rewards: RewardModelSettings | None = Field(
        None, description="which answers are better; none: the first that follows"
    )
    instructions: InstructionSettings = InstructionSettings()
    dialogs: int = Field(500, ge=1, description="dialogs to make")
    min_turns: int = Field(2, ge=2, description="turns of a dialog at least")
    max_turns: int = Field(6, ge=2, le=64, description="turns of a dialog at most")
    samples: int = Field(4, ge=1, le=1024, description="answers to each turn, of which the best stays")
    temperature: Temperature = Field(1.0, description="of the answers")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: the temperature alone decides")
    max_tokens: int = Field(128, ge=1, description="tokens of an answer at most")
    cut: Literal["leave out", "keep"] = Field("leave out", description="answers that `max_tokens` cut, among the best")
    place: Literal["system", "user"] = Field(
        "system", description="where the instruction is in what is trained on: a system message, or the first user's"
    )
    seed: int = Field(0, ge=0, lt=1 << 32, description="of dialogs and answers")
    store: Path = Field(Path("gatt-samples"), description="folder of all answers; a run that was stopped goes on there")
    output: Path = Field(Path("gatt"), description="folder of the dialogs and reports")
    probe: ProbeSettings = ProbeSettings()
    runtime: SamplingRuntimeSettings = SamplingRuntimeSettings()

    @property
    def reward_models(self) -> dict[str, str]:
        """Reward models by name, if there are any."""
        return self.rewards.models if self.rewards else {}

    @model_validator(mode="after")
    def _turns(self) -> GattRecipe:
        if self.max_turns < self.min_turns:
            raise ValueError(f"max_turns={self.max_turns} is less than min_turns={self.min_turns}")
        return self
