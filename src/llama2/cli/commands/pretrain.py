"""`llama2 pretrain`: a base model from a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama2.cli.training import training_command

EXAMPLE = "Example: llama2 pretrain recipes/nano.toml --name first steps=500 optimizer.lr=2e-3"
RECIPES = {"llama2 pretrain": "llama2.train.settings:PretrainRecipe"}


def continuations(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Continue texts with the engine that people will use the model with."""
    from llama2 import api

    with api.load(model) as loaded:
        return [prompt + loaded.generate(prompt, max_tokens=tokens, temperature=0.8, seed=0).text for prompt in prompts]


command = training_command(
    recipe=RECIPES["llama2 pretrain"],
    train="llama2.train.pretrain:pretrain",
    sample=continuations,
    advice="continue a text with: llama2 generate -m {folder} TEXT",
    help="""Train a model on a corpus, which is built first if the recipe says how.

    data.dir=FOLDER takes any folder of documents: texts, Markdown, code, HTML, JSON lines, Parquet, also compressed.

    start=MODEL continues from a model, with its shape and tokenizer: a run, a folder, a GGUF file, a name.
    The learning rate then warms up again, from zero to optimizer.lr in optimizer.warmup steps, and falls from there.
    Choose a peak well below that of the first training, as recipes/continue.toml does.

    One process uses all cores or one GPU. For more:
    torchrun --nproc-per-node N $(which llama2) pretrain RECIPE, with mesh.tensor=M to split matrices among M.

    The run is a folder in runs/. It opens like any model: llama2 generate -m runs/NAME "Once upon a time".
    """,
)
