"""Helpfulness against safety: what models gain and lose, by reward models and by Measure's tests.

    python bench/frontier.py recipes/reject.toml v1=rounds/v1/model v2=rounds/v2/model --data DATA --plot frontier.png \
        > frontier.json

Each model has a name, and is one setting: a round, a share of safety data, distillation with the gate and without. It
answers the held-out prompts of the recipe at temperature 1, which both reward models of the recipe judge. And
`llama2 evaluate` puts it to AdvBench (attack success: the share that complies), ToxiGen (toxicity) and XSTest's safe
prompts (false refusals), in its chat format. Every value has its interval of 95 %. What was computed before is not
computed again. The table goes to stderr, one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2 import recipe as recipes
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.rounds import measured
from llama2.cli.progress import Bar

#: Tasks of `llama2 evaluate`, the metric of each, and what it is called here.
TASKS = {
    "advbench": ("complied", "attack success"),
    "toxigen": ("toxic", "toxic"),
    "xstest_safe": ("refused", "false refusals"),
}


def evaluated(name: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The tests' scores of a model, with their intervals; none where no data was given."""
    if options.data is None:
        return {}
    folder = options.runs / f"frontier-{name}"
    words = ["evaluate", model, "--tasks", ",".join(TASKS), "--data", str(options.data), "--chat", "--out", str(folder)]
    words += ["--limit", str(options.limit)] if options.limit else []
    words += ["--resume"] if (folder / "run.json").exists() else []
    subprocess.run([sys.executable, "-m", "llama2", *words], check=True, stdout=sys.stderr)
    tasks = json.loads((folder / "record.json").read_text())["tasks"]
    measures = ((shown, tasks.get(task, {}).get("metrics", {}).get(metric)) for task, (metric, shown) in TASKS.items())
    return {shown: found["interval"] for shown, found in measures if found}


def draw(models: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Helpfulness by safety of each model, with intervals, in the order of the models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    panel = figure.subplots()
    for name, found in models.items():
        x, y = found["safety"], found["helpful"]
        panel.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            marker="o",
            label=name.replace("$", r"\$"),
        )
    panel.set(xlabel="safety reward", ylabel="helpfulness reward", title="means with intervals of 95 %")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of `llama2 reject`")
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--data", type=Path, help="folder of the sets of `llama2 evaluate`; none: reward models alone")
    parser.add_argument("--limit", type=int, help="items of each test")
    parser.add_argument("--samples", type=int, default=1, help="answers to each held-out prompt")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the evaluations")
    parser.add_argument("--store", type=Path, default=Path("frontier-samples"), help="folder of the answers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw helpfulness by safety")
    options = parser.parse_args()
    recipe = recipes.load(options.recipe, RejectionRecipe, options.set)
    found: dict[str, Any] = {}
    for given in options.models:
        name, _, model = given.partition("=")
        scores = measured(recipe, model, options.store, options.samples, name, Bar())
        found[name] = scores | evaluated(name, model, options)
        said = ", ".join(f"{k} {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in found[name].items())
        print(f"{name}: {said}", file=sys.stderr)
    if options.plot:
        draw(found, options.plot)
    print(json.dumps(provenance() | {"models": found, "recipe": recipe.model_dump(mode="json")}))


if __name__ == "__main__":
    main()
