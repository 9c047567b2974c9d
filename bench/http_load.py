"""Servers to measure, each a process of its own, and a client that costs little beside them."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

#: A part of an answer with text in it, and where it says how many tokens it had, in so many bytes before its end.
_SAYS = re.compile(rb'"(?:content|text)": ?"[^"]')
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_END = 4096


@dataclass
class Process:
    """A server that answers on a port of the loopback interface."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    ready: float  # seconds from its start until it was healthy

    def cpu(self) -> float:
        """Seconds of processor time so far, of all its threads and of the processes that it started."""
        return sum(_seconds(Path(f"/proc/{pid}/stat")) for pid in _family(self.process.pid))

    def first_thread(self) -> float:
        """Those of the thread that it began with."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/schedstat")  # in nanoseconds, not in ticks
        return int(path.read_text().split()[0]) * 1e-9

    def memory(self) -> int:
        """Bytes that are resident."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * _PAGE


def _seconds(stat: Path) -> float:
    words = stat.read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * _TICK


def _family(pid: int) -> list[int]:
    """A process, and all that it and its children started and that still run."""
    children = " ".join(task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [pid, *(member for child in children for member in _family(int(child)))]


@contextmanager
def running(name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[Process]:
    """A server that takes `--port`, once `/health` says so. Raises SystemExit when it does not come up."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | (environment or {}),
    )
    try:
        while not _healthy(port):
            if process.poll() is not None or time.perf_counter() - begun > 300:
                raise SystemExit(f"{name} did not start: {' '.join(command)}")
            time.sleep(0.01)
        yield Process(name, port, process, time.perf_counter() - begun)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def ours(*options: str) -> list[str]:
    """The command of this project's server."""
    return [sys.executable, "-m", "llama2", "serve", *options]


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def post(port: int, path: str, body: dict[str, Any]) -> bytes:
    """What a server answers. Raises SystemExit unless its status is 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{path}: status {response.status}: {data[:300]!r}")
    return data


@dataclass
class Measured:
    """What came back of one request; times are those of `time.perf_counter`."""

    sent: float
    status: int = 0
    first: float | None = None  # when the first text came
    ended: float = 0.0
    tokens: int = 0  # of the answer
    retry: float | None = None  # seconds, of a refusal


async def send(port: int, path: str, body: dict[str, Any]) -> Measured:
    """One streamed request, on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    measured = Measured(time.perf_counter())
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        measured.status = int(lines[0].split()[1])
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        if measured.status != 200:
            wait = headers.get("retry-after-ms")
            measured.retry = int(wait) / 1000 if wait else float(headers.get("retry-after", "nan"))
        answer = b""  # until there is text in it, and then the end of it, where the usage is
        while data := await reader.read(1 << 16):
            answer += data
            if measured.first is None and _SAYS.search(answer):
                measured.first = time.perf_counter()
            if measured.first is not None:
                answer = answer[-_END:]
        measured.tokens = int((_USAGE.findall(answer) or [0])[-1])
    finally:
        writer.close()
    measured.ended = time.perf_counter()
    return measured


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below which a share of them lies."""
    return round(sorted(values)[int(share * (len(values) - 1))], 4) if values else None
