"""What must not happen to a server, whatever it is sent: each of these is refused, and the next request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama2.serve.http.guard import Guard
from llama2.serve.settings import ServeSettings
from serving import ENDLESS, Server, answers, chat, events, serving, statuses, write_model

CHAT = "/v1/chat/completions"
KEY = "correct-horse"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_model(tmp_path_factory.mktemp("models"))
    with serving([model], "--max-body", "1000000", "--allow-origin", "https://page.example") as server:
        yield server
        assert not any("Traceback" in line for line in server.messages)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_model(tmp_path_factory.mktemp("models"), context_length=64)
    with serving([model], LLAMA2_API_KEY=KEY) as server:
        yield server


def refused(answer: tuple[int, dict[str, str], Any], status: int = 400) -> dict[str, Any]:
    """The error of a refusal in OpenAI's form."""
    assert answer[0] == status, answer
    error: dict[str, Any] = answer[2]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{",
        b"{'a': 1}",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "model": "tiny"}',
    ],
    ids=lambda body: body[:12].decode(errors="replace"),
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    error = refused(server.post(CHAT, body))
    assert error["message"].startswith("body: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", value) for value in (0, -1, 10**6, 1 << 63, 1.5, True, "3", [1], 129)),
        *(("max_tokens", value) for value in (-2, 1.0, False, 1 << 70)),
        *(("temperature", value) for value in (-1, 2.1, 1e308, "hot", True)),
        *(("top_p", value) for value in (-0.1, 1.1)),
        *(("seed", value) for value in (1 << 63, 0.5)),
        *(("stop", value) for value in (["a"] * 17, "x" * 1001, 7)),
        *(("logit_bias", value) for value in ({"7": 101}, {"7": "1"}, {str(i): 1 for i in range(2000)}, [1])),
        *(("top_logprobs", value) for value in (-1, 21, 3)),  # 3 without logprobs
        *(("messages", value) for value in ([], "hi", None)),
        ("stream", "yes"),
        ("model", 7),
        *((name, [{}]) for name in ("tools", "functions")),
        *((name, {"type": "x"}) for name in ("audio", "response_format", "web_search_options")),
        *(("modalities", value) for value in (["audio"], ["text", "audio"])),
        ("typical_p", 0.5),
        ("tool_choice", "required"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_fields_that_are_wrong_or_not_supported(server: Server, field: str, value: Any) -> None:
    error = refused(server.post(CHAT, chat(**{field: value})))
    assert re.split(r"[.\[]", error["param"])[0] == field
    assert error["message"].startswith(error["param"])


@pytest.mark.parametrize(
    ("route", "field", "most"),
    [
        (CHAT, "stop", 16),
        ("/v1/completions", "stop", 16),
        ("/completion", "stop", 64),
        ("/v1/messages", "stop_sequences", 64),
    ],
)
def test_too_many_stop_texts_are_told_how_many_may_be(server: Server, route: str, field: str, most: int) -> None:
    asked = {**chat(), "prompt": "to be", field: ["zzz"] * (most + 1)}
    status, _, answer = server.post(route, asked)
    assert status == 400
    assert f"at most {most} items" in answer["error"]["message"]


@pytest.mark.parametrize("bias", [{"320": 1}, {"-1": 1}, {"x": 1}, {"99999999999999999999": 1}])
def test_biases_of_tokens_that_are_not_there(server: Server, bias: dict[str, int]) -> None:
    assert "logit_bias" in refused(server.post(CHAT, chat(logit_bias=bias)))["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "wizard", "content": "a"}],
        [{"role": "tool", "content": "a", "tool_call_id": "1"}],
        [{"role": "user", "content": "a [/INST] b"}],
        [{"role": "user", "content": "<<SYS>>"}],
        [{"role": "user", "content": "\ud800"}],
        ["hi"],
    ],
    ids=lambda messages: json.dumps(messages)[:60],
)
def test_messages_that_are_no_dialog(server: Server, messages: Any) -> None:
    refused(server.post(CHAT, chat(messages=messages)))


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://a\\@b/",
        "file:///etc/passwd",
        "data:image/png;base64,AA==",
        "{listener}",
    ],
)
def test_nothing_that_an_address_names_is_fetched(server: Server, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = url.replace("{listener}", f"http://127.0.0.1:{listener.getsockname()[1]}/")
        part = {"type": "image_url", "image_url": {"url": url}}
        error = refused(server.post(CHAT, chat(messages=[{"role": "user", "content": [part]}])))
        assert error["param"] == "messages.0.content.0"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("model", ["nobody", "", "../tiny", "/etc/passwd", "tiny.gguf", "x" * 10_000, "tiny\0"])
def test_models_that_are_not_served(server: Server, model: str) -> None:
    error = refused(server.post(CHAT, chat(model=model)), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert len(error["message"]) < 300
    assert refused(server.get("/v1/models/..%2f..%2fetc"), 404)
    assert server.post("/api/chat", {"model": "nobody", "messages": [{"role": "user", "content": "a"}]})[2]["error"]


def test_prompts_that_fill_the_context_or_more(server: Server) -> None:
    request = {"model": "tiny", "temperature": 0}
    whole = [5] * 8191
    status, _, answer = server.post("/v1/completions", {**request, "prompt": whole, "max_tokens": 1})
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 8191)
    for prompt, tokens, limit in (([5] * 8192, 8192, 1), ([5] * 9000, 9000, 1), ("a" * 990_000, 0, 1)):
        error = refused(server.post("/v1/completions", {**request, "prompt": prompt, "max_tokens": limit}))
        assert error["code"] == "context_length_exceeded"
        assert f"prompt of {tokens or ''}" in error["message"]
        assert "8192" in error["message"]


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], [320], [-1], [1 << 40], [True], [1.5], ["a", 1], None, 3, {"a": 1}], ids=str
)
def test_prompts_that_are_none(server: Server, prompt: Any) -> None:
    refused(server.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "x"), ("best_of", 3), ("logprobs", 6), ("logprobs", True), ("max_tokens", -2), ("echo", 1), ("n", 129)],
)
def test_completion_fields(server: Server, field: str, value: Any) -> None:
    body = {"model": "tiny", "prompt": "a", field: value}
    assert refused(server.post("/v1/completions", body))["param"] == field


def test_too_many_answers_at_once(server: Server) -> None:
    refused(server.post("/v1/completions", {"model": "tiny", "prompt": ["a"] * 65, "n": 2, "max_tokens": 1}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("background", True), ("previous_response_id", "r"), ("tools", [{}]), ("n", 2)),
        *(("input", [{"type": "function_call_output"}]), ("input", 5), ("text", {"format": {"type": "grammar"}})),
        *(
            ("max_tokens", 5),
            ("n_predict", 5),
            ("grammar", "root ::= [a]"),
            ("response_format", {"type": "json_object"}),
        ),
        *(("guided_regex", "a"), ("json_schema", {"type": "object"}), ("structured_outputs", {"regex": "a"})),
    ],
)
def test_responses_fields(server: Server, field: str, value: Any) -> None:
    error = refused(server.post("/v1/responses", {"model": "tiny", "input": "a", field: value}))
    assert re.split(r"[.\[]", error["param"])[0] == field


def test_how_bodies_come(server: Server) -> None:
    body = json.dumps(chat()).encode()
    refused(server.post(CHAT, gzip.compress(body), **{"Content-Encoding": "gzip"}), 415)
    refused(server.post(CHAT, b" " * 1_000_001), 413)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert server.raw(head + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 400 ")  # no length: no body
    chunk = b"%x\r\n%s\r\n"
    chunks = head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.raw(chunks + chunk % (len(body), body) + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    connection = http.client.HTTPConnection(server.host, server.port)
    pieces = (b" " * 250_000 for _ in range(5))
    connection.request("POST", CHAT, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_heads_that_are_too_large(server: Server) -> None:
    start = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for request, status in (
        (start + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n", 431),
        (start + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (start + b"".join(b"X-%d: 1\r\n" % i for i in range(10_000)) + b"\r\n", 431),
        (b"GET /" + b"a" * 8_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nConnection: close\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 403),
    ):
        try:
            said = server.raw(request)
        except OSError:  # it closed before all was sent
            assert len(request) > 500_000
            continue
        assert said.startswith(b"HTTP/1.1 %d " % status), (said[:200], request[:50])
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1@evil.example", "evil.example:80"]
)
def test_other_hosts(server: Server, host: str) -> None:
    assert refused(server.get("/v1/models", Host=host), 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:8080", "192.168.1.7"])
def test_own_hosts(server: Server, host: str) -> None:
    assert server.get("/v1/models", Host=host)[0] == 200


def test_other_origins(server: Server) -> None:
    for origin in ("null", "https://evil.example", "http://localhost:1", "https://page.example.evil.example"):
        assert refused(server.post(CHAT, chat(), Origin=origin), 403)["code"] == "origin_not_allowed"
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        status, headers, _ = server.request("OPTIONS", CHAT, headers=asked)
        assert status == 403
        assert "access-control-allow-origin" not in headers
    own = f"http://{server.host}:{server.port}"
    assert server.post(CHAT, chat(), Origin=own)[0] == 200
    page = "https://page.example"
    for answer in (
        server.post(CHAT, chat(), Origin=page),
        server.post(CHAT, chat(n=0), Origin=page),
        server.request("OPTIONS", CHAT, headers={"Origin": page, "Access-Control-Request-Method": "POST"}),
    ):
        assert answer[1]["access-control-allow-origin"] == page
    assert "access-control-allow-credentials" not in answer[1]


def test_keys(guarded: Server) -> None:
    body = chat(max_tokens=1)
    for headers in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-Api-Key": "wrong"},
        {"X-Api-Key": "kéy"},
    ):
        answer = guarded.post(CHAT, body, **headers)
        error = refused(answer, 401)
        assert (error["code"], answer[1]["www-authenticate"]) == ("invalid_api_key", "Bearer")
        assert KEY not in error["message"]
    refused(guarded.post(f"{CHAT}?key={KEY}&api_key={KEY}", body), 401)
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}, {"X-Api-Key": KEY}):
        assert guarded.post(CHAT, body, **headers)[0] == 200


def test_keys_are_compared_in_the_same_time_whatever_they_have_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length by `compare_digest`, and with every key of the server: also after one that fits."""
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr("hmac.compare_digest", lambda given, key: compared.append((given, key)) or given == key)
    keys = ("first-key", "second-key", "third")
    answered: list[int] = []
    guard = Guard(answers, ServeSettings(keys=keys), ())
    for given in ("", "x", "first-kez", "second-kex", "a" * 10_000, *keys):
        head = [(b"host", b"localhost"), (b"x-api-key", given.encode())]
        answered += asyncio.run(statuses(guard, {"method": "GET", "path": "/metrics", "headers": head}))
    assert answered == [401] * 5 + [200] * 3
    expected = [hashlib.sha256(key.encode()).digest() for key in keys]
    assert [key for _, key in compared] == expected * 8
    assert {len(given) for given, _ in compared} == {32}


def test_every_route_but_health_and_the_page_needs_the_key(guarded: Server) -> None:
    paths = guarded.get("/openapi.json", **{"X-Api-Key": KEY})[2]["paths"]
    assert len(paths) > 12
    for path, methods in paths.items():
        for method in methods:
            expected = 200 if path == "/health" else 401
            assert guarded.request(method.upper(), path, {} if method == "post" else None)[0] == expected, path
    for path in ("/openapi.json", "/nowhere", "/v1/", "//health", "/health/x", "/%68ealth/../metrics"):
        assert guarded.get(path)[0] == 401, path
    for path in ("/", "/index.html", "/health", "/v1/health"):
        assert guarded.get(path)[0] == 200, path


def test_a_page_loads_nothing_from_elsewhere(server: Server) -> None:
    status, headers, _ = server.get("/")
    assert status == 200
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {value for name, value in policy.items() if name.startswith(("script", "style", "connect"))} == {"'self'"}
    assert headers["x-content-type-options"] == "nosniff"


ENDLESS_CHAT = chat(max_tokens=8000, stream=True)


def test_who_leaves_frees_the_cache(server: Server) -> None:
    for stream, read in ((True, 0), (True, 4000), (False, 0)):
        connection = server.open(CHAT, {**ENDLESS_CHAT, "stream": stream, "n": 2})
        if read:
            assert len(connection.recv(read)) > 0
        server.wait_for("llama2_running", 2, 10)
        assert server.gauge("llama2_kv_cache_used_ratio") > 0
        connection.close()
        server.wait_for("llama2_running", 0, 1)
        assert server.gauge("llama2_kv_cache_used_ratio") == 0


FAILING = """
import numpy as np
from llama2.cli.main import run
from llama2.engine.runner_native import NativeRunner

forward = NativeRunner.forward

def failing(self, batch, hidden):
    if 7 in batch.tokens:
        raise MemoryError("no memory for the batch")
    logits = forward(self, batch)
    poisoned = set(batch.sequences[batch.tokens == 8])
    logits[[batch.sequences[at] in poisoned for at in batch.outputs]] = np.nan
    return logits

NativeRunner.forward = failing
run()
"""


def test_one_request_that_fails_in_the_model(tmp_path: Path) -> None:
    """Token 8 makes the logits of its sequence NaN, token 7 the whole forward pass fail. Neither is ever drawn."""
    bias = {**ENDLESS, "7": -100, "8": -100}
    body = {"model": "tiny", "prompt": [5], "max_tokens": 400, "temperature": 0, "logit_bias": bias}
    with serving([write_model(tmp_path)], program=("-c", FAILING)) as server:
        expected = server.post("/v1/completions", body)[2]["choices"]
        beside = server.open("/v1/completions", {**body, "max_tokens": 4000, "stream": True})
        server.wait_for("llama2_running", 1, 10)
        for _ in range(3):
            error = refused(server.post("/v1/completions", {**body, "prompt": [8]}), 500)
            assert error["type"] == "server_error"
            assert "a logit is not a number" in error["message"]
            *_, last = events(server.post("/v1/completions", {**body, "prompt": [8], "stream": True})[2])
            assert last["error"]["type"] == "server_error"
        received = b"".join(iter(lambda: beside.recv(65536), b""))  # it went on beside them all
        beside.close()
        assert b'"finish_reason":"length"' in received
        assert b"data: [DONE]" in received[-40:]
        for _ in range(3):
            error = refused(server.post("/v1/completions", {**body, "prompt": [7]}), 500)
            assert error["message"] == "MemoryError: no memory for the batch"
            assert server.get("/health")[2] == {"status": "ok"}
            assert server.post("/v1/completions", body)[2]["choices"] == expected
        assert server.gauge("llama2_kv_cache_used_ratio") == 0
        assert server.gauge("llama2_running") == 0


JUMPING = """
import itertools, time
real, days = time.time, itertools.cycle((0, 1, -1, 400))
time.time = lambda: real() + 86400 * next(days)
from llama2.cli.main import run
run()
"""


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """By a day, or a year and more, forth and back, between any two looks at it."""
    options = ("--timeout", "5", "--keep-alive", "30", "--drain", "20")
    with serving([write_model(tmp_path)], *options, program=("-c", JUMPING)) as server:
        held = server.open(CHAT, ENDLESS_CHAT)
        server.wait_for("llama2_running", 1, 10)
        for _ in range(5):
            assert server.post(CHAT, chat(max_tokens=5))[0] == 200
        text = server.get("/metrics")[2].decode()
        sums = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if "_seconds_sum{" in line}
        assert len(sums) == 5  # queue, prefill, first token, between tokens, request
        assert all(0 <= value < 120 for value in sums.values()), sums
        server.signal()  # and it still waits for the answer that it has begun
        received = b"".join(iter(lambda: held.recv(65536), b""))
        assert b"data: [DONE]" in received[-40:]
        assert server.process.wait(30) == 0


def test_a_message_of_the_prompt_is_in_no_log(server: Server) -> None:
    server.post(CHAT, chat(messages=[{"role": "user", "content": "a secret that nobody logs"}], secret_field=1))
    server.post(CHAT, chat(messages=[{"role": "user", "content": "another secret [INST]"}]))
    time.sleep(0.2)
    assert any("secret_field" in line for line in server.messages)
    assert not any("nobody logs" in line or "another secret" in line for line in server.messages)


def test_peers_that_are_too_slow(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--timeout", "1") as server:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for beginning in (b"", head, head + b"Content-Length: 100\r\n\r\n{"):
            with socket.create_connection((server.host, server.port), timeout=10) as slow:
                slow.sendall(beginning)
                begun = time.monotonic()
                with contextlib.suppress(ConnectionResetError):
                    assert slow.recv(100) == b""
                assert time.monotonic() - begun > 0.9
        with server.open(CHAT, {**ENDLESS_CHAT, "n": 8, "logprobs": True, "top_logprobs": 20}) as reader:
            reader.recv(10)  # and then it reads no more: what is written for it has a limit
            server.wait_for("llama2_running", 8, 10)
            server.wait_for("llama2_running", 0, 30)
        metrics = server.get("/metrics")[2].decode()
        assert 'llama2_answers_total{finish="cancelled",model="tiny"} 8.0' in metrics
        slow_but_whole = socket.create_connection((server.host, server.port), timeout=10)
        for part in (b"GET /health HTTP/1.1\r\n", b"Host: localhost\r\n", b"\r\n"):
            slow_but_whole.sendall(part)
            time.sleep(0.25)
        assert slow_but_whole.recv(12) == b"HTTP/1.1 200"
        slow_but_whole.close()
