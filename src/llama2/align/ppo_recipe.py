"""Settings of `llama2 ppo`, and what is fitted to the model where a recipe leaves it open (paper 3.2.3; spec 7.3).

The paper states AdamW at a constant learning rate of 1e-6, and iterations of 512 answers with one step on each 64. It
states ε = 0.2, and β = 0.01 up to 13B and 0.005 above. It does not publish:

- the value network, the weight and the clipping of its loss, GAE's γ and λ, whether advantages are whitened;
- where the KL divergence is subtracted, the length of answers, what an answer that the limit cuts is worth.

Those are settings, chosen by us. What a recipe leaves open:

- the learning rate is 1e-6 × 4096 / width for narrower models, and ten times that for an adapter;
- β is 0.01, and 0.005 from 34 billion parameters on;
- a process reads as many answers at once as have 4,096 tokens;
- states and measurements come at the end of an iteration: `save.every` and `evaluate` are rounded up to that. A resumed
  run then draws the same answers from the same weights;
- products are done in bfloat16 where the processor has instructions for them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llama2.align.rejection_settings import RewardModelSettings, SamplingRuntimeSettings
from llama2.config import ModelConfig
from llama2.data.prompts import PromptSettings
from llama2.recipe import Settings
from llama2.train import settings

#: The paper's learning rate, and the width of its smallest model; β of small and of large models, from where they are.
LR, WIDTH, ADAPTER = 1e-6, 4096, 10.0
BETA, LARGE_BETA, LARGE = 0.01, 0.005, 30 * 10**9

_AT_ONCE = 4096  # tokens that a process reads at once, unless an answer has more


class PpoPromptSettings(PromptSettings):
    """Which prompts, and how many of the held-out ones the policy is measured on."""

    measured: int = Field(0, ge=0, description="held-out prompts that the policy answers now and then; 0: none")
    seed: int | None = Field(None, ge=0, description="of which prompts are held out; none: the recipe's")


class PpoRewardSettings(RewardModelSettings):
    """Reward models, and how their rewards become one."""

    watched: str = Field("", description="a reward model that rewards nothing: if it falls, the others are overfitted")
    cut: Literal["cut_reward", "score"] = Field(
        "cut_reward", description="what an answer that `max_tokens` cut is worth: that, or what reward models say of it"
    )
    cut_reward: float = Field(
        0.05, ge=0, le=1, description="reward of an answer that `max_tokens` cut, or that is empty, whatever it says"
    )


class AdvantageSettings(Settings):
    """From rewards to advantages (GAE)."""

    gamma: float = Field(1.0, gt=0, le=1, description="γ, the discount of later rewards")
    lam: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation")
    whiten: bool = Field(True, description="whiten advantages over the tokens of an iteration's answers")


class CollapseSettings(Settings):
    """When a run ends because its policy has collapsed. Each limit is of an iteration's answers."""

    kl: float = Field(60.0, gt=0, description="nats an answer from the start, at most")
    entropy: float = Field(0.1, ge=0, lt=1, description="of the first iteration's entropy, at least")
    distinct: float = Field(0.3, ge=0, le=1, description="share of answers that are different, at least")
    cut: float = Field(1.0, gt=0, le=1, description="share of answers without an end token, at most")
    patience: int = Field(2, ge=1, description="iterations in a row beyond a limit that end the run")


class PpoBatchSettings(settings.BatchSettings):
    """How many answers a step reads on all processes together, and how many of them a process at once."""

    size: settings.Width = Field(64, description="answers of a step")
    micro_size: settings.Width = Field(
        1, description="answers that a process reads at once; unless given, 4,096 tokens"
    )


class PpoOptimizerSettings(settings.OptimizerSettings):
    """AdamW and its schedule. The paper states all of it; the learning rate is constant."""

    lr: float = Field(LR, gt=0, description="the learning rate; unless given, by the model's width")
    min_lr_ratio: float = Field(1.0, ge=0, le=1, description="the learning rate at the end; 1: it is constant")
    warmup: int = Field(0, ge=0, description="steps in which the learning rate rises")


class PpoRecipe(settings.TuningSettings):
    """A run of `llama2 ppo`. Defaults are the paper's. A setting that says "unless given" is fitted to the model.

    Answers are drawn at temperature 1, with nothing cut off, because the losses are those of exactly that distribution.
    """

    prompts: PpoPromptSettings
    rewards: PpoRewardSettings
    value: str = Field("", description="what the value network begins with; none: the helpfulness model, or the other")
    iterations: int = Field(200, ge=1, le=settings.MOST, description="rounds of answers; the paper has 200 to 400")
    rollouts: settings.Width = Field(512, description="answers of an iteration, a multiple of batch.size")
    max_tokens: settings.Width = Field(256, description="tokens of an answer at most")
    patience: int = Field(
        0,
        ge=0,
        description="measurements on held-out prompts in a row without a better reward that end the run; 0: none",
    )
    beta: float = Field(BETA, ge=0, description="β, the weight of the KL divergence; unless given, by the model's size")
    clip: float = Field(0.2, gt=0, lt=1, description="ε, how far a ratio may move before its gradient ends")
    value_clip: float = Field(0.2, gt=0, description="how far a value may move before its gradient ends")
    value_weight: float = Field(0.1, ge=0, description="of the value network's loss")
    advantages: AdvantageSettings = AdvantageSettings()
    collapse: CollapseSettings = CollapseSettings()
    runtime: SamplingRuntimeSettings = SamplingRuntimeSettings()
    batch: PpoBatchSettings = PpoBatchSettings()
    optimizer: PpoOptimizerSettings = PpoOptimizerSettings()
    compile: bool = Field(False, description="torch.compile, which is slow where rows of answers have unlike lengths")

    @model_validator(mode="after")
    def _possible(self) -> PpoRecipe:
        if self.mesh.tensor > 1:
            raise ValueError("mesh.tensor: PPO does not train by tensor parallelism; leave mesh.tensor out")
        if self.rollouts % self.batch.size:
            raise ValueError(f"rollouts={self.rollouts} is not a multiple of batch.size={self.batch.size}")
        if self.steps not in (0, self.iterations * self.steps_an_iteration):
            raise ValueError("steps: follows from iterations, rollouts and batch.size; leave it out")
        if self.lora and self.lora.adapter:
            raise ValueError("lora.adapter: PPO begins with a whole model; merge the adapter first")
        if self.lora and self.lora.dropout and "dropout" in self.lora.model_fields_set:
            raise ValueError("lora.dropout: the policy that learns would not be the one that drew; set it to 0")
        if self.samples.prompts:
            raise ValueError("samples.prompts: prompts.measured has the policy answer held-out prompts; leave them out")
        if self.patience and not self.prompts.measured:
            raise ValueError("patience: needs prompts.measured, held-out prompts to measure on")
        if self.prompts.measured > self.prompts.held_out:
            raise ValueError("prompts.measured: is more than prompts.held_out; hold out as many")
        return self

    @property
    def prompt_seed(self) -> int:
        """The seed by which prompts are held out."""
        return self.seed if self.prompts.seed is None else self.prompts.seed

    @property
    def steps_an_iteration(self) -> int:
        """Steps on the answers of an iteration, which are read once."""
        return self.rollouts // self.batch.size

    @property
    def value_model(self) -> str:
        """What the value network begins with."""
        return self.value or self.rewards.helpful or self.rewards.safety


def fit(recipe: PpoRecipe, tokens: int, config: ModelConfig, *, dp_size: int = 1, bf16: bool = True) -> PpoRecipe:
    """The recipe for rows of so many `tokens`, and a model of that shape; what is given stays.

    `bf16`: the processor has instructions for bfloat16.
    """
    batch, optimizer, n = recipe.batch, recipe.optimizer, recipe.steps_an_iteration
    micro_size = batch.micro_size
    if "micro_size" not in batch.model_fields_set and batch.size % dp_size == 0:
        micro_size = settings.rows_at_once(batch.size, dp_size, _AT_ONCE // tokens)
    lr = LR * max(1.0, WIDTH / config.dim) * (ADAPTER if recipe.lora else 1.0)
    if "lr" in optimizer.model_fields_set:
        lr = optimizer.lr
    whole = {"every": _rounded_up(recipe.save.every, n)}
    changed: dict[str, Any] = {
        "steps": recipe.iterations * n,
        "batch": batch.model_copy(update={"micro_size": micro_size}),
        "optimizer": optimizer.model_copy(update={"lr": float(f"{lr:.3g}")}),
        "save": recipe.save.model_copy(update=whole),
        "evaluate": _rounded_up(recipe.evaluate, n),
        "precision": settings.precision_of(recipe, bf16),
    }
    if "beta" not in recipe.model_fields_set:
        changed["beta"] = LARGE_BETA if config.parameters() >= LARGE else BETA
    if recipe.lora and recipe.lora.dropout:
        changed["lora"] = recipe.lora.model_copy(update={"dropout": 0.0})
    return recipe.model_copy(update=changed)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def describe(recipe: PpoRecipe) -> list[str]:
    """The fitted settings, and what the paper does not publish, for a person."""
    r, o, a = recipe, recipe.optimizer, recipe.advantages
    what = "every weight" if r.lora is None else f"an adapter of rank {r.lora.rank}"
    worth = f"{r.rewards.cut_reward:g}" if r.rewards.cut == "cut_reward" else "what reward models say"
    return [
        f"trains {what}, and a value network that begins with {r.value_model} and a head of 0: {r.iterations:,} "
        f"iterations of {r.rollouts:,} answers, {r.steps_an_iteration} steps on each; learning rate {o.lr:.3g}",
        f"β {r.beta:g} on each token's log-ratio, γ {a.gamma:g}, λ {a.lam:g}, value loss × {r.value_weight:g}; an "
        f"answer without its end is worth {worth}; the paper does not publish these but β",
    ]
