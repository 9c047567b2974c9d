"""Embeddings as programs ask for them: in Python, on the command line, by OpenAI's client, in Ollama's two forms."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

import llama2
from commands import typed
from llama2.api import Model
from llama2.engine.request import Request
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.errors import ContextError, RequestError
from llama2.serve.errors import Refusal
from llama2.serve.metrics import Metrics
from llama2.serve.service import Service
from llama2.serve.settings import ServeSettings
from serving import Server, chat, events, serving, write_model

Floats = NDArray[np.float32]
CHAT = "/v1/chat/completions"
V1, NEW, OLD = "/v1/embeddings", "/api/embed", "/api/embeddings"
TEXTS = ["to be or not", "that is the question " * 5, "a"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tiny(path: Path) -> Iterator[Server]:
    with serving([path]) as server:
        yield server


@pytest.fixture(scope="module")
def numpy_model(path: Path) -> Iterator[Model]:
    """The same model with other arithmetic: what it embeds is expected, within what 16 bits in the cache cost."""
    with llama2.load(path, runner="numpy") as model:
        yield model


def floats(answer: Any) -> Floats:
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


def test_openai_client_in_both_encodings(tiny: Server, numpy_model: Model) -> None:
    """Its own default is base64, which it decodes; floats come as they are. Both are the same numbers."""
    with openai.OpenAI(base_url=tiny.url + "/v1", api_key="none") as client:
        default = client.embeddings.create(model="tiny", input=TEXTS, user="somebody")
        plain = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
        mean = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"pooling": "mean"})
        short = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=3)
    assert (default.object, default.model) == ("list", "tiny")
    assert [(row.object, row.index) for row in default.data] == [("embedding", i) for i in range(3)]
    tokens = sum(len(numpy_model.encode(text)) for text in TEXTS)
    assert (default.usage.prompt_tokens, default.usage.total_tokens) == (tokens, tokens)
    found = np.array([row.embedding for row in default.data], np.float32)
    np.testing.assert_array_equal(found, np.array([row.embedding for row in plain.data], np.float32))
    np.testing.assert_allclose(found, numpy_model.embed(TEXTS), rtol=0, atol=1e-3)
    means = np.array([row.embedding for row in mean.data], np.float32)
    np.testing.assert_allclose(means, numpy_model.embed(TEXTS, pooling="mean"), rtol=0, atol=1e-3)
    first = found[0, :3] / np.linalg.norm(found[0, :3])
    np.testing.assert_allclose(short.data[0].embedding, first, rtol=0, atol=1e-6)


def test_base64_is_little_endian_float32(tiny: Server) -> None:
    rows = tiny.post(V1, {"model": "tiny", "input": "a", "encoding_format": "base64"})[2]["data"]
    data = base64.b64decode(rows[0]["embedding"], validate=True)
    assert len(data) == 4 * 64
    expected = floats(tiny.post(V1, {"model": "tiny", "input": "a"})[2])
    np.testing.assert_array_equal(np.frombuffer(data, "<f4"), expected[0])


def test_tokens_and_lists_of_tokens(tiny: Server, numpy_model: Model) -> None:
    tokens = [numpy_model.encode(text) for text in TEXTS]
    texts = floats(tiny.post(V1, {"model": "tiny", "input": TEXTS})[2])
    np.testing.assert_array_equal(floats(tiny.post(V1, {"model": "tiny", "input": tokens})[2]), texts)
    np.testing.assert_array_equal(floats(tiny.post(V1, {"model": "tiny", "input": tokens[0]})[2]), texts[:1])


def test_ollamas_new_route(tiny: Server) -> None:
    """The shape of its documentation, and OpenAI's numbers."""
    status, _, answer = tiny.post(NEW, {"model": "tiny", "input": TEXTS, "options": {"temperature": 0}})
    assert status == 200
    assert set(answer) == {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
    theirs = tiny.post(V1, {"model": "tiny", "input": TEXTS})[2]
    np.testing.assert_array_equal(np.array(answer["embeddings"], np.float32), floats(theirs))
    assert answer["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]
    one = tiny.post(NEW, {"model": "tiny:latest", "input": TEXTS[0], "dimensions": 3})[2]["embeddings"]
    assert one == tiny.post(NEW, {"model": "tiny", "input": TEXTS, "dimensions": 3})[2]["embeddings"][:1]


def test_ollamas_old_route_does_not_normalise(tiny: Server, numpy_model: Model) -> None:
    status, _, answer = tiny.post(OLD, {"model": "tiny", "prompt": TEXTS[0]})
    assert (status, set(answer)) == (200, {"embedding"})
    expected = numpy_model.embed(TEXTS[:1], normalise=False)[0]
    assert np.linalg.norm(expected) > 2  # of 64 numbers of about 1
    np.testing.assert_allclose(np.array(answer["embedding"], np.float32), expected, rtol=0, atol=1e-2)


def test_nothing_to_embed_loads_the_model_for_ollama(tiny: Server) -> None:
    for body in ({}, {"input": ""}, {"input": []}):
        assert tiny.post(NEW, {"model": "tiny", **body})[2]["embeddings"] == []
    assert tiny.post(OLD, {"model": "tiny"})[2] == {"embedding": []}
    assert tiny.post(OLD, {"model": "tiny", "keep_alive": 0})[2] == {"embedding": []}
    assert tiny.get("/api/ps")[2]["models"] == []
    assert tiny.post(OLD, {"model": "tiny", "prompt": "a"})[0] == 200


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        (V1, {"input": []}, "input: is empty"),
        (V1, {"input": ["a", ""]}, "input 1 is empty"),
        (V1, {"input": [[]]}, "input 0 is empty"),
        (V1, {"input": [[5], [400]]}, "400 is not a token of this model"),
        (V1, {"input": ["a"] * 2049}, "input: .*2048"),
        (V1, {"input": ["a", "b " * 9000]}, "input 1 has 9002 tokens, and the context is 8192"),
        (V1, {"input": "a" * 1_000_000}, "input 0: a prompt of 1000000 bytes is too long"),
        (V1, {"input": ["b " * 8000] * 40}, "input: 320080 tokens in total, and the limit of a request is 300000"),
        (V1, {"input": "a", "dimensions": 65}, "dimensions: 65 is more than the 64"),
        (V1, {"input": "a", "dimensions": 0}, "dimensions: .*greater than or equal to 1"),
        (V1, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        (V1, {"input": "a", "pooling": "cls"}, "pooling"),
        (V1, {"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens: not supported"),
        (NEW, {"input": ["a", ""]}, "input 1 is empty"),
        (NEW, {"input": "b " * 9000}, "input 0 has 9002 tokens"),
        (NEW, {"input": "b " * 9000, "truncate": False}, "input 0 has 9002 tokens"),
    ],
)
def test_refused_before_any_work(tiny: Server, route: str, body: dict[str, Any], message: str) -> None:
    before = tiny.gauge("llama2_embeddings_total"), tiny.gauge("llama2_prompt_tokens_total")
    status, _, answer = tiny.post(route, {"model": "tiny", **body})
    text = answer["error"] if route == NEW else answer["error"]["message"]
    assert status == 400
    assert re.search(message, text), text
    assert (tiny.gauge("llama2_embeddings_total"), tiny.gauge("llama2_prompt_tokens_total")) == before


def test_truncation_is_asked_for(tiny: Server, numpy_model: Model) -> None:
    answer = tiny.post(NEW, {"model": "tiny", "input": "b " * 9000, "truncate": True})[2]
    assert answer["prompt_eval_count"] == 8192
    tokens = numpy_model.encode("b " * 9000)[:8192]
    expected = floats(tiny.post(V1, {"model": "tiny", "input": tokens})[2])
    np.testing.assert_array_equal(np.array(answer["embeddings"], np.float32), expected)


def test_the_same_bytes_beside_streams_which_end_before_a_long_list(tiny: Server) -> None:
    """A list of many pieces; an answer that begins after it ends before it, and neither changes a byte of the other."""
    rng = np.random.default_rng(6)
    inputs = [rng.integers(3, 300, 100).tolist() for _ in range(300)]
    body = {"model": "tiny", "input": inputs, "encoding_format": "base64"}
    alone = tiny.post(CHAT, chat(max_tokens=20, stream=True))[2]
    few = [tiny.post(V1, {**body, "input": [tokens]})[2]["data"][0]["embedding"] for tokens in inputs[::100]]
    done = threading.Event()
    answers: list[Any] = []

    def embed() -> None:
        answers.append(tiny.post(V1, body))
        done.set()

    thread = threading.Thread(target=embed)
    before = tiny.gauge("llama2_embeddings_total")
    thread.start()
    tiny.wait_for_more("llama2_embeddings_total", before, 60)
    beside = tiny.post(CHAT, chat(max_tokens=20, stream=True))[2]
    assert not done.is_set()
    thread.join(120)
    assert text(beside) == text(alone)
    assert [answers[0][2]["data"][i]["embedding"] for i in range(0, 300, 100)] == few


def text(stream: bytes) -> str:
    return "".join(c["delta"].get("content") or "" for e in events(stream)[:-1] for c in e["choices"])


def test_a_client_that_leaves_ends_the_work(path: Path) -> None:
    with serving([path]) as server:
        connection = server.open(V1, {"model": "tiny", "input": [[5 + i % 200] * 500 for i in range(290)]})
        server.wait_for_more("llama2_embeddings_total", 0, 60)
        connection.close()
        assert "status=499" in server.line("route=/v1/embeddings")  # which is written when the request has ended
        server.wait_for("llama2_running", 0, 60)
        embedded = server.gauge("llama2_embeddings_total")
        assert server.post(V1, {"model": "tiny", "input": "a"})[0] == 200
        assert server.gauge("llama2_embeddings_total") == embedded + 1 < 290


def test_a_busy_server_refuses_the_first_piece_alone(path: Path) -> None:
    """What admission lets in, it lets end."""

    async def main() -> None:
        with llama2.load(path, threads=1) as model:
            service = Service("tiny", model, ServeSettings(max_queue=0), Metrics(), 1e6)
            request = Request((5, 6), 0, pooling="last")
            service.admission.running = MAX_SEQUENCES
            with pytest.raises(Refusal, match="429") as refused:
                await service.submit([request])
            assert "Retry-After" in (refused.value.headers or {})
            stream = await service.submit([request], refuse=False)
            (batch,) = [batch async for batch in stream.batches()]
            assert batch[0][1].embedding is not None
            service.stop()

    asyncio.run(main())


def test_the_log_and_the_metrics(tiny: Server) -> None:
    answers, first = tiny.gauge("llama2_answers_total"), tiny.gauge("llama2_time_to_first_token_seconds_count")
    embedded = tiny.gauge("llama2_embeddings_total")
    inputs = ["to be"] * 70  # three pieces
    tokens = tiny.post(V1, {"model": "tiny", "input": inputs})[2]["usage"]["prompt_tokens"]
    tiny.wait_for("llama2_embeddings_total", embedded + 70, 60)
    assert tiny.gauge("llama2_answers_total") == answers
    assert tiny.gauge("llama2_time_to_first_token_seconds_count") == first
    assert "route=/v1/embeddings" in tiny.line(f" prompt_tokens={tokens} completion_tokens=0 ")


def test_python(path: Path) -> None:
    with llama2.load(path, threads=1) as model:
        vectors = model.embed(TEXTS)
        assert (vectors.shape, vectors.dtype) == ((3, 64), np.float32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(model.embed(TEXTS[1]), vectors[1:2])
        np.testing.assert_array_equal(model.embed([model.encode(TEXTS[1])]), vectors[1:2])
        assert model.embed([]).shape == (0, 64)
        refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
            (["a", ""], {}, RequestError, "input 1 is empty"),
            ([[]], {}, RequestError, "input 0 is empty"),
            ([5], {}, RequestError, "must be a list of token ids"),
            (5, {}, RequestError, "inputs=5 must be a list of texts"),
            ([[400]], {}, RequestError, "400 is not a token"),
            (["a"], {"pooling": "max"}, RequestError, "pooling='max' must be last or mean"),
            (["a"], {"normalise": 1}, RequestError, "normalise=1 must be True or False"),
            (["a", "b " * 9000], {}, ContextError, "input 1 has 9002 tokens, and the context is 8192"),
        ]
        for inputs, options, kind, message in refused:
            with pytest.raises(kind, match=message):
                model.embed(inputs, **options)


def test_command_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with llama2.load(path, threads=1) as model:
        expected = model.embed(["one", "two", "three"], pooling="mean")
        last = model.embed(["one"], normalise=False)
    (tmp_path / "lines.txt").write_text("two\n\nthree\n")
    words = ("embed", "-m", path, "--pooling", "mean")
    code, out, _ = typed(capsys, *words, "one", "--file", tmp_path / "lines.txt", "--json")
    record = json.loads(out)
    assert (code, record["model"], record["pooling"], record["normalised"]) == (0, str(path), "mean", True)
    np.testing.assert_array_equal(np.array(record["embeddings"], np.float32), expected)
    code, out, _ = typed(capsys, "embed", "-m", path, "--no-normalise", "one")
    np.testing.assert_array_equal(np.array([out.split()], np.float32), last)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\ntwo\nthree")))
    code, out, _ = typed(capsys, *words)
    np.testing.assert_array_equal(np.array([line.split() for line in out.splitlines()], np.float32), expected)
    code, out, said = typed(capsys, "embed", "-m", path, "")
    assert (code, out) == (1, "")
    assert "llama2: error: input 0 is empty; leave it out" in said
