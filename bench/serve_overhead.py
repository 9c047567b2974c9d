"""What a server does beside running the model: HTTP and Python's share of a step's time, by number of streams.

The engine's thread works between two forward passes. It samples tokens, which is arithmetic and measured apart. The
rest is Python, in which every stream waits. Both are in seconds on the clock. The event loop works beside a forward
pass, but takes its processor time from the threads that multiply: that is in processor seconds. The share is that of
both, as if nothing of them ran side by side.

    python bench/serve_overhead.py -m smollm2-135m-instruct --rounds 5 > overhead.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from http_load import Process, running
from provenance import provenance
from serve_load import measure, request, round_to

#: What the server counts, in a file that it shares with who measures it.
FORWARD, DRAW, STEP, STEPS = range(4)


def serve(shared: str, options: list[str]) -> None:
    """A server as ever, whose engine's thread keeps time."""
    from llama2.cli.main import run
    from llama2.engine.runner_native import NativeRunner
    from llama2.engine.sampling import Sampler
    from llama2.serve.service import Service

    counts, shared_counts = [0.0] * 4, np.memmap(shared, np.float64, "r+")

    def timed(owner: type, name: str, place: int) -> None:
        plain = getattr(owner, name)

        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return plain(*args)
            finally:
                counts[place] += time.perf_counter() - begun
                if place == STEP:
                    counts[STEPS] += 1
                    shared_counts[:] = counts

        setattr(owner, name, call)

    timed(NativeRunner, "forward", FORWARD)
    timed(Sampler, "draw", DRAW)
    timed(Service, "_step", STEP)
    run(["serve", *options])


def share(server: Process, counts: Any, bodies: list[dict[str, Any]], streams: int) -> dict[str, float]:
    """A round's figures; times are of one step."""
    before, loop, begun = counts.copy(), server.first_thread(), time.perf_counter()
    figures = asyncio.run(measure(server, bodies, streams))
    spent, loop, seconds = counts - before, server.first_thread() - loop, time.perf_counter() - begun
    steps = spent[STEPS]
    engine = spent[STEP] - spent[FORWARD] - spent[DRAW]
    return {
        "tokens_per_second": figures["tokens_per_second"],
        "steps": steps,
        "step_ms": seconds / steps * 1e3,
        "draw_ms": spent[DRAW] / steps * 1e3,
        "engine_ms": engine / steps * 1e3,
        "event_loop_ms": loop / steps * 1e3,
        "share": (engine + loop) / seconds,
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=6, help="of each stream in a round")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0)
    args = parser.parse_args()
    results: dict[int, list[dict[str, float]]] = {streams: [] for streams in args.streams}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "counts"
        counts = np.memmap(shared, np.float64, "w+", shape=(4,))
        seed = 0
        with running("llama2", [sys.executable, __file__, "--serve", str(shared), "-m", args.model]) as server:
            for round in range(-1, args.rounds):  # the first one warms up
                for streams in args.streams:
                    count = streams * args.requests
                    bodies = []
                    for _ in range(count):
                        seed += 1
                        body = request(Path(args.model).stem, seed, 64, args.answer, 2)
                        bodies.append(body | {"temperature": args.temperature})
                    figures = share(server, counts, bodies, streams)
                    if round >= 0:
                        results[streams].append(figures)
    medians = {
        streams: {key: round_to(statistics.median(run[key] for run in runs)) for key in runs[0]}
        for streams, runs in results.items()
    }
    json.dump({"provenance": provenance(), "median": medians, "runs": results}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3:])
    else:
        main()
