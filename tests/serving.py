"""`llama2 serve` in a process of its own on the loopback interface, and requests to it, byte by byte if need be."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models import tiny_config, write_tiny_gguf

#: Keeps the tiny model's answers going: its end token, and the unknown one, are never drawn.
ENDLESS = {"2": -100, "0": -100}


def write_model(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """A random model with Llama 2's layout and chat format."""
    path = folder / f"{name}.gguf"
    write_tiny_gguf(path, config=tiny_config(**{"context_length": 8192, **changes}))
    return path


class Server:
    """A running server. `messages` are what it wrote to standard error so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.messages: list[str] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(60):
            process.kill()
        assert process.poll() is None, self.messages
        address = next(line for line in self.messages if " at http://" in line)
        self.host, port = re.search(r"at http://(.*):(\d+)/$", address).groups()  # type: ignore[union-attr]
        self.port = int(port)
        self.url = f"http://{self.host}:{port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.messages.append(line.rstrip("\n"))
            if " at http://" in line:
                self._ready.set()
        self._ready.set()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers by lower-case name, and body, which is decoded if it is JSON. A body may be bytes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, data, given | (headers or {}))
        response = connection.getresponse()
        answer: Any = response.read()
        connection.close()
        received = {name.lower(): value for name, value in response.getheaders()}
        if answer and received.get("content-type") == "application/json":
            answer = json.loads(answer)
        return response.status, received, answer

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], Any]:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        return self.request("POST", path, body, headers)

    def raw(self, data: bytes, seconds: float = 30.0) -> bytes:
        """What the server says to these bytes, until it closes the connection."""
        with socket.create_connection((self.host, self.port), timeout=seconds) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def open(self, path: str, body: Any) -> socket.socket:
        """A connection on which a request was sent and nothing was read, and which ends with the answer."""
        data = json.dumps(body).encode()
        connection = socket.create_connection((self.host, self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def gauge(self, name: str) -> float:
        """The value of a metric, over all its labels."""
        text = self.get("/metrics")[2].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))

    def wait_for(self, name: str, value: float, seconds: float) -> None:
        """Wait until a metric has this value; fails after so many seconds."""
        end = time.monotonic() + seconds
        while self.gauge(name) != value:
            assert time.monotonic() < end, f"{name} is {self.gauge(name)} and not {value}"
            time.sleep(0.02)

    def line(self, part: str, seconds: float = 60.0) -> str:
        """The first message with `part`, waited for."""
        end = time.monotonic() + seconds
        while not (found := [line for line in self.messages if part in line]):
            assert time.monotonic() < end, self.messages
            time.sleep(0.02)
        return found[0]

    def wait_for_more(self, name: str, value: float, seconds: float) -> None:
        """Wait until a metric is above this value; fails after so many seconds."""
        end = time.monotonic() + seconds
        while self.gauge(name) <= value:
            assert time.monotonic() < end, f"{name} is still {value}"
            time.sleep(0.02)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)


@contextmanager
def serving(
    models: Sequence[Path | str], *options: str, program: Sequence[str] = ("-m", "llama2"), **environment: str
) -> Iterator[Server]:
    """A server of these models on a free port; `program` is what Python runs."""
    named = [word for model in models for word in ("-m", str(model))]
    process = subprocess.Popen(
        [sys.executable, *program, "serve", *named, "--port", "0", "--threads", "1", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


async def statuses(application: Any, scope: dict[str, Any], body: bytes = b"") -> list[int]:
    """With what an ASGI application answers a request that no server stands around."""
    found: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        found.extend([message["status"]] if "status" in message else [])

    await application({"type": "http", **scope}, receive, send)
    return found


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers anything with 200."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


def chat(**fields: Any) -> dict[str, Any]:
    """A request for a short chat answer of the tiny model, always the same one."""
    message = {"role": "user", "content": "to be or not"}
    return {"model": "tiny", "messages": [message], "max_tokens": 4, "temperature": 0, "logit_bias": ENDLESS, **fields}


def events(body: bytes) -> list[Any]:
    """The data of server-sent events, JSON decoded, and `[DONE]` as it is."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    data = [line[6:] for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]
