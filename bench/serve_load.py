"""Our server beside llama-server, over one GGUF file, and vLLM's, over the same model in a folder as transformers keeps
it: throughput and time to the first token, by number of streams.

All run throughout, and idle while another is measured; rounds are interleaved. Prompts are token ids that nobody asked
before, answers are greedy and of a fixed length. vLLM answers in bfloat16, from an environment of its own, whose Python
is named.

    llama2 convert MODEL.gguf FOLDER --to hf --format BF16
    python bench/serve_load.py -m MODEL.gguf --peer PATH/llama-server --vllm PATH/python FOLDER > load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from http_load import Measured, Process, ours, quantile, running, send
from provenance import provenance

from llama2.machine import processors

ROUTE = "/v1/completions"


def request(model: str, seed: int, length: int, answer: int, end: int) -> dict[str, Any]:
    """A prompt of random tokens; the token that would end the answer is never drawn."""
    tokens = random.Random(seed).choices(range(1000, 30000), k=length)
    common = {"model": model, "prompt": tokens, "max_tokens": answer, "temperature": 0}
    return {**common, "logit_bias": {str(end): -100}}


async def measure(server: Process, bodies: list[dict[str, Any]], streams: int) -> dict[str, Any]:
    """So many clients share the requests."""
    measured: list[Measured] = []

    async def client() -> None:
        while bodies:
            measured.append(await send(server.port, ROUTE, bodies.pop()))

    cpu, loop, begun = server.cpu(), server.first_thread(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    seconds = time.perf_counter() - begun
    if any(one.status != 200 for one in measured):
        raise SystemExit(f"{server.name}: status {sorted({one.status for one in measured})}")
    first = [one.first - one.sent for one in measured if one.first is not None]
    return {
        "tokens_per_second": sum(one.tokens for one in measured) / seconds,
        "first_token_p50": quantile(first, 0.5),
        "first_token_p95": quantile(first, 0.95),
        "cpu_share": (server.cpu() - cpu) / seconds,
        "first_thread_share": (server.first_thread() - loop) / seconds,  # ours: the event loop's
    }


async def idle(server: Process, seconds: float) -> float:
    """Share of a processor that it takes while nobody asks."""
    before = server.cpu()
    await asyncio.sleep(seconds)
    return (server.cpu() - before) / seconds


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--before", type=Path, metavar="LLAMA2", help="`llama2` as another version installed it")
    parser.add_argument("--peer", type=Path, help="llama-server")
    parser.add_argument("--vllm", nargs=2, metavar=("PYTHON", "FOLDER"), help="vLLM's environment, and its model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--requests", type=int, default=3, help="of each stream in a round")
    parser.add_argument("--end", type=int, default=2, help="the token that ends an answer")
    parser.add_argument("--threads", type=int, default=processors())
    args = parser.parse_args()
    threads, most = str(args.threads), max(args.streams)
    results: dict[str, dict[int, list[dict[str, Any]]]] = {}
    with ExitStack() as stack:
        command = ours("-m", str(args.model), "--threads", threads)
        servers = [stack.enter_context(running("llama2", command))]
        if args.before:
            servers.append(
                stack.enter_context(running("before", [str(args.before), *command[command.index("serve") :]]))
            )
        if args.peer:
            slots = ["-c", str(most * 2 * (args.prompt + args.answer)), "-np", str(most), "--no-webui"]
            command = [str(args.peer), "-m", str(args.model), "-t", threads, "-tb", threads, *slots]
            servers.append(stack.enter_context(running("llama-server", command)))
        seed, name = 0, args.model.stem
        if args.vllm:
            python, folder = args.vllm
            module, most_tokens = "vllm.entrypoints.openai.api_server", 2 * (args.prompt + args.answer)
            command = [python, "-m", module, "--model", folder, "--served-model-name", name, "--dtype", "bfloat16"]
            command += ["--max-model-len", str(most_tokens), "--max-num-seqs", str(most), "--host", "127.0.0.1"]
            command += ["--kv-cache-memory-bytes", str(2 << 30), "--no-enable-prefix-caching"]
            # By itself vLLM leaves a processor to its front end, and would compute on one thread fewer.
            settings = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}", "HF_HUB_OFFLINE": "1"}
            servers.append(stack.enter_context(running("vllm", command, settings)))
        for round in range(-1, args.rounds):  # the first one warms up
            for streams in args.streams if round >= 0 else [most]:
                for server in servers if round % 2 else servers[::-1]:
                    count = streams * (args.requests if round >= 0 else 1)
                    bodies = []
                    for _ in range(count):
                        seed += 1
                        bodies.append(request(name, seed, args.prompt, args.answer, args.end))
                    figures = asyncio.run(measure(server, bodies, streams))
                    if round >= 0:
                        results.setdefault(server.name, {}).setdefault(streams, []).append(figures)
        rest = {server.name: asyncio.run(idle(server, 5.0)) for server in servers}
        ready = {server.name: server.ready for server in servers}
    table = {
        name: {
            streams: {key: round_to(statistics.median(run[key] for run in runs)) for key in runs[0]}
            for streams, runs in by_streams.items()
        }
        for name, by_streams in results.items()
    }
    json.dump(
        {"provenance": provenance(), "median": table, "idle_cpu": rest, "ready_seconds": ready, "runs": results},
        sys.stdout,
        indent=1,
    )
    print()


def round_to(value: float) -> float:
    """Four digits after the point are more than a measurement has."""
    return round(value, 4)


if __name__ == "__main__":
    main()
