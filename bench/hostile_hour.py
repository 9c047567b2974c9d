"""A server under attack: whether it ever fails, whether its memory stays flat, and what those notice who mean well.

Four clients stream answers, first alone and then beside attackers, who run in a process of their own: some have the key
and some do not, and each attack is drawn at random. Measured are the statuses of all requests, the server's memory, and
the time between two parts of a good client's answer.

    python bench/hostile_hour.py -m MODEL.gguf --minutes 60 > hostile.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import http.client
import json
import multiprocessing
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from http_load import Process, ours, quantile, running
from provenance import provenance

from llama2.machine import processors

KEY = "correct-horse-battery-staple"
CHAT = "/v1/chat/completions"
HOST = b"Host: localhost\r\n"
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n"
ONE = [{"role": "user", "content": "a"}]

#: Bytes that an attacker sends at most, of what should be cut off long before.
FLOOD = 16 << 20

Attack = Callable[["Attacker"], str]


class Attacker:
    """Somebody with random numbers, with the key or without."""

    def __init__(self, port: int, model: str, random: random.Random) -> None:
        self.port, self.model, self.random = port, model, random
        self.known = random.random() < 0.5

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def key(self) -> bytes:
        return f"X-Api-Key: {KEY}\r\n".encode() if self.known else b""

    def flood(self, start: bytes, piece: bytes) -> str:
        """Send a beginning, and then more and more."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(start)
                for _ in range(FLOOD // len(piece)):
                    connection.sendall(piece)
            return _status(connection)

    def raw(self, data: bytes) -> str:
        with self.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            return _status(connection)

    def post(self, path: str, body: Any, **headers: str) -> str:
        """One request with the key."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) else json.dumps({"model": self.model, **body}).encode()
        with contextlib.closing(connection):
            try:
                connection.request("POST", path, data, {"X-Api-Key": KEY, **headers})
                return str(connection.getresponse().status)
            except OSError:
                return "closed"


def _status(connection: socket.socket) -> str:
    with contextlib.suppress(OSError):
        if found := re.match(rb"HTTP/1.1 (\d+)", connection.recv(4096)):
            return found[1].decode()
    return "closed"


def trailers(a: Attacker) -> str:
    return a.flood(CHUNKED + a.key() + b"\r\n0\r\n", b"X-Trailer: " + b"a" * 1000 + b"\r\n")


def extensions(a: Attacker) -> str:
    return a.flood(CHUNKED + a.key() + b"\r\n", b"1;" + b"x" * 1000 + b"\r\n{\r\n")


def heads(a: Attacker) -> str:
    return a.flood(b"GET / HTTP/1.1\r\nX: ", b"a" * a.random.choice([10, 1000, 100_000]))


def pipelined(a: Attacker) -> str:
    return a.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000)


def idle(a: Attacker) -> str:
    connections = [a.connect() for _ in range(100)]
    for connection in connections[::2]:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
    time.sleep(1)
    for connection in connections:
        connection.close()
    return "closed"


def byte_by_byte(a: Attacker) -> str:
    with a.connect() as connection:
        with contextlib.suppress(OSError):
            for byte in b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n{":
                connection.sendall(bytes([byte]))
                time.sleep(0.01)
        return "closed"


def hosts(a: Attacker) -> str:
    host = a.random.choice([b"[::1", b"[", b"a]b", b"evil.example", b"\xff", b"a@b", b"localhost:x"])
    return a.raw(b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")


def methods(a: Attacker) -> str:
    what = a.random.choice([b"POST /", b"TRACE /", b"DELETE /app.js", b"PUT /v1/models", b"OPTIONS *", b"CONNECT a:1"])
    return a.raw(what + b" HTTP/1.1\r\n" + HOST + a.key() + b"\r\n")


def garbage(a: Attacker) -> str:
    return a.raw(a.random.randbytes(a.random.choice([10, 1000, 100_000])))


def wrong_key(a: Attacker) -> str:
    return a.post(CHAT, b" " * 3_000_000, **{"X-Api-Key": "wrong"})


def lists(a: Attacker) -> str:
    item: Any = a.random.choice([{}, -1, [], "a", [[]], None, 1.5, {"role": "user", "content": "a"}])
    field = a.random.choice(["prompt", "messages", "stop", "tools", "metadata", "logit_bias"])
    return a.post("/v1/completions" if field == "prompt" else CHAT, {"messages": ONE, field: [item] * 50_000})


def values(a: Attacker) -> str:
    item = a.random.choice([b"{}", b"[]", b"0", b'""', b"null", b"1.5", b'"\\n"'])
    return a.post(CHAT, b'{"messages":[' + item + (b"," + item) * (4_000_000 // (len(item) + 1)) + b"]}")


def nested(a: Attacker) -> str:
    return a.post(CHAT, a.random.choice([b"[", b'{"a":']) * 100_000)


def surrogates(a: Attacker) -> str:
    return a.post(a.random.choice([CHAT, "/v1/responses", "/api/chat"]), {"messages": ONE, "input": "\ud800"})


def counts(a: Attacker) -> str:
    return a.post("/v1/completions", {"prompt": ["a"] * 1000, "n": 128})


def long_texts(a: Attacker) -> str:
    text = a.random.choice(["a", "a b ", "\n", "é", "=-"]) * 1_000_000
    path, body = a.random.choice(
        [
            (CHAT, {"messages": [{"role": "user", "content": text}]}),
            (CHAT, {"messages": ONE * 80_001}),
            (CHAT, {"messages": [*ONE, {"role": "assistant", "content": "b"}] * 4000}),
            ("/v1/completions", {"prompt": text}),
            ("/tokenize", {"content": "a" * 800_000}),
            ("/api/generate", {"prompt": text, "stream": False}),
            ("/v1/responses", {"input": text}),
        ]
    )
    return a.post(path, body)


def bombs(a: Attacker) -> str:
    return a.post(CHAT, gzip.compress(b" " * 10_000_000, 1), **{"Content-Encoding": a.random.choice(["gzip", "zstd"])})


def leave(a: Attacker) -> str:
    body = {"model": a.model, "messages": ONE, "max_tokens": 50, "stream": a.random.random() < 0.5}
    data = json.dumps(body).encode()
    with a.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nX-Api-Key: {KEY}\r\nContent-Length: {len(data)}\r\n".encode() + HOST
        connection.sendall((head + b"\r\n" + data)[: a.random.choice([50, 150, 10_000])])
        if a.random.random() < 0.3:
            connection.shutdown(socket.SHUT_WR)
        time.sleep(a.random.random() * 0.3)
    return "left"


def traced(a: Attacker) -> str:
    value = a.random.choice(["00-" + "f" * 32 + "-" + "f" * 16 + "-01", "x" * 5000, "a=b," * 5000])
    return a.post(CHAT, {"messages": ONE, "max_tokens": 1}, traceparent=value, tracestate=value, baggage=value)


ATTACKS: list[Attack] = [
    *(trailers, extensions, heads, pipelined, idle, byte_by_byte, hosts, methods, garbage, wrong_key),
    *(lists, values, nested, surrogates, counts, long_texts, bombs, leave, traced),
]


def attack(port: int, model: str, seed: int, end: float, pause: float, results: Any) -> None:
    """Attack until `end`, of `time.monotonic`, and then say how often each attack ended in which way."""
    seen: Counter[str] = Counter()
    numbers = random.Random(seed)
    while time.monotonic() < end:
        chosen = numbers.choice(ATTACKS)
        try:
            seen[f"{chosen.__name__} {chosen(Attacker(port, model, numbers))}"] += 1
        except OSError as error:
            seen[f"{chosen.__name__} {type(error).__name__}"] += 1
        time.sleep(pause)
    results.put(seen)


async def good(server: Process, model: str, seconds: float, clients: int) -> dict[str, Any]:
    """What so many clients see that stream one answer after another."""
    end = time.perf_counter() + seconds
    gaps: list[float] = []
    statuses: Counter[int] = Counter()
    sizes = [memory(server)]

    async def client(number: int) -> None:
        asked = number
        while time.perf_counter() < end:
            asked += clients
            message = {"role": "user", "content": f"Number {asked}. Tell me a long story about the sea."}
            body = {"model": model, "messages": [message], "max_tokens": 200, "seed": asked, "stream": True}
            data = json.dumps(body).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {KEY}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            lines = await reader.readuntil(b"\r\n\r\n")
            statuses[int(lines.split()[1])] += 1
            last = None
            while part := await reader.read(1 << 16):
                now = time.perf_counter()
                if last is not None and b'"content"' in part:
                    gaps.append(now - last)
                last = now
            writer.close()

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(1)
            sizes.append(memory(server))

    await asyncio.gather(watch(), *map(client, range(clients)))
    return {
        "statuses": dict(statuses),
        "gap_p50": quantile(gaps, 0.5),
        "gap_p95": quantile(gaps, 0.95),
        "gap_max": quantile(gaps, 1.0),
        "memory_mb": [round(value / 1e6, 1) for value in (sizes[0], max(sizes), sizes[-1])],
    }


def memory(server: Process) -> int:
    """Bytes that the server has of its own; what is mapped of a model's file is not among them."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def fill(port: int, model: str) -> None:
    """Use all of the cache, which takes memory when it is first used."""
    for seed in range(3):
        prompt = random.Random(seed).choices(range(100, 1000), k=2000)
        Attacker(port, model, random.Random(seed)).post("/v1/completions", {"prompt": prompt, "max_tokens": 1})


def answered(port: int) -> dict[str, int]:
    """Requests that the server has answered, by status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics", headers={"X-Api-Key": KEY})
    text = connection.getresponse().read().decode()
    connection.close()
    found: Counter[str] = Counter()
    for status, count in re.findall(r'llama2_http_\w+_total\{[^}]*status="(\d+)"\} ([\d.e+]+)', text):
        found[status] += round(float(count))
    return dict(sorted(found.items()))


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--quiet", type=float, default=1.0, metavar="MINUTES", help="without attacks, before and after")
    parser.add_argument("--attackers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two attacks of one attacker")
    parser.add_argument("--clients", type=int, default=4, help="that mean well")
    parser.add_argument("--threads", type=int, default=processors(), help="that compute")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model = Path(args.model).stem if Path(args.model).exists() else args.model
    command = ours("-m", args.model, "--context", "2048", "--cache-gb", "0.1", "--threads", str(args.threads))
    with running("llama2", command, {"LLAMA2_API_KEY": KEY}) as server:

        def run(minutes: float) -> dict[str, Any]:
            return asyncio.run(good(server, model, minutes * 60, args.clients))

        context = multiprocessing.get_context("spawn")
        results = context.Queue()

        def attacking(minutes: float, seed: int) -> list[Any]:
            end = time.monotonic() + minutes * 60
            words = [(server.port, model, seed + i, end, args.pause, results) for i in range(args.attackers)]
            processes = [context.Process(target=attack, args=each) for each in words]
            for process in processes:
                process.start()
            return processes

        fill(server.port, model)
        for each in ATTACKS:  # once, so that every module is loaded
            each(Attacker(server.port, model, random.Random(args.seed)))
        before = run(args.quiet)
        processes = attacking(args.minutes, args.seed)
        beside = run(args.minutes)
        seen: Counter[str] = Counter()
        for process in processes:
            seen += results.get(timeout=300)
            process.join()
        after = run(args.quiet)
        statuses = answered(server.port)
        alive = server.process.poll() is None
    quiet = max(before["gap_p95"], after["gap_p95"])
    result = {
        "provenance": provenance(),
        "minutes": args.minutes,
        "attacks": sum(seen.values()),
        "alive": alive,
        "failed_with_500": statuses.get("500", 0),
        "statuses": statuses,
        "memory_growth_mb": round(max(beside["memory_mb"][1], after["memory_mb"][1]) - before["memory_mb"][1], 1),
        "gap_p95_ratio": round(beside["gap_p95"] / quiet, 2),
        "good_before": before,
        "good_beside": beside,
        "good_after": after,
        "ends": dict(sorted(seen.items())),
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
