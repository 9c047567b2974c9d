"""`llama2 sft`: from a model and dialogs to one that answers (paper 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from llama2 import checkpoint
from llama2.data import dialogs, loader
from llama2.data.dialogs import DialogSettings, Packed, Prepared
from llama2.data.loader import Loader
from llama2.errors import RecipeError
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.train import settings
from llama2.train.loop import Loop, Sample, Watch
from llama2.train.processes import processes


class Optimizer(settings.Optimizer):
    """AdamW and its schedule. The paper tells peak and decay; that there is no warm-up is ours."""

    rate: float = Field(2e-5, gt=0, description="the learning rate's peak")
    warmup: int = Field(0, ge=0, description="steps")


class Batch(settings.Batch):
    """How many rows a step reads on all processes together, and how many of them a process at once."""

    rows: int = Field(64, ge=1, description="rows of a step")


class SftRecipe(settings.LoopSettings):
    """A run of `llama2 sft`. Defaults are the paper's."""

    start: str = Field(description="the model to begin with: a run, a folder or file, or a name")
    data: DialogSettings
    steps: int = Field(0, ge=0, description="0: as many as `epochs` take")
    epochs: float = Field(2.0, gt=0, description="how often each dialog is read")
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()


def sft(
    recipe: SftRecipe,
    folder: Path,
    *,
    locate: Callable[[str], Path],
    resume: bool = False,
    sample: Sample | None = None,
    watch: Watch | None = None,
) -> Run:
    """Tune a model, which `locate` finds by its name, on dialogs, and leave the run in `folder`.

    Loss is on what the assistant says alone. What is left is as `pretrain` does it. Raises DataError and DialogError
    for dialogs that the model's chat format does not know.
    """
    with processes(recipe.mesh.tensor) as here, checkpoint.open(locate(recipe.start)) as start:
        if recipe.data.length > start.config.context_length:
            raise RecipeError(
                f"data.length={recipe.data.length} is more than {start.path} reads, {start.config.context_length}; "
                "choose shorter rows"
            )
        ready = dialogs.prepare(recipe.data, start.tokenizer, start.template, seed=recipe.seed)
        steps = recipe.steps or math.ceil(recipe.epochs * len(ready.train) / recipe.batch.rows)
        loop = Loop(
            recipe.model_copy(update={"steps": steps}),
            folder,
            here,
            source=ready.train,
            validation=_all(ready.validation, recipe.batch.micro),
            network=Transformer.load(start, device=here.device),
            tokenizer=start.tokenizer,
            template=start.template,
            about={"dialogs": ready.train.dialogs, "left_out": ready.left_out, "learnt": ready.train.learnt},
            sample=sample,
            watch=watch,
        )
        if watch and here.first:
            watch.begin([_told(ready)])
        return loop.run(resume)


def _all(packed: Packed | None, micro: int) -> list[loader.Batch]:
    """Every row, `micro` at a time."""
    return Loader(packed, rows=micro, seed=0).first(len(packed)) if packed else []


def _told(ready: Prepared) -> str:
    """What is learnt from, in a line."""
    some, without = ready.train, ""
    if ready.left_out:
        without = f", without {ready.left_out:,} that are longer than a row"
    return (
        f"{some.dialogs:,} dialogs{without}, in {len(some):,} rows that are {some.filled:.0%} full; "
        f"{some.learnt:,} tokens are learnt"
    )
