"""The default model's scores beside those that others published for SmolLM2-135M-Instruct. A Markdown table on stdout.

    llama2 evaluate smollm2-135m-instruct --tasks hellaswag,arc_easy,arc_challenge,piqa,mmlu@cloze \\
        --data DIR --out paper
    llama2 evaluate smollm2-135m-instruct --tasks hellaswag,arc_easy,arc_challenge,piqa,gsm8k --protocol harness \\
        --data DIR --out harness
    python bench/evaluate_figures.py paper harness

The model's card has lighteval's figures, in bfloat16: zero-shot, normalised by characters, with the prompts that our
tasks have. Another publisher ran lm-evaluation-harness. Ours is the Q4_1 file. Exit code 1 if a score of HellaSwag,
ARC or PIQA is more than 2.5 points off, or none of the figures is in the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import as_markdown

from llama2.evaluate.intervals import Interval, weighted_mean
from llama2.evaluate.scores import read_record

#: Points from which a score is a bug until it is explained.
LIMIT = 2.5
CARD = "card, lighteval"
THIRD = "third party, lm-evaluation-harness"


@dataclass(frozen=True, slots=True)
class Figure:
    """A published score in percent: of which tasks' mean, by which metric and protocol of ours it is measured."""

    name: str
    source: str
    protocol: str
    labels: tuple[str, ...]
    metric: str
    percent: float
    bound: bool  # whether more than LIMIT is a failure


FIGURES = (
    Figure("HellaSwag", CARD, "paper", ("hellaswag",), "acc_norm", 40.9, True),
    Figure("ARC, mean of both", CARD, "paper", ("arc_easy", "arc_challenge"), "acc_norm", 37.3, True),
    Figure("PIQA", CARD, "paper", ("piqa",), "acc_norm", 66.3, True),
    Figure("MMLU, cloze", CARD, "paper", ("mmlu@cloze",), "acc_norm", 29.3, False),
    Figure("GSM8K, 5-shot", CARD, "harness", ("gsm8k",), "exact_match,strict-match", 1.4, False),
    Figure("ARC-c", THIRD, "harness", ("arc_challenge",), "acc_norm", 27.73, True),
    Figure("ARC-e", THIRD, "harness", ("arc_easy",), "acc", 54.12, True),
    Figure("HellaSwag", THIRD, "harness", ("hellaswag",), "acc_norm", 42.99, True),
    Figure("PIQA", THIRD, "harness", ("piqa",), "acc_norm", 66.92, True),
    Figure("GSM8K, 5-shot", THIRD, "harness", ("gsm8k",), "exact_match,flexible-extract", 0.38, False),
)


def measured(figure: Figure, records: Sequence[Mapping[str, Any]]) -> Interval | None:
    """Our score, as a fraction, of the first run that has all of a figure's tasks; None if none has."""
    for record in records:
        tasks = [record["tasks"].get(label, {}) for label in figure.labels]
        found = [task["metrics"].get(figure.metric) for task in tasks if "metrics" in task]
        if record["settings"]["protocol"] == figure.protocol and len(found) == len(tasks) and all(found):
            parts = [Interval.from_json(each["interval"]) for each in found]
            return parts[0] if len(parts) == 1 else weighted_mean(parts)
    return None


def row(figure: Figure, ours: Interval | None) -> list[str]:
    """A figure's line of the table, in percent and points."""
    published = [figure.name, figure.source, f"{figure.percent:.1f}"]
    if ours is None:
        return [*published, "not run", "", "", ""]
    distance = 100 * ours.mean - figure.percent
    inside = ours.low <= figure.percent / 100 <= ours.high
    interval = f"[{100 * ours.low:.1f}, {100 * ours.high:.1f}]"
    verdict = ("no" if abs(distance) > LIMIT else "yes") if figure.bound else ""
    return [*published, f"{100 * ours.mean:.1f} {interval}", f"{distance:+.1f}", "yes" if inside else "no", verdict]


def main() -> None:
    """Parse the command line, read the runs, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    options = parser.parse_args()
    records = [read_record(run) for run in options.runs]
    found = [(figure, measured(figure, records)) for figure in FIGURES]
    titles = ["score", "published by", "theirs", "ours, 95 % interval", "points", "inside", f"within {LIMIT}"]
    print(as_markdown([titles, *(row(figure, ours) for figure, ours in found)]), end="")
    off = [figure for figure, ours in found if ours and figure.bound and abs(100 * ours.mean - figure.percent) > LIMIT]
    sys.exit(bool(off) or not any(ours for _, ours in found))


if __name__ == "__main__":
    main()
