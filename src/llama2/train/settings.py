"""Settings of training runs, and of `llama2 pretrain`. Defaults are the paper's (2.2), unless they go with size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llama2.config import SIZES, ModelConfig
from llama2.errors import RecipeError
from llama2.recipe import Settings

#: The most of anything that is counted.
MOST = 10**12
Positive = Annotated[int, Field(ge=1, le=MOST)]
#: A dimension of a matrix, or of a step: two of them, multiplied, are a size that every library can count.
Width = Annotated[int, Field(ge=1, le=1 << 20)]
#: Above so many parameters, all of them are trained only where that is requested.
LARGE = 10**9
#: Matrices that can have an update, by peft's names.
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: A decay of AdamW's moments.
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """The network: a published size, or its shape. The vocabulary is the corpus's."""

    size: Literal["7B", "13B", "34B", "70B"] | None = Field(None, description="a published size, in place of a shape")
    dim: Width = Field(4096, description="width: values of a token between blocks")
    n_layers: int = Field(32, ge=1, le=1000, description="blocks")
    n_heads: Width = Field(32, description="query heads, which divide the width")
    n_kv_heads: Width | None = Field(None, description="key/value heads; none: as many as query heads")
    hidden_dim: Width = Field(11008, description="width inside a feed-forward network")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in a norm")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    tied_embeddings: bool = Field(False, description="the head is the embeddings")

    @model_validator(mode="after")
    def _one(self) -> ModelSettings:
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


class CorpusSettings(Settings):
    """The corpus: one of `llama2 data build`, or a recipe or folder to build one from first."""

    corpus: Path | None = Field(None, description="folder of a built corpus")
    recipe: Path | None = Field(None, description="recipe of `llama2 data build`, beside this one")
    dir: str | None = Field(
        None, description="a folder of documents, all of which become the corpus, in place of the recipe's own sources"
    )
    length: Positive = Field(4096, description="tokens of a row: the context")
    boundaries: bool = Field(False, description="tokens read no other document than their own")
    validation: int = Field(64, ge=0, description="rows of the validation split that are evaluated; 0: none")

    @model_validator(mode="after")
    def _some(self) -> CorpusSettings:
        if (self.corpus is None) == (self.recipe is None and self.dir is None):
            raise ValueError("needs a corpus, or what to build one from (recipe, dir), and not both")
        return self


class BatchSettings(Settings):
    """How many rows a step reads on all processes together, and how many of them a process at once."""

    size: Width = Field(1024, description="rows of a step: 4 M tokens with rows of 4,096")
    micro_size: Width = Field(1, description="rows that a process reads at once; the rest is accumulated")


class OptimizerSettings(Settings):
    """AdamW and its schedule."""

    lr: float = Field(3e-4, gt=0, description="the learning rate's peak")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="the learning rate at the end, as a fraction of the peak")
    warmup: int = Field(2000, ge=0, description="steps in which the learning rate rises to its peak; at most `steps`")
    rewarm: int | None = Field(
        None,
        ge=0,
        description="with --resume and another schedule: steps from the learning rate of the last step to the peak",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="decay of the means of gradients and of their squares")
    eps: float = Field(1e-5, gt=0, description="added to the root of the squares' mean")
    weight_decay: float = Field(0.1, ge=0, description="of matrices, times the learning rate; norms have none")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class SpikeSettings(Settings):
    """When the loss is out of the ordinary. The run then returns to the last state, and leaves out those rows."""

    deviations: float = Field(6.0, gt=0, description="above the mean of the last losses")
    min_increase: float = Field(0.5, gt=0, description="nats above that mean, at least")
    window: int = Field(100, ge=2, description="losses of that mean; no spike before there are so many")
    rewinds: int = Field(3, ge=0, description="how often a run returns to a state before it gives up")
    nonfinite: int = Field(3, ge=1, description="steps in a row that may have no finite loss or gradient")


class MeshSettings(Settings):
    """How processes shard the network: `tensor` of them each matrix, the others the rest (FSDP2)."""

    tensor: Positive = Field(1, description="processes that shard each matrix")


class SaveSettings(Settings):
    """How often the state and the model are saved."""

    every: Positive = Field(1000, description="steps between states; the last step has one too")
    keep_last: Positive = Field(2, description="states that stay; older ones are removed")


class SampleSettings(Settings):
    """Texts that the model continues at every save."""

    prompts: list[str] = Field([], description="beginnings, or for `llama2 sft` questions")
    tokens: Positive = Field(64, description="tokens that follow a beginning")


#: Old names of settings → new ones. A recipe with an old name is refused with the new one; records of runs are read.
RENAMED = {
    "batch.rows": "batch.size",
    "batch.micro": "batch.micro_size",
    "optimizer.rate": "optimizer.lr",
    "optimizer.final": "optimizer.min_lr_ratio",
    "checkpointing": "recompute",
    "spikes.least": "spikes.min_increase",
    "save.keep": "save.keep_last",
}


class LoraSettings(Settings):
    """An adapter of low rank that is trained in place of the model's own weights (LoRA, Hu et al. 2021).

    Defaults are those of Meta's llama-recipes.
    """

    rank: int = Field(8, ge=1, le=4096, description="rank of each update")
    alpha: float = Field(32, gt=0, le=10**6, description="an update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of an update's inputs, while it is trained")
    targets: list[Target] = Field(["q_proj", "v_proj"], min_length=1, description="matrices that have an update")
    quantize: Literal["Q4_1", "Q4_0"] | None = Field(
        None, description="number format of the frozen matrices (QLoRA); none: that of products"
    )
    adapter: str = Field(
        "", description="an adapter to continue: a run, a folder or a name; rank, alpha and targets are then its own"
    )


class LoopSettings(Settings):
    """Settings of every training run."""

    renamed: ClassVar[dict[str, str]] = RENAMED

    steps: Positive = Field(description="steps of the optimiser")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of weights and of the rows' order")
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of products, and of the saved model; unless given, bf16 where the processor has it"
    )
    compile: bool = Field(
        True, description="torch.compile, for speed; without a C++ compiler the run continues without"
    )
    recompute: bool = Field(False, description="compute activations again in the backward pass, to save memory")
    mesh: MeshSettings = MeshSettings()
    spikes: SpikeSettings = SpikeSettings()
    save: SaveSettings = SaveSettings()
    samples: SampleSettings = SampleSettings()
    evaluate: Positive = Field(500, description="steps between evaluations")
    watts: float | None = Field(None, gt=0, description="power of a device, for energy and carbon; none: not reported")

    @model_validator(mode="after")
    def _warm(self) -> LoopSettings:
        if reason := long_warmup(self.optimizer.warmup, self.steps or math.inf):  # 0: not known yet
            raise ValueError(reason)
        return self


class TuningSettings(LoopSettings):
    """Settings of a run that begins with a model: every weight of it is trained, or an adapter."""

    start: str = Field(description="the model to begin with: a run, a folder or file, or a name")
    template: str = Field("", description="a chat format's name or a Jinja file, in place of the model's own template")
    full: bool = Field(False, description="train every weight, also of a model of more than a billion parameters")
    lora: LoraSettings | None = Field(None, description="train an adapter; without this table, every weight")
    steps: int = Field(0, ge=0, description="0: as many as `epochs` take")

    @model_validator(mode="after")
    def _weights_or_adapter(self) -> TuningSettings:
        if self.full and self.lora is not None:
            raise ValueError("has full and also lora; every weight is trained or an adapter, leave either out")
        if self.lora is not None and self.mesh.tensor > 1:
            raise ValueError("mesh.tensor: adapters are not trained by tensor parallelism; leave mesh.tensor out")
        return self

    def refuse_large(self, parameters: int) -> None:
        """Raise RecipeError for a model whose weights are not all trained unless that is requested."""
        if parameters > LARGE and not self.full and self.lora is None:
            raise RecipeError(
                f"{self.start}: has {parameters / 1e9:.1f} billion parameters; lora.rank=8 trains an adapter, "
                f"full=true every weight, in about {16 * parameters / 1e9:.0f} GB of memory"
            )


def rows_at_once(step: int, dp_size: int, most: int) -> int:
    """The largest divisor of the rows of a step that a process has, up to `most`, at least one."""
    rows = step // dp_size
    return next(m for m in range(max(1, min(most, rows)), 0, -1) if rows % m == 0)


def precision_of(recipe: LoopSettings, bf16: bool) -> Literal["bf16", "fp32"]:
    """The recipe's, or what the processor does; `bf16`: it has instructions for bfloat16."""
    return recipe.precision if bf16 or "precision" in recipe.model_fields_set else "fp32"


def long_warmup(warmup: int, steps: float) -> str | None:
    """The error of a warm-up that is longer than its run; None for any other."""
    if warmup <= steps:
        return None
    return f"optimizer.warmup={warmup} is longer than the run, steps={steps}; choose fewer steps of warm-up"


class PretrainRecipe(LoopSettings):
    """A run of `llama2 pretrain`."""

    start: str = Field(
        "",
        description="model to continue from, with its tokenizer: a run, folder, file or name; none: a new one",
    )
    model: ModelSettings = ModelSettings()
    data: CorpusSettings
