"""Are answers the same bytes alone and under load? Requests one by one, then together in random load, on a real model.

Alone, each runs in the whole cache, without prefix hits and drafts. Then up to 32 at a time, a number that changes at
random, share a cache so small that some are preempted, find prefixes, draft, and are followed or taken from `step`,
under several limits on a step. Tokens, texts, log-probabilities and reasons to end must be equal. Exit code 1 if one
differs.

    python bench/same_bytes.py -m MODEL.gguf > same_bytes.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from provenance import provenance

import llama2
from llama2.api import Model
from llama2.engine.engine import Engine
from llama2.engine.request import Event, Request, Sampling
from llama2.engine.runner_native import NativeRunner

CLONE = Path(__file__).parents[1]
CONTEXT = 1024
#: Blocks of the small cache, and limits of a step: tokens, prompts' tokens beside growing answers.
LOADS = [(128, 512, 64), (64, 512, 16), (48, 100, 512), (36, 33, 7)]
MOST = 32  # requests at once


def requests(model: Model, count: int, rng: random.Random) -> list[Request]:
    """Questions about a text, a few of them behind the same one; greedy and drawn, short and long, scored or not."""
    words = (CLONE / "SECURITY.md").read_text().split()
    texts = [" ".join(words[: rng.randrange(1, 120)]) for _ in range(10)]
    made = []
    for _ in range(count):
        about = rng.choice([rng.choice(texts), " ".join(rng.sample(words, rng.randrange(1, 60)))])
        ask = rng.choice(["Summarise this.", "Repeat this word by word.", "What is missing?", "Write a poem of it."])
        made.append(
            Request(
                tuple(model.render(f"{about}\n\n{ask}")),
                rng.choice([1, 30, 100, 300]),
                Sampling(
                    temperature=rng.choice([0, 0.6, 1.0]),
                    top_p=rng.choice([0.9, 1.0]),
                    repetition_penalty=rng.choice([1.0, 1.1]),
                    seed=rng.randrange(1 << 32),
                ),
                stop=rng.choice([(), (), ("\n\n",)]),
                logprobs=rng.choice([None, 0, 5]),
                score_from=rng.choice([1, 16]) if rng.random() < 0.1 else None,
                choice=rng.randrange(3),
                lookup=rng.choice([0, 0, 8]),
            )
        )
    return made


def plain(events: list[Event]) -> list[Event]:
    """What was told, without whose request it was and what was saved on the way."""
    return [event._replace(request=0, cached_tokens=0, drafted_tokens=0, accepted_tokens=0) for event in events]


def together(engine: Engine, asked: list[Request], rng: random.Random, steps: Counter[int]) -> list[list[Event]]:
    """The events of each request. `steps` counts how many requests were there in each step."""
    told: dict[int, list[Event]] = defaultdict(list)
    ids: list[int] = []
    going: set[int] = set()
    while len(ids) < len(asked) or engine.busy:
        most = rng.randrange(1, MOST + 1)
        for _ in range(rng.randrange(1, 30)):
            while len(ids) < len(asked) and len(going) < most:
                ids.append(engine.add(asked[len(ids)]))
                going.add(ids[-1])
            steps[len(going)] += 1
            for event in engine.step():
                told[event.request].append(event)
                if event.finish is not None:
                    going.remove(event.request)
        if len(ids) < len(asked) and rng.random() < 0.2:  # one that is followed, while the others go on
            events = list(engine.run(asked[len(ids)]))
            ids.append(events[0].request)
            told[ids[-1]] = events
    return [told[id] for id in ids]


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", required=True, help="a model's file or name")
    parser.add_argument("--requests", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and loads (default 0)")
    options = parser.parse_args()

    rng, loads, different = random.Random(options.seed), [], 0
    with llama2.load(options.model, threads=options.threads, context=CONTEXT) as model:
        asked = requests(model, options.requests, rng)
        start = time.perf_counter()
        alone = [plain(list(model.engine.run(replace(request, lookup=0, cache_prompt=False)))) for request in asked]
        print(f"alone: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for blocks, tokens, prefill in LOADS:
            engine = Engine(
                NativeRunner(model.checkpoint, blocks, threads=options.threads),
                model.tokenizer,
                context=CONTEXT,
                max_batch_tokens=tokens,
                max_prefill_tokens=prefill,
                max_sequences=min(MOST, tokens),
            )
            order = rng.sample(range(len(asked)), len(asked))
            steps: Counter[int] = Counter()
            start = time.perf_counter()
            told = together(engine, [asked[i] for i in order], rng, steps)
            wrong = [i for i, events in zip(order, told, strict=True) if plain(events) != alone[i]]
            different += len(wrong)
            last = [events[-1] for events in told]
            load = {
                "blocks": blocks,
                "max_batch_tokens": tokens,
                "max_prefill_tokens": prefill,
                "seconds": time.perf_counter() - start,
                "different": wrong,
                "tokens": sum(event.token is not None for events in told for event in events),
                "reasons": Counter(event.finish for event in last),
                "preemptions": engine.stats.preemptions,
                "prompt_tokens": sum(len(request.prompt) for request in asked),
                "cached_tokens": sum(event.cached_tokens for event in last),
                "drafted_tokens": sum(event.drafted_tokens for event in last),
                "accepted_tokens": sum(event.accepted_tokens for event in last),
                "requests_in_a_step": sum(n * count for n, count in steps.items()) / steps.total(),
            }
            loads.append(load)
            print(json.dumps(load), file=sys.stderr)
    about = {"model": Path(options.model).name, "threads": options.threads, "requests": options.requests}
    json.dump({**provenance(), **about, "loads": loads}, sys.stdout, indent=2)
    print()
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
