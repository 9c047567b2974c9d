"""A request goes forward only: on its way from the socket to the engine, no file calls one that waits for it.

The answer goes back through the ASGI callables `receive…` and `send…`, which are not counted.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import uvicorn

import llama2
from llama2 import serve
from llama2.serve.http.app import application
from llama2.serve.http.protocol import protocol
from llama2.serve.models import Models, ModelSource
from llama2.serve.settings import ServeSettings
from serving import write_model

ROOT = Path(serve.__file__).parent

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
REQUESTS: dict[str, tuple[str, Any]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "chat, streamed": ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    "chat, held to JSON": ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}),
    "chat, with tools": ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "stream": True}),
    "completion": ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "logprobs": 1}),
    "completion, streamed": ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}),
    "responses": ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 3}),
    "responses, streamed": ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 3, "stream": True}),
    "messages": ("/v1/messages", CHAT),
    "messages, streamed": ("/v1/messages", {**CHAT, "stream": True}),
    "Ollama's chat": ("/api/chat", {**CHAT, "options": {"num_predict": 3}}),
    "Ollama's generate": ("/api/generate", {"model": "tiny", "prompt": "a", "raw": True, "stream": False}),
    "llama.cpp's completion": ("/completion", {"model": "tiny", "prompt": "a", "n_predict": 3}),
    "llama.cpp's, streamed": ("/completion", {"model": "tiny", "prompt": "a", "n_predict": 3, "stream": True}),
    "embeddings": ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}),
    "Ollama's embeddings": ("/api/embed", {"model": "tiny", "input": "a"}),
    "tokenize": ("/tokenize", {"model": "tiny", "messages": CHAT["messages"]}),
    "template": ("/apply-template", {"model": "tiny", "messages": CHAT["messages"]}),
    "refused": ("/v1/chat/completions", {**CHAT, "n": 1000}),
    "of another model": ("/api/chat", {**CHAT, "model": "other"}),
    "no JSON": ("/v1/chat/completions", []),
    "models": ("/v1/models", None),
    "Ollama's models": ("/api/tags", None),
    "page": ("/", None),
    "not served": ("/none", None),
}


class CallPath:
    """The files of `serve/` that a request calls, by a profile of every thread."""

    def __init__(self) -> None:
        self.files: list[str] = []  # in the order in which they are first entered
        self.returns: set[str] = set()  # "a > b > a" for a file that is called while it waits for another

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or (name := _file(frame)) is None or _on_the_way_back(frame):
            return
        if name not in self.files:
            self.files.append(name)
        chain = [name]  # of files, from the newest call to the oldest
        caller = frame.f_back
        while caller is not None and not _on_the_way_back(caller):
            below = _file(caller)
            if below is not None and below != chain[-1]:
                chain.append(below)
                if below == name:
                    self.returns.add(" > ".join(reversed(chain)))
                    return
            caller = caller.f_back


def _file(frame: FrameType) -> str | None:
    path = frame.f_code.co_filename
    return path.removeprefix(f"{ROOT}/") if path.startswith(f"{ROOT}/") else None


def _on_the_way_back(frame: FrameType) -> bool:
    return _file(frame) is not None and frame.f_code.co_name.startswith(("receive", "send"))


@contextmanager
def traced(models: Models) -> Iterator[tuple[int, CallPath]]:
    """The port of a server whose threads are recorded."""
    path = CallPath()
    config = uvicorn.Config(application(models), http=protocol(models.settings), port=0, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    threading.setprofile(path)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield server.servers[0].sockets[0].getsockname()[1], path
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, CallPath]]:
    file = write_model(tmp_path_factory.mktemp("path"), context_length=256)
    source = ModelSource(lambda: llama2.load(file, threads=1), lambda: None)
    with traced(Models({"tiny": source}, ServeSettings())) as found:
        yield found


@pytest.mark.parametrize("name", REQUESTS)
def test_no_file_calls_one_that_is_waiting_for_it(server: tuple[int, CallPath], name: str) -> None:
    port, path = server
    path.files, path.returns = [], set()
    route, body = REQUESTS[name]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET" if body is None else "POST", route, None if body is None else json.dumps(body))
    connection.getresponse().read()
    connection.close()
    print(*path.files, file=sys.stderr)
    assert {"http/protocol.py", "http/access_log.py", "http/guard.py"} <= set(path.files)
    assert not path.returns, "\n".join(sorted(path.returns))
