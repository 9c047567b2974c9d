"""What a stranger can cost a server: bytes, values and connections, before the key and after it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.serve.http.app import application
from llama2.serve.http.guard import Guard
from llama2.serve.http.paths import canonical
from llama2.serve.models import Models, ModelSource
from llama2.serve.settings import ServeSettings
from llama2.serve.surfaces import json_body
from serving import Server, answers, chat, serving, statuses, write_model

CHAT = "/v1/chat/completions"
KEY = "correct-horse"
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving([write_model(tmp_path_factory.mktemp("models"))], LLAMA2_API_KEY=KEY) as server:
        server.get("/")  # what serves the page takes its memory once
        yield server
        assert not any("Traceback" in line for line in server.messages)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving([write_model(tmp_path_factory.mktemp("models"))]) as server:
        server.post(CHAT, chat())
        server.get("/")
        yield server
        assert not any("Traceback" in line for line in server.messages)


def memory(server: Server, which: str = "VmRSS") -> int:
    """Bytes that the server has, or had at most (`VmHWM`)."""
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("no /proc here")
    return int(re.search(rf"{which}:\s+(\d+) kB", status.read_text())[1]) << 10  # type: ignore[index]


@contextlib.contextmanager
def at_most(server: Server, limit: int) -> Iterator[None]:
    """What is done within makes the server's memory grow by less than `limit` bytes, also in between."""
    before = memory(server)
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
    yield
    assert memory(server, "VmHWM") - before < limit


def flood(server: Server, start: bytes, piece: bytes, size: int = 24 * MEGABYTE) -> tuple[int, bytes]:
    """Bytes that the server let us send of `start` and then `piece` again and again, and what it said."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        sent = 0
        with contextlib.suppress(OSError):
            connection.sendall(start)
            while sent < size:
                connection.sendall(piece)
                sent += len(piece)
        said = b""
        with contextlib.suppress(OSError):
            said = connection.recv(65536)
        return sent, said


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (CHUNKED + b"0\r\n", b"X-Trailer: " + b"a" * 1000 + b"\r\n"),
        (CHUNKED + b"0\r\nX-Trailer: ", b"a" * 1000),
        (CHUNKED + b"1;x=", b"a" * 1000),
        (CHUNKED, b"1;" + b"x" * 1000 + b"\r\n{\r\n"),
        (CHUNKED, b"0" * 1000),
        (b"GET / HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n" * 200),
        (b"", b"\r\n" * 500),
    ],
    ids=["trailers", "one trailer", "one extension", "extensions", "zeros", "trailers of the page", "empty lines"],
)
@pytest.mark.parametrize("key", [True, False], ids=["before the key", "without a key"])
def test_bytes_that_are_not_body_are_counted(
    guarded: Server, open_server: Server, start: bytes, piece: bytes, key: bool
) -> None:
    server = guarded if key else open_server
    before = memory(server)
    sent, said = flood(server, start, piece)
    assert sent < 20 * MEGABYTE  # of which most is in the kernel's buffers
    assert memory(server) - before < 4 * MEGABYTE
    assert said == b"" or re.match(rb"HTTP/1.1 (4\d\d|200) ", said), said[:100]
    assert server.get("/health")[0] == 200


def test_bodies_in_pieces_of_one_byte_are_bodies(open_server: Server) -> None:
    body = json.dumps(chat(padding="x" * 30_000)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    said = open_server.raw(CHUNKED[:-2] + b"Connection: close\r\n\r\n" + chunks + b"0\r\nX-Sum: 1\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")


def test_requests_one_behind_another_are_answered_in_order_and_not_hoarded(guarded: Server) -> None:
    one = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
    few = b"".join(one % path for path in (b"health", b"nowhere", b"health", b"metrics"))
    said = guarded.raw(few + b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"401", b"200", b"401", b"200"]
    with at_most(guarded, 4 * MEGABYTE):
        for _ in range(4):
            connection = socket.create_connection((guarded.host, guarded.port), timeout=20)
            with connection, contextlib.suppress(OSError):
                connection.sendall((one % b"health") * 20_000)
                while connection.recv(65536):
                    pass
    assert guarded.get("/health")[0] == 200


def test_many_connections_cost_little_each(guarded: Server) -> None:
    unfinished = [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 60_000,
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(90)),
        CHUNKED + b"0\r\nX-Trailer: " + b"a" * 60_000,
        b"G",
    ]
    before = memory(guarded)
    connections = [socket.create_connection((guarded.host, guarded.port), timeout=20) for _ in range(100)]
    for i, connection in enumerate(connections):
        connection.sendall(unfinished[i % len(unfinished)])
    assert guarded.get("/health")[0] == 200
    assert memory(guarded) - before < len(connections) * (128 << 10)
    for connection in connections:
        connection.close()


def test_idle_connections_give_way(tmp_path: Path) -> None:
    """Those that have asked nothing yet, or whose answer is read, go before one that waits for an answer."""
    with serving([write_model(tmp_path)], "--max-connections", "16") as server:
        running = server.open(CHAT, chat(max_tokens=3000, stream=True))
        assert running.recv(12) == b"HTTP/1.1 200"
        idle = [socket.create_connection((server.host, server.port), timeout=20) for _ in range(60)]
        idle[-1].sendall(b"GET /hea")
        for _ in range(5):
            assert server.post(CHAT, chat(max_tokens=1))[0] == 200
        gone = 0
        for connection in idle[:-2]:
            connection.settimeout(0.01)
            try:
                gone += connection.recv(100) == b""
            except (TimeoutError, ConnectionResetError) as error:
                gone += isinstance(error, ConnectionResetError)
        assert gone >= 44
        received = running.recv(65536)
        assert b"data: " in received
        for connection in (*idle, running):
            connection.close()


def test_when_every_connection_waits_for_an_answer_others_are_refused(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--max-connections", "4") as server:
        running = [server.open(CHAT, chat(max_tokens=8000, stream=True)) for _ in range(4)]
        assert all(stream.recv(12) == b"HTTP/1.1 200" for stream in running)
        status, headers, answer = server.get("/health")
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        assert headers["retry-after"] == "1"
        for stream in running:
            stream.close()


HUGE: dict[str, Any] = {
    "objects as prompts": {"prompt": [{}] * 50_000},
    "negative tokens": {"prompt": [-1] * 50_000},
    "texts, then a number": {"prompt": ["a"] * 50_000 + [1]},
    "tokens, then a text": {"prompt": [1] * 50_000 + ["a"]},
    "lists in lists": {"prompt": [[[]]] * 50_000},
    "messages of nothing": {"messages": [{}] * 20_000},
    "messages": {"messages": [{"role": "user", "content": "a"}] * 80_001},
    "parts": {"messages": [{"role": "user", "content": [{}] * 50_000}]},
    "texts as parts": {"messages": [{"role": "user", "content": [1] * 50_000}]},
    "stops": {"messages": [{"role": "user", "content": "a"}], "stop": [""] * 100_000},
    "biases": {"messages": [{"role": "user", "content": "a"}], "logit_bias": {str(i): "a" for i in range(50_000)}},
    "tools": {"messages": [{"role": "user", "content": "a"}], "tools": [1] * 50_000},
    "metadata": {"messages": [{"role": "user", "content": "a"}], "metadata": {str(i): 1 for i in range(50_000)}},
}


@pytest.mark.parametrize("what", HUGE)
def test_lists_without_end_are_refused_at_the_first_error(open_server: Server, what: str) -> None:
    body = HUGE[what]
    path = CHAT if "messages" in body else "/v1/completions"
    with at_most(open_server, 64 * MEGABYTE):
        status, _, answer = open_server.post(path, {"model": "tiny", **body})
    assert status == 400, answer
    assert len(json.dumps(answer)) < 1000
    if what in ("biases", "metadata"):
        assert "50000" in answer["error"]["message"]  # they were counted, and not looked at one by one


@pytest.mark.parametrize(
    "value",
    [b"{}", b"[]", b"0", b'""', b"null", b"1.5", b'{"a":[{}]}'],
    ids=lambda value: value.decode(),
)
def test_values_without_number_are_refused_before_they_are_built(open_server: Server, value: bytes) -> None:
    """Four megabytes of the smallest values, a million and more, in a field that takes anything."""
    body = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"x":[' + value
    body += (b"," + value) * ((4_100_000 - len(body)) // (len(value) + 1)) + b"]}"
    with at_most(open_server, 64 * MEGABYTE):
        status, _, answer = open_server.post(CHAT, body)
    assert (status, answer["error"]["code"]) == (413, "too_many_values")
    assert "250000" in answer["error"]["message"]


def test_a_large_body_is_read_as_a_small_one(open_server: Server) -> None:
    """Whichever way it is parsed: the same answers, and the same refusals."""
    for padding in (0, 300_000, 2_000_000):
        for field, status in (
            ({}, 200),
            ({"padding": ["é\\\n\u2028😀", 1e3, -7, None, True, {"a": []}] * 1000}, 200),
            ({"n": 0}, 400),
        ):
            answer = open_server.post(CHAT, chat(filler="," * padding, **field))
            assert answer[0] == status
        for wrong in (b'{"a":1e999}', b'{"a":NaN}', b'{"a":1,"a":2}', b'{"a":"\\ud800"}', b'{"a":tru}', b'{"a":[1,]}'):
            status, _, answer = open_server.post(CHAT, wrong[:-1] + b',"b":"' + b"," * padding + b'"}')
            assert (status, answer["error"]["code"]) == (400, "invalid_json"), wrong
    deep = b'{"a":' * 50_000
    assert open_server.post(CHAT, deep + b" " * 300_000)[2]["error"]["code"] == "invalid_json"


def test_health_is_answered_while_a_large_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here reading waits for that, which it would do in vain in the event loop's own thread."""
    begun, answered = threading.Event(), threading.Event()
    waited: list[bool] = []
    read = json_body.read

    def waiting(*given: Any) -> Any:
        begun.set()
        waited.append(answered.wait(5))
        return read(*given)

    monkeypatch.setattr(json_body, "read", waiting)
    models = Models({"tiny": ModelSource(lambda: pytest.fail("it is loaded"), lambda: None)}, ServeSettings())
    models.ready = True
    served = application(models)

    async def status(method: str, path: str, body: bytes = b"") -> list[int]:
        scope = {"method": method, "path": path, "query_string": b"", "state": {}}
        return await statuses(served, {**scope, "headers": [(b"host", b"localhost")]}, body)

    async def both() -> tuple[list[int], list[int]]:
        large = asyncio.create_task(status("POST", CHAT, b" " * 100_000))
        await asyncio.to_thread(begun.wait, 5)
        health = await status("GET", "/health")
        answered.set()
        return health, await large

    assert asyncio.run(both()) == ([200], [400])
    assert waited == [True]


def test_counts_are_checked_before_anything_is_built(open_server: Server) -> None:
    request = {"model": "tiny", "prompt": ["a" * 100] * 1000, "n": 128}
    with at_most(open_server, 16 * MEGABYTE):
        status, _, answer = open_server.post("/v1/completions", request)
    assert (status, answer["error"]["param"]) == (400, "n")
    assert "128000 answers" in answer["error"]["message"]
    prompts = {"model": "tiny", "prompt": [[5] * 10] * 65, "n": 2}
    assert open_server.post("/v1/completions", prompts)[2]["error"]["param"] == "n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a" * 4_000_000}]}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 5000}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 1000}] * 3000}]}),
        ("/v1/completions", {"prompt": "a b " * 700_000}),
        ("/v1/completions", {"prompt": ["a" * 1_000_000] * 3}),
        ("/v1/responses", {"input": "a" * 4_000_000}),
        ("/v1/responses", {"input": "a", "instructions": "a" * 4_000_000}),
        ("/api/chat", {"messages": [{"role": "user", "content": "a" * 4_000_000}]}),
        ("/api/generate", {"prompt": "a" * 4_000_000}),
        ("/api/generate", {"prompt": "a" * 4_000_000, "raw": True}),
        ("/apply-template", {"messages": [{"role": "user", "content": "a" * 4_000_000}]}),
        ("/tokenize", {"content": "a" * 4_000_000}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_texts_that_cannot_fit_are_refused_by_their_size(open_server: Server, path: str, body: Any) -> None:
    """The tiny model's context is 8192 tokens of at most 10 bytes each, so 81,920 bytes are the most."""
    status, _, answer = open_server.post(path, {"model": "tiny", **body})
    assert status == 400, answer
    message = answer["error"] if path.startswith("/api/") else answer["error"]["message"]
    assert "8192" in message
    assert re.search(r"at most \d+ (bytes|messages)", message), message


HOSTS = st.one_of(
    st.text(st.characters(max_codepoint=255), max_size=40),
    st.text("[]:@/?#a.1%\\ ", max_size=12),
    st.sampled_from(["[::1", "[", "a]b", "[::1]x", "[v1.x]", "localhost:", "localhost:99999999", "::1", "%", "a:b:c"]),
)


@given(
    host=HOSTS,
    origin=st.one_of(st.none(), HOSTS, HOSTS.map("http://{}".format)),
    names=st.lists(st.sampled_from([b"host", b"origin", b"authorization", b"api-key", b"content-length", b"x"])),
    method=st.sampled_from(["GET", "POST", "OPTIONS", "HEAD", "TRACE", "X" * 20]),
    path=st.text(st.characters(max_codepoint=0x2FF), max_size=30).map("/{}".format),
    allowed=st.sampled_from([(), ("*",)]),
)
def test_nothing_in_the_guard_raises(
    host: str, origin: str | None, names: list[bytes], method: str, path: str, allowed: tuple[str, ...]
) -> None:
    headers = [(b"host", host.encode("latin-1", "replace")), *((name, host.encode("latin-1")) for name in names)]
    headers += [] if origin is None else [(b"origin", origin.encode("latin-1"))]
    settings = ServeSettings(keys=("k",) if len(names) % 2 else (), allow_hosts=allowed, allow_origins=allowed)
    scope = {"method": method, "path": canonical(path)[0], "headers": headers, "state": {}}
    found = asyncio.run(statuses(Guard(answers, settings, ()), scope))
    assert found in [[status] for status in (200, 204, 400, 401, 403, 413, 415)]


@pytest.mark.parametrize("host", ["[::1", "[", "a]b", "[]", "a@b", "localhost:x", "\xff", "a b", "local\thost"])
def test_hosts_that_are_no_names(guarded: Server, host: str) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: " + host.encode("latin-1") + b"\r\n\r\n"
    said = guarded.raw(request)
    head, _, body = said.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 40[03] ", head), said[:200]
    assert json.loads(body)["error"]["message"].isprintable()


def test_two_hosts_are_none(open_server: Server) -> None:
    two = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nHost: localhost\r\n\r\n"
    assert open_server.raw(two).startswith(b"HTTP/1.1 400 ")


def test_bombs_are_not_unpacked(open_server: Server) -> None:
    """A hundred megabytes of blanks in a hundred kilobytes, by every name of a coding."""
    blanks = b" " * (100 * MEGABYTE)
    zstd = bytes.fromhex("28b52ffd") + b"\0" * 1000
    packed = {"gzip": gzip.compress(blanks, 1), "deflate": zlib.compress(blanks, 1), "br": b"\x1b", "zstd": zstd}
    packed |= {"identity, gzip": packed["gzip"], "GZIP": packed["gzip"], "x-gzip": packed["gzip"]}
    smuggled = (
        b"POST /health HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n0\r\n\r\n"
    )
    with at_most(open_server, 8 * MEGABYTE):
        for coding, body in packed.items():
            assert open_server.post(CHAT, body, **{"Content-Encoding": coding})[0] == 415, coding
        assert re.match(rb"HTTP/1.1 4\d\d ", open_server.raw(smuggled))


def test_clients_that_leave_at_any_moment(open_server: Server) -> None:
    """Between accepting, preparing, the first token and the last: nothing is left running, and nothing fails."""
    for i in range(40):
        stream = open_server.open(CHAT, chat(max_tokens=300, stream=bool(i % 2), n=1 + i % 3))
        time.sleep(0.003 * (i % 8))
        stream.close()
    open_server.wait_for("llama2_running", 0, 20)
    assert open_server.gauge("llama2_kv_cache_used_ratio") == 0
    assert open_server.post(CHAT, chat())[0] == 200
    text = open_server.get("/metrics")[2].decode()
    assert not re.search(r'status="500"', text)


def test_headers_of_traces_are_data(open_server: Server) -> None:
    for value in ("00-" + "f" * 32 + "-" + "f" * 16 + "-01", "x" * 5000, "00-\u00e9-1-1", "", "=" * 100, "a=b," * 5000):
        headers = {"traceparent": value, "tracestate": value, "baggage": value}
        assert open_server.post(CHAT, chat(), **headers)[0] == 200
