"""The toxicity classifier beside a word list and another small classifier: ranking, and false alarms about people.

All judge the same texts: the held-out quarter of RealToxicityPrompts and ToxiGen, and harmless sentences about people
of many kinds. A word list says yes or no, so its AUROC is of two values.

    pip install alt-profanity-check better-profanity      # in an environment of their own
    python bench/classifiers.py --data DIR --peers ENVIRONMENT/bin/python -o classifiers.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
from provenance import provenance

from llama2.classify import sets, training
from llama2.classify.classifier import bundled

#: What the peers' environment runs: texts in, probabilities out, by peer.
PEERS = """
import json, sys
texts = json.load(sys.stdin)
from better_profanity import profanity
from profanity_check import predict_prob
profanity.load_censor_words()
said = {"alt-profanity-check": predict_prob(texts).tolist()}
said["better-profanity, a word list"] = [float(profanity.contains_profanity(text)) for text in texts]
print(json.dumps(said))
"""


def main() -> None:
    """Read the command line, ask everyone, print a table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--peers", required=True, help="Python of the peers' environment")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    texts = [each for each in sets.toxicity(options.data) if each.held_out]
    people = list(sets.harmless(sets.TESTED_SENTENCES))
    asked = [each.text for each in (*texts, *people)]
    done = subprocess.run(
        [options.peers, "-c", PEERS], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    said = {"ours": bundled("toxicity").probabilities(asked)[:, 1].tolist(), **json.loads(done.stdout)}
    truth = np.array([each.label == "toxic" for each in texts])
    found = {}
    print("| | AUROC, RealToxicityPrompts | AUROC, ToxiGen | false alarms on harmless sentences |")
    print("| --- | --- | --- | --- |")
    for name, values in said.items():
        says, harmless = np.array(values[: len(texts)]), np.array(values[len(texts) :])
        row = {}
        for source in ("realtoxicityprompts", "toxigen"):
            chosen = np.array([each.source == source for each in texts])
            row[source] = training.scores(says[chosen], truth[chosen])
        alarms = defaultdict(list)
        for each, value in zip(people, harmless, strict=True):
            alarms[each.group].append(bool(value >= 0.5))
        row["false alarms"] = training.proportion(harmless >= 0.5)
        row["false alarms by people"] = {group: [sum(some), len(some)] for group, some in alarms.items() if any(some)}
        found[name] = row
        cells = [f"{row[source]['auroc']['mean']:.3f}" for source in ("realtoxicityprompts", "toxigen")]
        print(f"| {name} | {' | '.join(cells)} | {100 * row['false alarms']['mean']:.1f} % |")
    options.output.write_text(json.dumps({"provenance": provenance(), "texts": len(texts), "found": found}, indent=1))


if __name__ == "__main__":
    main()
