"""HTTP as programs speak it: old and new, through proxies, with the addresses and headers of other servers."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AzureOpenAI, OpenAI

from llama2.errors import Llama2Error
from llama2.serve.http.address import origin_pattern
from llama2.serve.http.paths import canonical
from llama2.serve.http.server import serve
from llama2.serve.models import Models
from llama2.serve.settings import ServeSettings
from serving import Server, chat, events, serving, write_model

CHAT = "/v1/chat/completions"
KEY = "correct-horse"
ORIGINS = ("chrome-extension://*", "https://*.page.example", "http://localhost:*")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    allowed = [word for origin in ORIGINS for word in ("--allow-origin", origin)]
    options = ("--idle-timeout", "2", "--json", *allowed)
    with serving([write_model(folder), write_model(folder, "other")], *options) as server:
        yield server
        assert not any("Traceback" in line for line in server.messages)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving([write_model(tmp_path_factory.mktemp("models"))], "--json", LLAMA2_API_KEY=KEY) as server:
        yield server
        assert not any("Traceback" in line for line in server.messages)


def logged(server: Server, **wanted: Any) -> dict[str, Any]:
    """The log line of a request with these facts, which comes a moment after its answer."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        for line in reversed(list(server.messages)):
            facts = json.loads(line) if line.startswith("{") else {}
            if wanted.items() <= facts.items():
                return facts
        time.sleep(0.02)
    raise AssertionError((wanted, server.messages[-5:]))


def request(method: str, path: str, *headers: str, version: str = "1.1", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", *headers, *([f"Content-Length: {len(body)}"] if body else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


STREAM = json.dumps(chat(stream=True)).encode()


@pytest.mark.parametrize(
    "kind", [None, "application/octet-stream", "application/x-www-form-urlencoded", "text/plain", "Application/JSON"]
)
def test_a_body_is_json_whatever_its_type_is_called(server: Server, kind: str | None) -> None:
    headers = [] if kind is None else [f"Content-Type: {kind}"]
    body = json.dumps(chat()).encode()
    said = server.raw(request("POST", CHAT, "Host: localhost", "Connection: close", *headers, body=body))
    assert said.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_but_not_from_a_page_of_another_origin(server: Server, kind: str) -> None:
    """A page may send these without asking the server first."""
    foreign = {"Origin": "https://a.page.example", "Content-Type": kind}
    status, headers, _ = server.post(CHAT, chat(), **foreign)
    assert (status, headers["access-control-allow-origin"]) == (415, "https://a.page.example")
    assert server.post(CHAT, chat(), **{**foreign, "Content-Type": "application/json"})[0] == 200
    assert server.post(CHAT, chat(), **{**foreign, "Origin": "https://evil.example"})[0] == 403
    assert server.post(CHAT, chat(), **{"Content-Type": kind, "Sec-Fetch-Site": "cross-site"})[0] == 403
    assert server.post(CHAT, chat(), **{"Content-Type": kind, "Sec-Fetch-Site": "same-origin"})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *(CHAT, f"{CHAT}/", "/chat/completions", "/chat/completions/", "/openai/v1/chat/completions"),
        *("/openai/deployments/tiny/chat/completions?api-version=2024-10-21", "/chat/completions?api-version=1"),
    ],
)
def test_addresses_of_one_route(server: Server, path: str) -> None:
    status, _, answer = server.post(path, chat())
    assert (status, answer["object"]) == (200, "chat.completion")


def test_other_addresses(server: Server) -> None:
    prompt = {"prompt": "to be", "max_tokens": 1}
    for path in ("/completions", "/v1/completions/", "/openai/deployments/tiny/completions"):
        assert server.post(path, prompt)[2]["object"] == "text_completion"
    assert server.post("/responses/", {"input": "a", "max_output_tokens": 1})[2]["object"] == "response"
    for path in ("/models", "/v1/models/", "/openai/models?api-version=1", "/openai/v1/models"):
        assert [model["id"] for model in server.get(path)[2]["data"]] == ["tiny", "other"]
    assert server.get("/models/other/")[2]["id"] == "other"
    for path in ("/health/", "/api/tags/", "/docs", "/docs/"):
        assert server.get(path)[0] in (200, 307), path
    for path in (
        "/v1",
        "/openai",
        "/openai/deployments/tiny",
        "/v1/v1/models",
    ):
        assert server.get(path)[0] == 404, path


def test_paths_by_hand() -> None:
    deployments = "/openai/deployments"
    assert canonical(f"{deployments}/org/name/embeddings") == ("/v1/embeddings", "org/name")
    assert canonical(f"{deployments}/a/chat/completions/") == ("/v1/chat/completions", "a")
    assert canonical("/openai/v1/responses") == ("/v1/responses", None)
    assert canonical("/openai/responses") == ("/v1/responses", None)
    assert canonical("/v1/models/a/b") == ("/v1/models/a/b", None)
    assert canonical("/completion") == ("/completion", None)
    assert canonical("/api/embeddings") == ("/api/embeddings", None)
    assert canonical("///") == ("/", None)


def test_which_model_answers(server: Server) -> None:
    """The one of Azure's address, else the one that the body names, else the first."""
    for path, model, expected in (
        (CHAT, None, "tiny"),
        (CHAT, "other", "other"),
        ("/openai/deployments/other/chat/completions", None, "other"),
        ("/openai/deployments/other/chat/completions", "gpt-4o", "other"),
    ):
        assert server.post(path, chat(model=model))[2]["model"] == expected
    body = chat()
    del body["model"]
    assert server.post(CHAT, body)[2]["model"] == "tiny"
    assert server.post("/openai/deployments/nobody/chat/completions", body)[0] == 404
    assert server.get("/info")[2]["model_name"] == "tiny"


def test_openais_client_without_a_version_and_azures(guarded: Server) -> None:
    message: Any = [{"role": "user", "content": "to be"}]
    plain = OpenAI(base_url=guarded.url, api_key=KEY)
    assert plain.chat.completions.create(model="tiny", messages=message, max_tokens=3).usage.completion_tokens > 0  # type: ignore[union-attr]
    azure = AzureOpenAI(azure_endpoint=guarded.url, api_key=KEY, api_version="2024-10-21")
    assert azure.chat.completions.create(model="tiny", messages=message, max_tokens=3).model == "tiny"
    chunks = list(azure.chat.completions.create(model="tiny", messages=message, max_tokens=3, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert azure.completions.create(model="tiny", prompt="to be", max_tokens=3).choices[0].finish_reason
    assert azure.responses.create(model="tiny", input="to be", max_output_tokens=3).object == "response"
    assert [model.id for model in azure.models.list()] == ["tiny"]
    deployed = AzureOpenAI(
        azure_endpoint=guarded.url, azure_deployment="tiny", api_key=KEY, api_version="2024-10-21", max_retries=0
    )
    assert deployed.chat.completions.create(model="gpt-4o", messages=message, max_tokens=3).model == "tiny"
    with pytest.raises(Exception, match="API key is wrong"):
        AzureOpenAI(azure_endpoint=guarded.url, api_key="x", api_version="1", max_retries=0).models.list()


def test_keys_by_three_names(guarded: Server) -> None:
    for headers in ({"api-key": KEY}, {"X-Api-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
        assert guarded.get("/v1/models", **headers)[0] == 200
    for headers in ({"api-key": "x"}, {"api_key": KEY}, {"api-key": "x", "X-Api-Key": ""}):
        assert guarded.get("/v1/models", **headers)[0] == 401


def test_methods_that_a_route_does_not_have(server: Server) -> None:
    for method, path, allowed in (
        ("POST", "/", "GET, HEAD"),
        ("TRACE", "/", "GET, HEAD"),
        ("DELETE", "/app.js", "GET, HEAD"),
        ("OPTIONS", "/", "GET, HEAD"),
        ("GET", CHAT, "POST"),
        ("HEAD", CHAT, "POST"),
        ("PUT", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("PATCH", "/v1/models/tiny", "GET, HEAD"),
    ):
        status, headers, answer = server.request(method, path, b"" if method == "POST" else None)
        assert (status, headers["allow"]) == (405, allowed), (method, path)
        assert method == "HEAD" or allowed in answer["error"]["message"]
    assert server.request("DELETE", "/api/version")[2].keys() == {"error"}


def test_head_wherever_get_is(server: Server) -> None:
    paths = server.get("/openapi.json")[2]["paths"]
    gets = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    assert len(gets) > 5
    for path in (*gets, "/", "/app.js", "/v1/models/tiny", "/openapi.json"):
        status, headers, _ = server.request("HEAD", path)
        assert (status, int(headers["content-length"]) > 0) == (200, True), path
        assert server.raw(request("HEAD", path, "Host: localhost", "Connection: close")).endswith(b"\r\n\r\n")
    assert logged(server, method="HEAD", route="/v1/models")["status"] == 200


def test_health_is_for_everybody(guarded: Server) -> None:
    for lines in ((), ("Host: ",), ("Host: evil.example",), ("Host: [::1",), ("Host: a", "Host: b")):
        for method in ("GET", "HEAD"):
            for path in ("/health", "/v1/health", "/health/"):
                for version in ("1.0", "1.1"):
                    said = guarded.raw(request(method, path, *lines, "Connection: close", version=version))
                    assert said.startswith(b"HTTP/1.1 200 "), (lines, said)
    assert guarded.raw(request("GET", "/metrics", version="1.0")).startswith(b"HTTP/1.1 403 ")


def test_a_stream_of_http_1_0_ends_with_its_connection(server: Server) -> None:
    for path, body in ((CHAT, STREAM), ("/api/generate", b'{"model":"tiny","prompt":"a","options":{"num_predict":4}}')):
        said = server.raw(request("POST", path, "Host: localhost", version="1.0", body=body))
        head, _, answer = said.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert b"keep-alive" not in head.lower()
        assert answer.endswith((b"data: [DONE]\n\n", b"}\n"))
    whole = server.raw(request("POST", CHAT, "Host: localhost", version="1.0", body=json.dumps(chat()).encode()))
    head, _, body = whole.partition(b"\r\n\r\n")
    assert int(re.search(rb"content-length: (\d+)", head)[1]) == len(body)  # type: ignore[index]


def test_idle_connections_are_told_how_long_they_stay(server: Server) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    for _ in range(2):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert answer.read()
        assert answer.headers["keep-alive"] == "timeout=2"
        time.sleep(1.5)  # and it is still open
    assert connection.sock.recv(1) == b""  # and then it is closed
    connection.close()


def test_idle_connections_stay_for_75_seconds_by_default(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than proxies and clients keep them; uvicorn's own default would be five."""
    assert guarded.get("/health")[1]["keep-alive"] == "timeout=75"
    given: dict[str, Any] = {}

    def configured(*_: Any, **options: Any) -> Any:
        given.update(options)
        raise RuntimeError("enough")

    monkeypatch.setattr("uvicorn.Config", configured)
    with socket.socket() as listener, pytest.raises(RuntimeError, match="enough"):
        serve(Models({}, ServeSettings(max_connections=1)), listener)
    assert given["timeout_keep_alive"] > 75


def test_refused_names_and_origins_are_logged_in_one_line(server: Server) -> None:
    time.sleep(0.2)  # until the lines of other tests are there
    server.messages.clear()
    assert server.get("/v1/models", Host="evil.example\u202e".encode().decode("latin-1"))[0] == 403
    assert "evil.example" in logged(server, status=403)["reason"]
    server.messages.clear()
    assert server.get("/v1/models", Origin="https://evil.example")[0] == 403
    assert logged(server, status=403)["reason"].startswith("Origin: 'https://evil.example'")
    assert not any("\x1b" in line or "\u202e" in line for line in server.messages)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("chrome-extension://abcdefghijklmnop", 200),
        ("https://a.page.example", 200),
        ("https://a.b.page.example", 200),
        ("HTTPS://A.PAGE.EXAMPLE", 200),
        ("http://localhost:3000", 200),
        ("https://page.example", 403),
        ("http://a.page.example", 403),
        ("https://a.page.example:444", 403),
        ("https://evil.com/.page.example", 403),
        ("https://evil.com#.page.example", 403),
        ("https://evil.com?.page.example", 403),
        ("https://evil.com\\.page.example", 403),
        ("https://evil.com:80.page.example", 403),
        ("https://evil@.page.example", 403),
        ("https://evilpage.example", 403),
        ("https://.page.example", 403),
        ("https://a.page.example.evil.com", 403),
        ("http://localhost", 403),
        ("http://localhost:3000.evil.com", 403),
        ("http://localhost:3000@evil.com", 403),
        ("null", 403),
    ],
)
def test_patterns_of_origins(server: Server, origin: str, status: int) -> None:
    answer = server.post(CHAT, chat(max_tokens=1), Origin=origin)
    assert answer[0] == status
    assert answer[1].get("access-control-allow-origin") == (origin if status == 200 else None)


@pytest.mark.parametrize(
    "origin", ["page.example", "https://page.example/", "https://*page.example", "https://", "https://a b", "*.a", ""]
)
def test_what_is_no_pattern(origin: str) -> None:
    with pytest.raises(Llama2Error, match="is not an origin"):
        origin_pattern([origin])


def test_a_client_that_sends_no_more_gets_its_answer(server: Server) -> None:
    for version in ("1.0", "1.1"):
        for body, end in ((json.dumps(chat(max_tokens=200)).encode(), b"}"), (STREAM, b"[DONE]\n\n")):
            with socket.create_connection((server.host, server.port), timeout=30) as connection:
                connection.sendall(request("POST", CHAT, "Host: localhost", version=version, body=body))
                connection.shutdown(socket.SHUT_WR)
                response = http.client.HTTPResponse(connection)
                response.begin()
                assert response.status == 200
                assert response.read().endswith(end)
                assert connection.recv(1) == b""
    stream = json.dumps(chat(max_tokens=400, stream=True)).encode()
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.sendall(request("POST", CHAT, "Host: localhost", body=stream))
        response = http.client.HTTPResponse(connection)
        response.begin()
        first = response.read(10)
        connection.shutdown(socket.SHUT_WR)  # in the midst of chunks
        *chunks, done = events(first + response.read())
        assert (len(chunks) > 3, done) == (True, "[DONE]")


def test_a_client_that_left_is_logged_as_such(server: Server) -> None:
    for stream in (True, False):
        connection = server.open(CHAT, chat(max_tokens=7000, stream=stream, n=2))
        server.wait_for("llama2_running", 2, 20)
        connection.close()
        server.wait_for("llama2_running", 0, 20)
        assert logged(server, status=499, route=CHAT)["finish"] == "cancelled"
        server.messages.clear()
    assert 'status="503"' not in server.get("/metrics")[2].decode()


@pytest.mark.skipif(
    signal.getsignal(getattr(signal, "SIGHUP", signal.SIGINT)) is signal.SIG_IGN,
    reason="hangups are ignored, as by nohup",
)
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no such signal here")
def test_a_hangup_lets_streams_finish(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)]) as server:
        stream = server.open(CHAT, chat(max_tokens=1500, stream=True))
        assert stream.recv(16).startswith(b"HTTP/1.1 200")
        server.signal(signal.SIGHUP)
        assert b"data: [DONE]" in b"".join(iter(lambda: stream.recv(65536), b""))[-40:]
        assert server.process.wait(20) == 0


def test_a_second_interrupt_says_one_line(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)]) as server:
        streams = [server.open(CHAT, chat(max_tokens=8000, stream=True, n=1 + i % 2)) for i in range(4)]
        assert all(stream.recv(16) for stream in streams)
        waiting = server.open(CHAT, chat(max_tokens=8000))
        server.wait_for("llama2_running", 7, 20)
        server.messages.clear()
        server.signal(signal.SIGINT)
        time.sleep(0.5)
        server.signal(signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT
        time.sleep(0.2)
        lines = [line for line in server.messages if " request " not in line]
        assert len(lines) == 1, lines
        assert "interrupted" in lines[0]
        for stream in (*streams, waiting):
            stream.close()


SLOW = """
import time
from llama2.api import Model
from llama2.cli.main import run

prompt = Model.prompt
Model.prompt = lambda *words, **options: time.sleep(3) or prompt(*words, **options)
run()
"""


def test_a_model_that_prepares_a_request_is_not_unloaded(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--keep-alive", "1", program=("-c", SLOW)) as server:
        assert server.post(CHAT, chat())[0] == 200


def test_an_upgrade_that_is_not_taken_loses_no_body(server: Server) -> None:
    """Java's client asks for HTTP/2 with its first request."""
    upgrade = (
        "Connection: Upgrade, HTTP2-ServeSettings",
        "Upgrade: h2c",
        "HTTP2-ServeSettings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA",
    )
    body = json.dumps(chat()).encode()
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(request("POST", CHAT, "Host: localhost", *upgrade, body=body))
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert (response.status, json.loads(response.read())["object"]) == (200, "chat.completion")


def test_expect_100_continue(server: Server) -> None:
    body = json.dumps(chat()).encode()
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        head = request("POST", CHAT, "Host: localhost", "Expect: 100-continue", f"Content-Length: {len(body)}")
        connection.sendall(head)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_bytes_one_by_one(server: Server) -> None:
    body = json.dumps(chat(max_tokens=1)).encode()
    with socket.create_connection((server.host, server.port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request("POST", CHAT, "Host: localhost", body=body):
            connection.sendall(bytes([byte]))
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_surrogates_are_refused_where_json_is_read(server: Server) -> None:
    for path, body in (
        (CHAT, chat(messages=[{"role": "user", "content": "\ud800"}])),
        ("/v1/responses", {"model": "tiny", "input": "a", "metadata": {"a": "\udc00\ud800"}}),
        ("/v1/responses", {"model": "tiny", "input": "a", "user": "\ud83d"}),
        ("/tokenize", {"content": "\ud83dx"}),
        ("/api/generate", {"model": "tiny\udfff", "prompt": "a"}),
    ):
        status, _, answer = server.post(path, json.dumps(body).encode())
        message = answer["error"] if path.startswith("/api/") else answer["error"]["message"]
        assert (status, "surrogate" in message) == (400, True)
    raw = b'{"content":"\xed\xa0\x80"}'
    assert server.post("/tokenize", raw)[0] == 400
    whole = json.dumps({"content": "😀 \\ud800", "add_special": False}).encode()
    assert b"\\ud83d\\ude00 \\\\ud800" in whole
    tokens = server.post("/tokenize", whole)[2]["tokens"]
    assert server.post("/detokenize", {"tokens": tokens})[2]["content"].strip() == "😀 \\ud800"


def test_many_at_once_of_every_kind(server: Server) -> None:
    """What half of the clients do wrong does not disturb the other half."""
    failures: list[Any] = []

    def good(i: int) -> None:
        status, _, answer = server.post(CHAT, chat(max_tokens=20, n=1 + i % 3))
        if status != 200 or len(answer["choices"]) != 1 + i % 3:
            failures.append(answer)

    def bad(i: int) -> None:
        with contextlib.suppress(OSError):
            whole = request("POST", CHAT, "Host: localhost", body=STREAM)
            connection = socket.create_connection((server.host, server.port), timeout=10)
            connection.sendall(whole[: 20 + i * 7])
            connection.close()

    threads = [threading.Thread(target=(good, bad)[i % 2], args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
