"""Prompt lookup on and off: seconds of the same answers by one engine, one right after the other, and equal tokens.

The table goes to stderr, one JSON object with every pair to stdout. With `--server` a server answers, whose cache has
the prompt from the first answer on, and texts must be equal.

    python bench/lookup.py -m MODEL.gguf > lookup.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from http_load import ours, post, running
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

LENGTH = 160  # of an answer, in tokens

#: Seconds that an answer to a task took with drafts of a length at a temperature, what it was, and figures of it.
Answer = Callable[[str, int, float], tuple[float, object, dict[str, int]]]


def answer(model: Model, task: str, lookup: int, temperature: float) -> tuple[float, list[int], dict[str, int]]:
    """Seconds an answer took, its tokens, and how many were drafted and accepted."""
    tokens, drafted, accepted, start = [], 0, 0, time.perf_counter()
    prompt, sampling = tuple(model.render(task)), Sampling(temperature, seed=1)
    for event in model.engine.run(Request(prompt, LENGTH, sampling, lookup=lookup, cache_prompt=False)):
        if event.error is not None:
            raise SystemExit(f"{task!r}: {event.error}")
        if event.token is not None:
            tokens.append(event.token)
        drafted, accepted = event.drafted_tokens, event.accepted_tokens
    figures = {"tokens": len(tokens), "drafted": drafted, "accepted": accepted}
    return time.perf_counter() - start, tokens, figures


def answer_of(port: int, name: str, task: str, lookup: int, temperature: float) -> tuple[float, str, dict[str, int]]:
    """Seconds a server's answer took, its text, and how many tokens it has."""
    body = {"model": name, "messages": [{"role": "user", "content": task}], "max_tokens": LENGTH}
    body |= {"temperature": temperature, "seed": 1, "lookup": lookup}
    start = time.perf_counter()
    told = json.loads(post(port, "/v1/chat/completions", body))
    seconds = time.perf_counter() - start
    return seconds, told["choices"][0]["message"]["content"], {"tokens": told["usage"]["completion_tokens"]}


@contextmanager
def answering(model: str, threads: int, server: bool) -> Iterator[Answer]:
    """How tasks are answered: by an engine here, or by a server."""
    if server:
        with running("llama2", ours("-m", model, "--threads", str(threads), "--context", "2048")) as process:
            name = Path(model).stem if Path(model).exists() else model
            yield lambda *asked: answer_of(process.port, name, *asked)
    else:
        with llama2.load(model, threads=threads, context=2048) as loaded:
            yield lambda *asked: answer(loaded, *asked)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", required=True, help="a model's file or name")
    parser.add_argument("--lookup", type=int, default=8, metavar="N", help="most tokens drafted a step (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--server", action="store_true", help="ask a server instead of an engine")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each task (default 5)")
    options = parser.parse_args()

    results = []
    print(f"{'':24}{'temperature':>12}{'tokens':>8}{'accepted':>9}{'drafted':>8}{'speed':>7}", file=sys.stderr)
    with answering(options.model, options.threads, options.server) as ask:
        for task, text in TASKS.items():
            for temperature in (0.0, 0.6):
                ratios, figures = [], {}
                ask(text, 0, temperature)
                for pair in range(options.pairs):
                    order = (0, options.lookup) if pair % 2 == 0 else (options.lookup, 0)
                    found = {lookup: ask(text, lookup, temperature) for lookup in order}
                    if found[options.lookup][1] != found[0][1]:
                        raise SystemExit(f"{task!r} at temperature {temperature}: lookup changed the answer")
                    figures = found[options.lookup][2]
                    ratios.append(found[0][0] / found[options.lookup][0])
                speed = statistics.median(ratios)
                results.append({"task": task, "temperature": temperature, **figures, "speed": speed, "pairs": ratios})
                counts = f"{figures['tokens']:8}{figures.get('accepted', '–'):>9}{figures.get('drafted', '–'):>8}"
                print(f"{task:24}{temperature:12}{counts}{speed:7.2f}", file=sys.stderr)
    about = {"model": Path(options.model).name, "lookup": options.lookup, "threads": options.threads}
    json.dump({**provenance(), **about, "tasks": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
