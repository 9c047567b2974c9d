"""Prompt lookup on and off: seconds of the same answers by one engine, one right after the other, and equal tokens.

The table goes to stderr, one JSON object with every pair to stdout.

    python bench/lookup.py -m MODEL.gguf > lookup.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from provenance import provenance

import llama2
from llama2.api import Model
from llama2.engine.request import Request, Sampling

CLONE = Path(__file__).parents[1]
#: What is asked for: from a copy, where every draft is right, to a tale, where hardly any is.
TASKS = {
    "quote a text": "Repeat this text word by word:\n\n" + (CLONE / "SECURITY.md").read_text()[:1200],
    "summarise a text": "Summarise this text:\n\n" + (CLONE / "SECURITY.md").read_text()[:1200],
    "continue code": "Write a Python class for a queue with push, pop, peek, size and clear, and then its tests.",
    "tell a story": "Tell a story of a lighthouse keeper.",
}


def answer(model: Model, task: str, lookup: int, temperature: float) -> tuple[float, list[int], int, int]:
    """Seconds an answer took, its tokens, and how many were drafted and accepted."""
    tokens, drafted, accepted, start = [], 0, 0, time.perf_counter()
    prompt, sampling = tuple(model.render(task)), Sampling(temperature, seed=1)
    for event in model.engine.run(Request(prompt, 160, sampling, lookup=lookup, cache_prompt=False)):
        if event.error is not None:
            raise SystemExit(f"{task!r}: {event.error}")
        if event.token is not None:
            tokens.append(event.token)
        drafted, accepted = event.drafted_tokens, event.accepted_tokens
    return time.perf_counter() - start, tokens, drafted, accepted


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", required=True, help="a model's file or name")
    parser.add_argument("--lookup", type=int, default=8, metavar="N", help="most tokens drafted a step (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each task (default 5)")
    options = parser.parse_args()

    results = []
    print(f"{'':24}{'temperature':>12}{'tokens':>8}{'accepted':>9}{'drafted':>8}{'speed':>7}", file=sys.stderr)
    with llama2.load(options.model, threads=options.threads, context=2048) as model:
        for task, text in TASKS.items():
            for temperature in (0.0, 0.6):
                ratios, last = [], (0.0, [0], 0, 0)
                answer(model, text, 0, temperature)
                for pair in range(options.pairs):
                    order = (0, options.lookup) if pair % 2 == 0 else (options.lookup, 0)
                    found = {lookup: answer(model, text, lookup, temperature) for lookup in order}
                    last = found[options.lookup]
                    if last[1] != found[0][1]:
                        raise SystemExit(f"{task!r} at temperature {temperature}: lookup changed the answer")
                    ratios.append(found[0][0] / last[0])
                row = {"task": task, "temperature": temperature, "tokens": len(last[1]), "drafted": last[2]}
                row |= {"accepted": last[3], "speed": statistics.median(ratios), "pairs": ratios}
                results.append(row)
                print(
                    f"{task:24}{temperature:12}{len(last[1]):8}{last[3]:9}{last[2]:8}{row['speed']:7.2f}",
                    file=sys.stderr,
                )
    about = {"model": Path(options.model).name, "lookup": options.lookup, "threads": options.threads}
    json.dump({**provenance(), **about, "tasks": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
