"""Does a recipe's training go as transformers' own model would? Prints JSON; exit code 1 says that it does not.

    python bench/small_beside_transformers.py recipes/small.toml --corpus corpora/small -o small.json --plot small.svg

Three models read the same batches, step by step in one process:

    ours          the recipe: our network, loss, AdamW, clipping and schedule
    theirs        transformers' LlamaForCausalLM, loss and schedule, and torch's AdamW, from the same weights
    theirs again  the same, from weights that were rounded to bfloat16

Training is chaotic, so that two correct programs drift apart. The third model shows how far: what separates `theirs`
from `theirs again` is noise. The curves agree when what separates ours from theirs is, on average over the last half of
the steps, at most `--times` that, or 0.001 nats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from llama2 import recipe as recipes
from llama2.checkpoint import Checkpoint
from llama2.data.loader import Loader, TokenBatch, Windows
from llama2.data.shards import Shards
from llama2.model.transformer import Transformer
from llama2.records import installed
from llama2.train.continuation import schedule_of
from llama2.train.schedule import lr_of
from llama2.train.settings import PretrainRecipe
from llama2.train.states import write_model
from llama2.train.training import step_of

#: Nats that never count as a difference.
LEAST = 1e-3

#: Micro-batches → the loss before the step.
Train = Callable[[Sequence[TokenBatch]], float]


def ours(recipe: PretrainRecipe, network: Transformer) -> Train:
    """The recipe's step and schedule."""
    step = step_of(recipe, network)
    done = 0

    def train(batches: Sequence[TokenBatch]) -> float:
        nonlocal done
        done += 1
        return step.step(batches, lr_of([schedule_of(recipe)], done)).loss

    return train


def theirs(recipe: PretrainRecipe, model: torch.nn.Module) -> Train:
    """The same with what transformers and torch have."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    o = recipe.optimizer
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, o.warmup, recipe.steps, min_lr_rate=o.min_lr_ratio
    )
    optimizer.step()  # of no gradients yet, and so of nothing: it has to come before the schedule's
    schedule.step()  # whose first rate is that of step 0
    run = torch.compile(model) if recipe.compile else model

    def train(batches: Sequence[TokenBatch]) -> float:
        count = sum(batch.targets.size for batch in batches)
        total = 0.0
        for batch in batches:
            tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = run(input_ids=tokens, labels=targets, shift_labels=targets).loss * (targets.numel() / count)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, o.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return total

    return train


def models(network: Transformer, corpus: Shards) -> tuple[torch.nn.Module, torch.nn.Module]:
    """transformers' model with the network's weights, and with those rounded, by way of files that it reads itself."""
    from transformers import LlamaForCausalLM

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            path = Path(folder) / precision
            like = Checkpoint(path, "huggingface", network.config, {}, {}, tokenizer_source=corpus.load_tokenizer)
            write_model(path, network.state_dict(), like, precision)
            found.append(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).train())
    return found[0], found[1]


def compare(losses: dict[str, list[float]], times: float) -> dict[str, Any]:
    """How far the curves are apart in the last half of the steps, and whether that is noise."""
    half = len(losses["ours"]) // 2

    def apart(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(losses[one][half:], losses[other][half:], strict=True)]

    difference, noise = apart("ours", "theirs"), apart("theirs again", "theirs")
    result = {
        "mean_absolute_difference": statistics.fmean(map(abs, difference)),
        "mean_absolute_noise": statistics.fmean(map(abs, noise)),
        "mean_difference": statistics.fmean(difference),
        "mean_noise": statistics.fmean(noise),
        "first_difference": losses["ours"][0] - losses["theirs"][0],
    }
    allowed = max(LEAST, times * result["mean_absolute_noise"])
    return {**result, "allowed": allowed, "agree": result["mean_absolute_difference"] <= allowed}


def draw(losses: dict[str, list[float]], file: Path) -> None:
    """The curves, and beside them what separates them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in losses.items():
        left.plot(range(1, len(curve) + 1), curve, label=name, linewidth=0.8)
    for name in ("ours", "theirs again"):
        gap = [a - b for a, b in zip(losses[name], losses["theirs"], strict=True)]
        right.plot(range(1, len(gap) + 1), gap, label=f"{name} − theirs", linewidth=0.8)
    left.set(title="training loss", xlabel="steps", ylabel="nats a token")
    right.set(title="difference", xlabel="steps", ylabel="nats a token")
    for panel in (left, right):
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a recipe of `llama2 pretrain`")
    parser.add_argument("settings", nargs="*", help="settings in place of the recipe's, KEY=VALUE")
    parser.add_argument("--corpus", type=Path, required=True, help="the built corpus's folder")
    parser.add_argument("--steps", type=int, default=500, help="the run's first steps (default: %(default)s)")
    parser.add_argument("--times", type=float, default=2.0, help="of the noise that is allowed (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="a file for the curves: .png, .svg or .pdf")
    parser.add_argument("-o", "--output", type=Path, help="a file for the JSON, instead of standard output")
    asked = parser.parse_intermixed_args(arguments)

    recipe = recipes.load(asked.recipe, PretrainRecipe, asked.settings)
    if recipe.data.boundaries:
        parser.error("data.boundaries: transformers' model reads across documents; leave it off")
    shards = Shards.open(asked.corpus, "train")
    network = Transformer(recipe.model.config(shards.manifest.tokenizer.vocabulary, recipe.data.length))
    network.initialise(torch.Generator().manual_seed(recipe.seed))
    theirs_, again = models(network, shards)
    programs = {"ours": ours(recipe, network), "theirs": theirs(recipe, theirs_), "theirs again": theirs(recipe, again)}
    loader = Loader(Windows(shards, length=recipe.data.length), rows=recipe.batch.micro_size, seed=recipe.seed)
    losses: dict[str, list[float]] = {name: [] for name in programs}
    seconds = dict.fromkeys(programs, 0.0)
    for step in range(1, asked.steps + 1):
        batches = [loader.next() for _ in range(recipe.batch.size // recipe.batch.micro_size)]
        for name, train in programs.items():
            begun = time.perf_counter()
            losses[name].append(train(batches))
            seconds[name] += time.perf_counter() - begun
        if step % 10 == 0 or step == asked.steps:
            line = "  ".join(f"{name} {curve[-1]:.4f}" for name, curve in losses.items())
            print(f"step {step}/{asked.steps}  {line}", file=sys.stderr, flush=True)
    result = {
        **provenance(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "recipe": recipe.model_dump(mode="json"),
        "corpus": shards.sha256,
        "parameters": network.config.parameters(),
        **compare(losses, asked.times),
        "seconds": {name: round(each, 1) for name, each in seconds.items()},
        "losses": losses,
    }
    text = json.dumps(result, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if asked.plot:
        draw(losses, asked.plot)
    return 0 if result["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
