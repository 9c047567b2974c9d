"""What more safety data gives and takes (paper 4.2.3; spec 8.6): both rewards, and false refusals, by their share.

    python bench/safety_scaling.py recipes/lora-sft.toml recipes/reject.toml --safety safe.jsonl \\
        --borderline xstest.jsonl > scaling.json

The helpful dialogs are the SFT recipe's, and stay. Of the safety dialogs 0, 1, 10, 25, 50 and 100 % are added: those
of a smaller share are among those of a larger one. Each share is a run of `llama2 sft` from the recipe's start, or
the run that is there already. The paper has two epochs for all.

Then each model answers the held-out prompts of the recipe for rejection sampling at temperature 1, and both of its
reward models judge the answers. The refusal classifier judges them, too: a refusal of a prompt that is not tagged as
risky is false. `--borderline` has prompts that look risky and are not, such as XSTest's safe ones; a refusal is false
there. Each value has its interval of 95 %. The table goes to stderr, one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import provenance

from llama2 import api
from llama2 import recipe as recipes
from llama2.align import drawing
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.rounds import measured
from llama2.align.scorers import runtime_of
from llama2.align.store import Policy, SampleStore
from llama2.checkpoint import identity
from llama2.cli.progress import Bar
from llama2.data import dialog_files
from llama2.data import prompts as prompt_files
from llama2.data.comparisons import order
from llama2.data.prompts import PromptSettings, TaggedPrompt
from llama2.evaluate.harm import NotJudgedError, refused
from llama2.evaluate.intervals import mean_interval
from llama2.train.tuning import SftRecipe

SHARES = (0, 1, 10, 25, 50, 100)


def share_of(files: Sequence[Path], percent: float, seed: int) -> list[str]:
    """Records of so many percent of the safety dialogs, as JSON lines; a smaller share is part of a larger one."""
    rows = (raw for file in dialog_files.find(files) for _, raw in dialog_files.records(file))
    found = [json.dumps(dialog_files.value(raw)) for raw in rows]
    ordered = sorted(found, key=lambda text: order(seed, text))
    return ordered[: round(len(ordered) * percent / 100)]


def tuned(options: argparse.Namespace, percent: float) -> Path:
    """The run of a share, which is made if it is not there."""
    folder: Path = options.runs / f"safety-{percent:g}"
    data = options.runs / f"safety-{percent:g}.jsonl"
    lines = share_of(options.safety, percent, options.seed)
    options.runs.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(f"{line}\n" for line in lines))
    recipe = recipes.load(options.sft, SftRecipe, options.set)
    files = [str(file) for file in recipe.data.files] + ([str(data)] if lines else [])
    words = ["sft", str(options.sft), *options.set, f"data.files={json.dumps(files)}", "--runs", str(options.runs)]
    words += ["--out", folder.name, *(["--resume"] if (folder / "run.json").exists() else [])]
    subprocess.run([sys.executable, "-m", "llama2", *words], check=True, stdout=sys.stderr)
    if recipe.lora is None:
        return folder
    whole: Path = options.runs / f"safety-{percent:g}-whole"
    if not whole.exists():
        convert = ["convert", recipe.start, str(whole), "--to", "hf", "--adapter", str(folder)]
        subprocess.run([sys.executable, "-m", "llama2", *convert], check=True, stdout=sys.stderr)
    return whole


def refusals(recipe: RejectionRecipe, model: Path, prompts: Sequence[TaggedPrompt], store: Path) -> dict[str, Any]:
    """How often a model refuses prompts that are harmless, as far as that is judged."""
    with SampleStore.open(store) as opened, api.load(model, runtime_of(recipe.runtime)) as loaded:
        policy = Policy(identity.digest(loaded.checkpoint), 1.0, 1.0, recipe.max_tokens, recipe.seed)
        drawn = drawing.answers(loaded, opened, prompts, policy, 1, round=model.name, skip_bad=True, progress=Bar())
    values, clusters = [], []
    for prompt in prompts:
        for sample in drawn.get(prompt.id, []):
            try:
                values.append(refused(sample.answer, {})["refused"])
            except NotJudgedError:
                continue
            clusters.append(prompt.group)
    return mean_interval(values, clusters, proportion=True).to_json() if values else {"mean": None, "n": 0}


def main() -> None:
    """Tune, measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sft", type=Path, help="recipe of `llama2 sft` with the helpful dialogs")
    parser.add_argument("reject", type=Path, help="recipe of `llama2 reject`: reward models and held-out prompts")
    parser.add_argument("--safety", type=Path, nargs="+", required=True, help="files of safety dialogs")
    parser.add_argument("--borderline", type=Path, nargs="*", default=[], help="prompts that look risky and are not")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="percent")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--store", type=Path, default=Path("scaling-samples"), help="folder of the answers")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the SFT recipe")
    parser.add_argument("--reject-set", nargs="*", default=[], metavar="KEY=VALUE", help="of the other recipe")
    parser.add_argument("--seed", type=int, default=0, help="of which safety dialogs come first")
    options = parser.parse_args()
    recipe = recipes.load(options.reject, RejectionRecipe, options.reject_set)
    helpful = [p for p in prompt_files.read_held_out(recipe.prompts, recipe.seed) if not p.safety]
    borderline = prompt_files.read(PromptSettings(files=options.borderline), 0) if options.borderline else []
    found = []
    for percent in options.shares:
        model = tuned(options, percent)
        row: dict[str, Any] = {"percent": percent}
        row["scores"] = measured(recipe, str(model), options.store, 1, f"safety-{percent:g}", Bar())
        row["false_refusals"] = {"helpful": refusals(recipe, model, helpful, options.store)}
        if borderline:
            row["false_refusals"]["borderline"] = refusals(recipe, model, borderline, options.store)
        found.append(row)
        scores = ", ".join(f"{name} {each['mean']:.3f}" for name, each in row["scores"].items())
        false = ", ".join(f"{name} {each['mean']}" for name, each in row["false_refusals"].items())
        print(f"{percent:g} %: {scores}; false refusals: {false}", file=sys.stderr)
    print(json.dumps(provenance() | {"measured": found, "recipe": recipe.model_dump(mode="json")}))


if __name__ == "__main__":
    main()
