"""What PPO gains on held-out prompts at a stated KL divergence, beside best of K at the same divergence.

    python bench/ppo_gain.py recipes/ppo.toml 'prompts.files=["prompts.jsonl"]' > ppo_gain.json
    python bench/ppo_gain.py recipes/ppo.toml --seeds 1 2 --samples 64 --runs runs > ppo_gain.json

For each seed, `llama2 ppo` runs in a process of its own under the name ppo-seed-N, or goes on where it was. Start and
policy then draw answers to the held-out prompts (`prompts.held_out`) at temperature 1. Differences of rewards by each
reward model and of lengths are paired by prompt, with intervals of 95 %, clustered by conversation. The divergence is
in nats an answer, unbiased. A seed chooses order and answers; the recipe's own chooses the held-out prompts.

Best of K draws `--samples` answers of the start to each prompt, into a store. K answers, of which the one with the best
combined reward is taken, diverge by at most log K − (K − 1) / K. Its rewards and length are interpolated at the
policy's divergence. A divergence beyond the largest K is stated, and compared with that K. Answers that were cut are
scored as they are, on both sides; their number is in the record.

The table goes to stderr, one JSON object with every value to stdout. A difference whose interval holds 0 is a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import best_of
import numpy as np
from provenance import provenance

from llama2 import api
from llama2 import recipe as recipes
from llama2.align.ppo_recipe import PpoRecipe
from llama2.align.rejection_settings import RejectionRecipe, RewardModelSettings
from llama2.align.scorers import open_scorers, runtime_of
from llama2.align.store import SampleStore
from llama2.data import prompts as prompt_files
from llama2.data.prompts import PromptSettings


def sampling(recipe: PpoRecipe, samples: int, store: Path) -> RejectionRecipe:
    """The recipe of best of K from the start of PPO, on the same held-out prompts."""
    rewards = recipe.rewards.model_dump(include={*RewardModelSettings.model_fields})
    prompts = recipe.prompts.model_dump(mode="json", include={*PromptSettings.model_fields})
    table = {
        "models": {"start": recipe.start},
        "prompts": prompts,
        "rewards": rewards,
        "store": str(store),
        "samples": samples,
        "temperature": 1.0,
        "max_tokens": recipe.max_tokens,
        "seed": recipe.prompt_seed,
        "runtime": recipe.runtime.model_dump(),
    }
    return recipes.make(table, RejectionRecipe, where="best of K")


def train(file: Path, settings: Sequence[str], seed: int, first: int, runs: Path) -> tuple[Path, float]:
    """The run of a seed, which is begun, continued, or there already; and how long this took."""
    folder = runs / f"ppo-seed-{seed}"
    words = [
        "ppo",
        str(file),
        *settings,
        f"seed={seed}",
        f"prompts.seed={first}",
        "--name",
        folder.name,
        "--runs",
        str(runs),
    ]
    if (folder / "run.json").exists():
        words.append("--resume")
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama2", *words], check=True, stdout=sys.stderr)
    return folder, time.perf_counter() - begun


def at_divergence(curve: Sequence[Mapping[str, Any]], kl: float) -> dict[str, Any]:
    """Rewards, length and K of best of K, interpolated where its bound on the divergence is `kl`."""
    bounds = [point["kl_bound"] for point in curve]

    def at(values: Sequence[float]) -> float:
        return float(np.interp(kl, bounds, values))

    return {
        "k": at([point["k"] for point in curve]),
        "beyond": kl > bounds[-1],
        "tokens": at([point["tokens"] for point in curve]),
        "reward": at([point["maximum"] for point in curve]),
        "rewards": {name: at([p["rewards"][name]["mean"] for p in curve]) for name in curve[0]["rewards"]},
    }


def main() -> None:
    """Train, measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of the runs")
    parser.add_argument("--samples", type=int, default=64, help="answers to a prompt for best of K")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--store", type=Path, default=Path("samples"), help="folder of best of K's answers")
    options = parser.parse_args()
    recipe = recipes.load(options.recipe, PpoRecipe, options.settings)
    best = sampling(recipe, options.samples, options.store)
    prompts = prompt_files.read_held_out(best.prompts, best.seed)
    if not prompts:
        raise SystemExit("prompts.held_out is 0; hold out some, such as prompts.held_out=200")
    trained = [train(options.recipe, options.settings, seed, best.seed, options.runs) for seed in options.seeds]
    runtime, found = runtime_of(recipe.runtime), []
    with ExitStack() as stack:
        scorers = stack.enter_context(open_scorers(recipe.rewards.models, recipe.runtime))
        store = stack.enter_context(SampleStore.open(best.store))
        store.add_prompts(prompts)
        with api.load(recipe.start, runtime) as model:
            drawn = best_of.answers(model, "start", store, prompts, best)
        groups = best_of.judged(store, drawn, prompts, scorers, best)
        curves = best_of.curves(groups, [prompt.group for prompt in prompts])
        curve = curves.get("combined", next(iter(curves.values())))["curve"]
        for seed, (folder, seconds) in zip(options.seeds, trained, strict=True):
            found.append({"seed": seed, "run": folder.name, "seconds": seconds})
            found[-1] |= best_of.tuning(best, str(folder), prompts, scorers, runtime)
            found[-1]["best_of_k"] = at_divergence(curve, max(0.0, found[-1]["kl"]["mean"]))
            table(found[-1])
    about = {"prompts": len(prompts), "recipe": recipe.model_dump(mode="json")}
    print(json.dumps(provenance() | about | {"seeds": found, "curves": curves}))


def table(run: Mapping[str, Any]) -> None:
    """Print a run's gains beside those of best of K."""
    kl, best = run["kl"], run["best_of_k"]
    print(
        f"seed {run['seed']}: KL {kl['mean']:.2f} [{kl['low']:.2f}, {kl['high']:.2f}] nats an answer", file=sys.stderr
    )
    beside = {**best["rewards"], "combined": best["reward"], "tokens": best["tokens"]}
    for name, each in run["compared"].items():
        print(
            f"  {name:9} {each['mean_b']:8.3f} at the start, {each['mean_a']:8.3f} after, difference "
            f"{each['difference']:+.3f} ± {1.96 * each['se']:.3f}; best of {best['k']:.1f}: {beside[name]:.3f}",
            file=sys.stderr,
        )
    if best["beyond"]:
        print("  the divergence is beyond that of the largest K, which is shown", file=sys.stderr)


if __name__ == "__main__":
    main()
