"""A server under many times the requests it can serve: whether its Retry-After is right, and its memory flat.

Every client sends one request after another, and waits as a refusal says. A refusal is right within 20 % if the client
was admitted after the time of its first Retry-After, give or take a fifth of its wait. A server could be right by
always answering hours, so its throughput is compared with that of four clients, of which none is refused.

    python bench/serve_overload.py -m MODEL.gguf --seconds 120 > overload.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from http_load import Measured, Process, ours, quantile, running, send
from provenance import provenance

ROUTE = "/v1/chat/completions"
#: Seconds in which all clients come at once to a server that has not measured such a crowd.
_SETTLED = 10


def question(model: str, seed: int, tokens: int) -> dict[str, Any]:
    """A chat that no other request begins with."""
    words = " ".join(random.Random(seed).choices(["sea", "ship", "storm", "light", "rock", "gull", "rope"], k=40))
    message = {"role": "user", "content": f"Number {seed}. Tell me a story with these words: {words}"}
    return {"model": model, "messages": [message], "max_tokens": tokens, "seed": seed}


async def load(server: Process, model: str, clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """The measurements of so many clients."""
    end = time.perf_counter() + seconds
    answered: list[Measured] = []
    waits: list[tuple[float, float, float]] = []  # first Retry-After, wait, and time of the refusal
    refused, broken, memory = 0, 0, [server.memory()]

    async def client(number: int) -> None:
        nonlocal refused, broken
        await asyncio.sleep(random.Random(number).random())
        chat_number = number * 1_000_000
        while time.perf_counter() < end:
            chat_number += 1
            first: tuple[float, float] | None = None
            while True:
                measured = await send(server.port, ROUTE, question(model, chat_number, tokens))
                if measured.status == 429 and measured.retry is not None:
                    refused += 1
                    first = first or (measured.retry, measured.ended)
                    if time.perf_counter() + measured.retry > end:
                        return
                    await asyncio.sleep(measured.retry)
                    continue
                if measured.status == 200:
                    answered.append(measured)
                else:
                    broken += 1
                if first is not None:
                    waits.append((first[0], measured.sent - first[1], first[1]))
                break

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(1)
            memory.append(server.memory())

    tasks = [asyncio.create_task(task) for task in (watch(), *map(client, range(clients)))]
    begun = time.perf_counter()
    await asyncio.wait(tasks, timeout=seconds + 60)
    took = time.perf_counter() - begun
    right = [abs(waited - wanted) <= 0.2 * waited for wanted, waited, _ in waits]
    later = [fits for fits, (*_, at) in zip(right, waits, strict=True) if at - begun > _SETTLED]
    first = [measured.first - measured.sent for measured in answered if measured.first is not None]
    third = len(memory) // 3
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "answered": len(answered),
        "refused": refused,
        "broken": broken,
        "tokens_per_second": round(sum(measured.tokens for measured in answered) / took, 1),
        "first_token_p50": quantile(first, 0.5),
        "first_token_p95": quantile(first, 0.95),
        "judged_refusals": len(waits),
        "right_within_20_percent": round(sum(right) / len(right), 3) if right else None,
        "right_once_settled": round(sum(later) / len(later), 3) if later else None,
        "wrong": [
            {"at": round(at - begun, 2), "retry_after": round(wanted, 2), "waited": round(waited, 2)}
            for fits, (wanted, waited, at) in zip(right, waits, strict=True)
            if not fits
        ][:100],
        "retry_after_p50": quantile([wanted for wanted, *_ in waits], 0.5),
        "retry_after_p90": quantile([wanted for wanted, *_ in waits], 0.9),
        "memory_mb": [round(value / 1e6, 1) for value in (memory[third], memory[2 * third], memory[-1])],
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=0, help="0: ten times those that are served in --max-wait")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--max-wait", type=float, default=2.0)
    parser.add_argument("--cache-gb", default="0.4", help="a cache that is soon full, after which memory is flat")
    args = parser.parse_args()
    name = Path(args.model).stem if Path(args.model).exists() else args.model
    with running(
        "llama2", ours("-m", args.model, "--max-wait", str(args.max_wait), "--cache-gb", args.cache_gb)
    ) as server:
        calm = asyncio.run(load(server, name, 4, min(10.0, args.seconds), args.tokens))
        rate = calm["answered"] / calm["seconds"]
        clients = args.clients or max(20, round(10 * rate * (args.max_wait + 1)))
        busy = asyncio.run(load(server, name, clients, args.seconds, args.tokens))
    json.dump({"provenance": provenance(), "calm": calm, "overload": busy}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
