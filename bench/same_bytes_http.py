"""Are answers over HTTP the same bytes alone and under load? Requests one by one to a server, then together to another.

Alone, each is streamed by a server with a large cache. Then up to 32 at a time, a number that changes at random, half
of them streamed, are answered by a second server, whose cache holds one context, so that some are preempted. Texts,
tokens, log-probabilities and reasons to end must be equal. Exit code 1 if one differs, or if nothing was preempted.

    python bench/same_bytes_http.py -m MODEL.gguf > same_bytes_http.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from http_load import ours, post, running
from provenance import provenance

CLONE = Path(__file__).parents[1]
MOST = 32  # requests at once
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

#: The route of a request, and its body.
Asked = tuple[str, dict[str, Any]]


def requests(model: str, count: int, rng: random.Random) -> list[Asked]:
    """Questions about a text, and texts to be continued, a few of them behind the same one; greedy and drawn."""
    words = (CLONE / "SECURITY.md").read_text().split()
    texts = [" ".join(words[: rng.randrange(1, 60)]) for _ in range(10)]
    made: list[Asked] = []
    for _ in range(count):
        about = rng.choice([rng.choice(texts), " ".join(rng.sample(words, rng.randrange(1, 40)))])
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": rng.choice([1, 30, 100, 300]),
            "temperature": rng.choice([0, 0.6, 1.0]),
            "top_p": rng.choice([0.9, 1.0]),
            "seed": rng.randrange(1 << 32),
            "repetition_penalty": rng.choice([1.0, 1.1]),
            "stop": rng.choice([None, None, ["\n\n"]]),
            "n": rng.choice([1, 1, 1, 2]),
            "lookup": rng.choice([0, 0, 8]),
        }
        if rng.random() < 0.7:
            scores: dict[str, Any] = rng.choice([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 5}])
            messages = [{"role": "user", "content": f"{about}\n\nSummarise this."}]
            made.append((CHAT, {**body, "messages": messages, **scores}))
        else:
            echo = rng.random() < 0.3
            made.append((COMPLETIONS, {**body, "prompt": about, "echo": echo, "logprobs": rng.choice([None, 0, 5])}))
    return made


def ask(port: int, asked: Asked, stream: bool) -> list[dict[str, Any]]:
    """The choices of an answer, in one form whether it was streamed or not. Raises SystemExit for a refusal."""
    route, body = asked
    data = post(port, route, {**body, "stream": stream})
    if not stream:
        return [joined([row]) for row in sorted(json.loads(data)["choices"], key=lambda row: row["index"])]
    *events, end = (event for event in data.decode().split("\n\n") if event.startswith("data: "))  # others: pings
    if end != "data: [DONE]":
        raise SystemExit(f"a stream ended with {end[:300]!r}")
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        for row in json.loads(event.removeprefix("data: "))["choices"]:
            rows[row["index"]].append(row)
    return [joined(rows[index]) for index in sorted(rows)]


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A choice of all that was told of it: text, reason to end, and lists of log-probabilities end to end."""
    text, finish = "", None
    scores: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        said = row.get("delta") or row.get("message") or {"content": row.get("text")}
        text += said.get("content") or ""
        finish = row["finish_reason"] or finish
        for name, values in (row["logprobs"] or {}).items():
            scores[name] += values or []
    return {"text": text, "finish": finish, **scores}


def together(port: int, asked: list[Asked], rng: random.Random) -> tuple[list[Any], Counter[int]]:
    """Everyone's choices, and how many requests were there whenever one came."""
    company: Counter[int] = Counter()
    futures: list[Future[list[dict[str, Any]]]] = []
    with ThreadPoolExecutor(MOST) as pool:
        going: set[Future[Any]] = set()
        while len(futures) < len(asked):
            most = rng.randrange(1, MOST + 1)
            for _ in range(rng.randrange(1, 10)):
                while len(futures) < len(asked) and len(going) < most:
                    futures.append(pool.submit(ask, port, asked[len(futures)], rng.random() < 0.5))
                    going.add(futures[-1])
                    company[len(going)] += 1
                going = wait(going, return_when=FIRST_COMPLETED).not_done
        return [future.result() for future in futures], company


def preemptions(port: int) -> int:
    """How often the server took a request's cache away for another."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("llama2_preemptions{"))


def main() -> None:
    """Parse the command line, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", type=Path, required=True, help="a model's file")
    parser.add_argument("--requests", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that the small cache holds (default 1024)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and loads (default 0)")
    options = parser.parse_args()

    rng = random.Random(options.seed)
    asked = requests(options.model.stem, options.requests, rng)
    words = ["-m", str(options.model), "--context", str(options.context), "--threads", str(options.threads)]
    with running("llama2", ours(*words)) as server:
        start = time.perf_counter()
        alone = [ask(server.port, one, True) for one in asked]
        print(f"alone: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    with running("llama2", ours(*words, "--cache-gb", "0", "--max-wait", "3600")) as server:
        order = rng.sample(range(len(asked)), len(asked))
        start = time.perf_counter()
        told, company = together(server.port, [asked[i] for i in order], rng)
        seconds, preempted = time.perf_counter() - start, preemptions(server.port)
    choices = [choice for choices in alone for choice in choices]
    result = {
        "model": options.model.name,
        "threads": options.threads,
        "requests": len(asked),
        "choices": len(choices),
        "different": [i for i, choices in zip(order, told, strict=True) if choices != alone[i]],
        "different_texts": len({choice["text"] for choice in choices}),
        "reasons": Counter(choice["finish"] for choice in choices),
        "scored_tokens": sum(len(choice.get("content") or choice.get("tokens") or ()) for choice in choices),
        "preemptions": preempted,
        "company": dict(sorted(company.items())),
        "seconds": seconds,
    }
    json.dump({**provenance(), **result}, sys.stdout, indent=2)
    print()
    if result["different"] or not preempted:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
