"""`llama2 pretrain`: from a corpus to a base model (paper 2.2)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from llama2 import recipe as recipes
from llama2.data import shards
from llama2.data.loader import Batch, Loader, Windows
from llama2.data.shards import Shards
from llama2.errors import RunError
from llama2.model.transformer import Transformer
from llama2.records import Run
from llama2.train.loop import Loop, Sample, Watch
from llama2.train.processes import Processes, processes
from llama2.train.settings import Data, PretrainRecipe


def pretrain(
    recipe: PretrainRecipe,
    folder: Path,
    *,
    beside: Path = Path(),
    resume: bool = False,
    sample: Sample | None = None,
    watch: Watch | None = None,
) -> Run:
    """Train by a recipe, whose paths are relative to `beside`, and leave the run in `folder`.

    With `resume` the run that is there goes on from its last state, with the same losses as if it had never stopped.
    Under torchrun every process calls this. Raises RunError, DataError, RecipeError and ConfigError, before the first
    step if it can be known then.
    """
    with processes(recipe.mesh.tensor) as here:
        corpus = _corpus(recipe.data, beside, folder, here)
        train = Shards.open(corpus, "train")
        length, boundaries = recipe.data.length, recipe.data.boundaries
        validation: list[Batch] = []
        if recipe.data.validation:
            windows = Windows(Shards.open(corpus, "validation"), length=length, boundaries=boundaries)
            validation = Loader(windows, rows=recipe.batch.micro, seed=0).first(recipe.data.validation)
        with torch.device("meta"):
            network = Transformer(recipe.model.config(train.manifest.tokenizer.vocabulary, length))
        loop = Loop(
            recipe,
            folder,
            here,
            source=Windows(train, length=length, boundaries=boundaries),
            validation=validation,
            network=network,
            tokenizer=train.load_tokenizer(),
            sample=sample,
            watch=watch,
        )
        return loop.run(resume)


def _corpus(data: Data, beside: Path, run: Path, here: Processes) -> Path:
    """The corpus's folder; it is built by its recipe if it is not there."""
    if data.recipe is None:
        return data.corpus or Path()
    from llama2.data.build import build
    from llama2.data.settings import BuildRecipe

    changed = [f"dir={json.dumps(data.dir)}", f"output={json.dumps(str(run / 'corpus'))}"] if data.dir else []
    asked = recipes.load(beside / data.recipe, BuildRecipe, changed)
    if here.first and not (asked.output / shards.MANIFEST).exists() and build(asked) is None:
        raise RunError(f"{asked.output}: is being built by {asked.executor.kind}; begin again when it is whole")
    if here.mesh is not None:
        dist.barrier()
    return asked.output
