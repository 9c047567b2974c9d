"""What a recipe of `llama2 pretrain` may say. Defaults are the paper's (2.2), as far as they do not depend on size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llama2.config import SIZES, ModelConfig
from llama2.recipe import Settings

Positive = Annotated[int, Field(ge=1)]


class Model(Settings):
    """The network: a published size, or its shape. The vocabulary is the corpus's."""

    size: Literal["7B", "13B", "34B", "70B"] | None = None
    dim: Positive = 4096
    n_layers: Positive = 32
    n_heads: Positive = 32
    n_kv_heads: Positive | None = Field(None, description="key/value heads; none: as many as heads")
    hidden_dim: Positive = 11008
    norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    tied_embeddings: bool = False

    @model_validator(mode="after")
    def _one(self) -> Model:
        if self.size and self.model_fields_set > {"size"}:
            other = ", ".join(sorted(self.model_fields_set - {"size"}))
            raise ValueError(f"has size and also {other}; leave either out")
        return self

    def config(self, vocabulary: int, context: int) -> ModelConfig:
        """Its configuration. Raises ConfigError when it contradicts itself."""
        shape: dict[str, Any]
        if self.size:
            known = SIZES[self.size]
            shape = {name: getattr(known, name) for name in ModelConfig.__dataclass_fields__}
        else:
            shape = self.model_dump(exclude={"size"})
            shape |= {"n_kv_heads": self.n_kv_heads or self.n_heads, "head_dim": self.dim // self.n_heads}
        return ModelConfig(**shape | {"vocab_size": vocabulary, "context_length": context})


class Data(Settings):
    """What is read: a corpus of `llama2 data build`, or by a recipe of it, which makes the corpus if it is missing."""

    corpus: Path | None = Field(None, description="folder of a built corpus")
    recipe: Path | None = Field(None, description="recipe of `llama2 data build`, beside this one")
    dir: str | None = Field(None, description="the folder of texts, in place of that recipe's")
    length: Positive = Field(4096, description="tokens of a row: the context")
    boundaries: bool = Field(False, description="tokens read no other document than their own")
    validation: int = Field(64, ge=0, description="rows of the validation split that are evaluated; 0: none")

    @model_validator(mode="after")
    def _some(self) -> Data:
        if (self.corpus is None) == (self.recipe is None):
            raise ValueError("needs a corpus, or a recipe to build one by, and not both")
        if self.dir and not self.recipe:
            raise ValueError("dir goes with a recipe to build a corpus by")
        return self


class Batch(Settings):
    """How many rows a step reads on all processes together, and how many of them a process at once."""

    rows: Positive = Field(1024, description="rows of a step: 4 M tokens with rows of 4,096")
    micro: Positive = Field(1, description="rows that a process reads at once; the rest is accumulated")


class Optimizer(Settings):
    """AdamW and its schedule."""

    rate: float = Field(3e-4, gt=0, description="the learning rate's peak")
    final: float = Field(0.1, ge=0, le=1, description="share of the peak at the end")
    warmup: int = Field(2000, ge=0, description="steps")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class Spikes(Settings):
    """When the loss is out of the ordinary, and what then: go back to the last save, and leave out those rows."""

    deviations: float = Field(6.0, gt=0, description="above the mean of the last losses")
    least: float = Field(0.5, gt=0, description="nats above it, at the least")
    window: int = Field(100, ge=2, description="losses that are looked back on; no spike before there are so many")
    rewinds: int = Field(3, ge=0, description="how often a run goes back before it gives up")
    nonfinite: int = Field(3, ge=1, description="steps in a row that may have no finite loss or gradient")


class Mesh(Settings):
    """How processes share the network: `tensor` of them each matrix, the others the rest (FSDP2)."""

    tensor: Positive = 1


class Save(Settings):
    """How often the state and the model are kept."""

    every: Positive = Field(1000, description="steps")
    keep: Positive = Field(2, description="states, of which the last is whole")


class Samples(Settings):
    """Texts that the model continues at every save."""

    prompts: list[str] = Field([], description="beginnings")
    tokens: Positive = 64


class LoopSettings(Settings):
    """What every training run has."""

    steps: Positive
    seed: int = Field(0, ge=0, lt=1 << 32)
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    mesh: Mesh = Mesh()
    spikes: Spikes = Spikes()
    save: Save = Save()
    samples: Samples = Samples()
    evaluate: Positive = Field(500, description="steps between evaluations")
    watts: float | None = Field(None, gt=0, description="power of a device, for energy and carbon; none: not told")


class PretrainRecipe(LoopSettings):
    """A run of `llama2 pretrain`."""

    model: Model = Model()
    data: Data
