"""What the default moderation finds and what it costs: precision and recall by threshold, and false refusals added.

Precision and recall are of the held-out quarter of RealToxicityPrompts and ToxiGen, whole texts in windows as
`llama2 moderate` judges them. False refusals are XSTest's safe prompts that the policy would refuse; where answers of
its two models are given, those of harmless answers too. Intervals are Wilson's, 95 %.

    python bench/moderation_curves.py --data DIR -o moderation-curves.json
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from provenance import provenance

from llama2.classify import sets, training
from llama2.safety import policy
from llama2.safety.moderation import Moderator

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def scores(moderator: Moderator, texts: list[str]) -> NDArray[np.float64]:
    """The score of harassment of each text; 0 where it is not judged, which lets it pass."""
    found = [moderator.moderate([{"role": "user", "content": text}], "input").scores for text in texts]
    return np.array([each.get("harassment", 0.0) for each in found])


def curve(says: NDArray[np.float64], truth: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Precision and recall from each threshold on."""
    rows = []
    for threshold in THRESHOLDS:
        flagged = says >= threshold
        precision, recall = training.proportion(truth[flagged]), training.proportion(flagged[truth])
        rows.append({"threshold": threshold, "precision": precision, "recall": recall})
    return rows


def main() -> None:
    """Read the command line, judge everything, print tables, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    moderator = Moderator(policy.default())
    held_out = [each for each in sets.toxicity(options.data) if each.held_out]
    says = scores(moderator, [each.text for each in held_out])
    truth = np.array([each.label == "toxic" for each in held_out])
    record: dict[str, Any] = {"provenance": provenance(), "default": moderator.policy.model_dump(), "sets": {}}
    for source in ("realtoxicityprompts", "toxigen"):
        chosen = np.array([each.source == source for each in held_out])
        summary = {"n": int(chosen.sum()), "toxic": int(truth[chosen].sum())}
        record["sets"][source] = {**summary, "curve": curve(says[chosen], truth[chosen])}
    with (options.data / "xstest/xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    safe = [row["prompt"] for row in rows if row["label"] == "safe"]
    complied = [each.text for each in sets.refusals(options.data) if each.label == "complied"]
    for name, texts in (("XSTest's safe prompts", safe), ("XSTest's answers that comply", complied)):
        found = scores(moderator, texts)
        record[name] = [{"threshold": t, "refused": training.proportion(found >= t)} for t in THRESHOLDS]
    options.output.write_text(json.dumps(record, indent=1))
    print_tables(record)


def print_tables(record: dict[str, Any]) -> None:
    """Markdown on standard output."""

    def cell(value: dict[str, Any]) -> str:
        if "mean" not in value:
            return "-"
        return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"

    sources = [*record["sets"]]
    heads = [f"{source}, {what}" for source in sources for what in ("precision", "recall")]
    names = ["XSTest's safe prompts", "XSTest's answers that comply"]
    print("| threshold |", " | ".join([*heads, *(f"{name}, refused" for name in names)]), "|")
    print("| --- |", " | ".join(["---"] * (len(heads) + len(names))), "|")
    for i, threshold in enumerate(THRESHOLDS):
        curves = [record["sets"][source]["curve"][i] for source in sources]
        cells = [cell(row[what]) for row in curves for what in ("precision", "recall")]
        print(f"| {threshold} |", " | ".join([*cells, *(cell(record[name][i]["refused"]) for name in names)]), "|")


if __name__ == "__main__":
    main()
