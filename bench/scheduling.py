"""What the engine's scheduling costs and saves: streams beside a long prompt, shared prompts.

Tables go to stderr, one JSON object with every value to stdout.

    python bench/scheduling.py -m MODEL.gguf > scheduling.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from provenance import provenance

import llama2
from llama2.api import Model
from llama2.engine.engine import Engine
from llama2.engine.request import Request, Sampling

LONG = 1500  # tokens of the long prompt
SHARED = 1000  # tokens of the prompt that several requests share
LIMITS = (16, 32, 64, 128, 256, 512)


def request(model: Model, first: int, tokens: int, answer: int) -> Request:
    """A prompt that no other begins like, whose answer nothing but its length ends."""
    vocabulary, ends = model.config.vocab_size, dict.fromkeys(model.tokenizer.stop_ids, -math.inf)
    prompt = tuple((first * 7919 + i) % (vocabulary - 100) + 50 for i in range(tokens))
    return Request(prompt, answer, Sampling(0, logit_bias=ends), cache_prompt=False)


def beside_a_long_prompt(model: Model, streams: int, limit: int) -> dict[str, float]:
    """Seconds between the tokens of growing answers while a long prompt is read, and of reading it."""
    runner = cast(Engine, model.engine).runner
    engine = Engine(runner, model.tokenizer, context=model.engine.context, max_prefill_tokens=limit)
    for n in range(streams):
        engine.add(request(model, n, 64, 400))
    for _ in range(20):
        engine.step()
    id, gaps, start = engine.add(request(model, streams, LONG, 1)), [], time.perf_counter()
    done = False
    while not done:
        before = time.perf_counter()
        done = any(event.request == id for event in engine.step())
        gaps.append(time.perf_counter() - before)
    seconds = time.perf_counter() - start
    return {"limit": limit, "median": statistics.median(gaps), "longest": max(gaps), "prompt": seconds}


def shared(model: Model, requests: Sequence[Request]) -> float:
    """Seconds until each of the requests has its first token."""
    engine = Engine(cast(Engine, model.engine).runner, model.tokenizer, context=model.engine.context)
    start = time.perf_counter()
    for each in requests:
        engine.add(each)
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def medians(rows: list[dict[str, float]], *keys: str) -> list[dict[str, float]]:
    """The median of each value over the rows that have the same keys."""
    groups: dict[tuple[float, ...], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [{name: statistics.median(row[name] for row in group) for name in group[0]} for group in groups.values()]


def show(line: str) -> None:
    """A line of a table."""
    print(line, file=sys.stderr)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", required=True, help="a model's file or name")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--repeat", type=int, default=3, help="repeats (default 3)")
    options = parser.parse_args()

    with llama2.load(options.model, threads=options.threads, context=2048, sequences=16) as model:
        beside: list[dict[str, float]] = []
        sharing: list[dict[str, float]] = []
        alone = request(model, 100, LONG, 1)
        shared(model, [alone])
        for _ in range(options.repeat):
            whole = shared(model, [alone])
            for streams in (1, 8):
                for limit in LIMITS:
                    beside.append({"streams": streams, "alone": whole, **beside_a_long_prompt(model, streams, limit)})
            for own in (0, 20):
                prompts = [
                    Request((*request(model, 200, SHARED, 1).prompt, *request(model, 201 + n, own, 1).prompt), 1)
                    for n in range(8)
                ]
                sharing.append({"own": own, "one": shared(model, prompts[:1]), "eight": shared(model, prompts)})

    show(f"A prompt of {LONG} tokens beside growing answers: ms between tokens, tokens/s of the prompt")
    for row in medians(beside, "streams", "limit"):
        show(
            f"{row['streams']:4.0f} streams  limit {row['limit']:4.0f}  median {row['median'] * 1e3:6.1f}  longest "
            f"{row['longest'] * 1e3:6.1f}  prompt {LONG / row['prompt']:7.0f}  alone {LONG / row['alone']:7.0f}"
        )
    show(f"Eight requests that share {SHARED} tokens, beside one: seconds")
    for row in medians(sharing, "own"):
        show(f"{row['own']:4.0f} own  {row['one']:.3f}  {row['eight']:.3f}  {row['eight'] / row['one']:.2f}")
    about = {"model": Path(options.model).name, "threads": options.threads}
    json.dump({**provenance(), **about, "beside": beside, "sharing": sharing}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
