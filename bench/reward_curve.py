"""A reward model's accuracy by the number of pairs it was trained on (paper, figure 6): ⅛, ¼, ½ and all of them.

    python bench/reward_curve.py recipes/reward-helpful.toml data.files='["helpful-base.jsonl.gz"]'

Prints a JSON object: of each fraction the pairs, and of each held-out set the accuracy with its interval. Runs are in
--runs. Those that are whole are not trained again, and one that was stopped continues. Smaller fractions are parts of
larger ones, and the held-out pairs are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llama2 import hub, records
from llama2 import recipe as recipes
from llama2.align.reward_recipe import RewardRecipe
from llama2.align.reward_report import REPORT
from llama2.align.reward_training import reward
from llama2.cli.training import ConsoleReporter


def point(recipe: Path, settings: list[str], fraction: float, runs: Path) -> dict[str, Any]:
    """A fraction's pairs and accuracies, from its run or a new one."""
    folder = runs / f"{recipe.stem}-{fraction:g}"
    if not (folder / REPORT).exists():
        chosen = recipes.load(recipe, RewardRecipe, [*settings, f"data.fraction={fraction!r}"])
        resume = (folder / records.ORIGIN).exists()
        reward(chosen, folder, locate=hub.locate, resume=resume, reporter=ConsoleReporter())
    report = json.loads((folder / REPORT).read_text())
    names = ("accuracy", "by_length")
    sets = {name: {each: found[each] for each in names} for name, found in report.items()}
    return {"fraction": fraction, "pairs": records.Run.open(folder).origin["pairs"], "sets": sets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--runs", type=Path, default=Path("runs/reward-curve"))
    words = parser.parse_intermixed_args()
    points = [point(words.recipe, words.settings, fraction, words.runs) for fraction in words.fractions]
    json.dump({**records.origin(), "points": points}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
