"""`llama2 serve` as clients and operators use it."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from llama2.cli.main import run
from serving import ENDLESS, Server, chat, events, serving, write_model

QUESTION = "Name the capital of Japan."
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    with serving([write_model(folder), write_model(folder, "other", context_length=128)]) as server:
        yield server


@pytest.fixture(scope="module")
def smol(model_path: Path) -> Iterator[openai.OpenAI]:
    with serving([model_path]) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        yield client


def test_openai_client_chats(smol: openai.OpenAI) -> None:
    model = smol.models.list().data[0].id
    assert smol.models.retrieve(model).object == "model"
    messages: Any = [{"role": "user", "content": QUESTION}]
    whole = smol.chat.completions.create(
        model=model, messages=messages, temperature=0, logprobs=True, top_logprobs=2, n=2
    )
    for i, choice in enumerate(whole.choices):
        assert (choice.index, choice.finish_reason) == (i, "stop")
        assert choice.message.content == "The capital of Japan is Tokyo."
        assert choice.message.role == "assistant"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        *said, end = choice.logprobs.content
        assert "".join(place.token for place in said) == choice.message.content
        assert b"".join(map(bytes, (place.bytes or [] for place in said))).decode() == choice.message.content
        assert (end.token, end.bytes) == ("<|im_end|>", None)
        for place in choice.logprobs.content:
            assert place.top_logprobs[0].token == place.token  # greedy takes the likeliest
            assert 0 > place.logprob == place.top_logprobs[0].logprob > place.top_logprobs[1].logprob
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (36, 16, 52)

    chunks = list(
        smol.chat.completions.create(
            **{"model": model, "messages": messages, "temperature": 0, "logprobs": True, "n": 2},
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk")
    }
    *parts, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.to_dict() == whole.usage.to_dict() | {"prompt_tokens_details": {"cached_tokens": 32}}  # a block
    assert all(chunk.usage is None for chunk in parts)
    for i in range(2):
        rows = [choice for chunk in parts for choice in chunk.choices if choice.index == i]
        assert rows[0].delta.role == "assistant"
        assert "".join(row.delta.content or "" for row in rows) == "The capital of Japan is Tokyo."
        assert [row.finish_reason for row in rows] == [None] * (len(rows) - 1) + ["stop"]
        assert rows[-1].delta.content is None
        scored = [place for row in rows if row.logprobs for place in row.logprobs.content or ()]
        expected = whole.choices[i].logprobs
        assert expected is not None
        assert [place.logprob for place in scored] == [place.logprob for place in expected.content or ()]


def test_openai_client_completes(smol: openai.OpenAI) -> None:
    model = smol.models.list().data[0].id
    options: Any = {
        "model": model,
        "prompt": "Once upon a",
        "max_tokens": 3,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    whole = smol.completions.create(**options).choices[0]
    scores = whole.logprobs
    assert scores is not None
    assert whole.text == "Once upon a time, the"
    assert scores.tokens == ["Once", " upon", " a", " time", ",", " the"]
    assert scores.text_offset == [0, 4, 9, 11, 16, 17]
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
    for token, score, top in list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True))[1:]:
        assert top[token] == score <= max(top.values())
    parts = [chunk.choices[0] for chunk in smol.completions.create(**options, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert list(itertools.chain(*(getattr(p.logprobs, name) for p in parts if p.logprobs))) == getattr(scores, name)
    assert parts[-1].finish_reason == whole.finish_reason == "length"

    tokens = [[28120, 1980], [253]]
    two = smol.completions.create(model=model, prompt=tokens, max_tokens=2, temperature=0, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text != two.choices[2].text == two.choices[3].text
    assert two.usage is not None
    assert (two.usage.prompt_tokens, two.usage.completion_tokens) == (3, 8)


def test_openai_client_responds(smol: openai.OpenAI) -> None:
    model = smol.models.list().data[0].id
    whole = smol.responses.create(model=model, input=QUESTION, temperature=0)
    assert (whole.output_text, whole.status) == ("The capital of Japan is Tokyo.", "completed")
    assert whole.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == (36, 8, 44)
    assert whole.usage.output_tokens_details.reasoning_tokens == 0
    conversation: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"role": "assistant", "content": whole.output_text},
        {"role": "user", "content": "And of France?"},
    ]
    with smol.responses.stream(model=model, input=conversation, max_output_tokens=5, temperature=0) as stream:
        received = list(stream)
    assert [event.sequence_number for event in received] == list(range(len(received)))
    assert [event.type for event in received if "delta" not in event.type] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = "".join(event.delta for event in received if event.type == "response.output_text.delta")
    last = received[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == deltas != ""
    assert last.response.incomplete_details is not None
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_log_probabilities_of_responses(smol: openai.OpenAI) -> None:
    """Those of the text, as chat completions have them; the token that ends the answer is no text."""
    model = smol.models.list().data[0].id
    options: Any = {"model": model, "temperature": 0, "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    chat: Any = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    scores = smol.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert scores is not None
    expected = [place.to_dict() for place in scores.content or ()][:-1]
    whole: Any = smol.responses.create(input=QUESTION, **options)
    assert [place.to_dict() for place in whole.output[0].content[0].logprobs] == expected
    with smol.responses.stream(input=QUESTION, **options) as stream:
        received: list[Any] = list(stream)
    deltas = [place for event in received if event.type == "response.output_text.delta" for place in event.logprobs]
    (done,) = [event for event in received if event.type == "response.output_text.done"]
    for places in (deltas, done.logprobs, received[-1].response.output[0].content[0].logprobs):
        assert [place.to_dict() for place in places] == expected
    assert smol.responses.create(model=model, input=QUESTION).output[0].content[0].logprobs == []  # type: ignore[union-attr]


def test_the_client_reads_refusals(smol: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not found") as missing:
        smol.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "a"}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\]\.function\.name") as refused:
        smol.chat.completions.create(
            model=smol.models.list().data[0].id,
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f f"}}],
        )
    assert refused.value.param == "tools[0].function.name"


def test_keys_of_answers_are_there_even_when_null(tiny: Server) -> None:
    status, headers, answer = tiny.post(CHAT, chat(frequency_penalty=None, stop=None, user="me"))
    assert (status, headers.get("warning")) == (200, None)
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert set(choice["message"]) == {"role", "content", "refusal"}
    assert (choice["logprobs"], choice["message"]["refusal"]) == (None, None)
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    status, headers, body = tiny.post(CHAT, chat(stream=True, colour="blue"))
    assert headers["content-type"].startswith("text/event-stream")
    assert "colour" in headers["warning"]
    *chunks, done = events(body)
    assert done == "[DONE]"
    for chunk in chunks:
        assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_a_seed_repeats_an_answer_and_stop_strings_cut_it(tiny: Server) -> None:
    drawn = {"temperature": 1.5, "max_tokens": 40}
    texts = [
        tiny.post(CHAT, chat(**drawn, seed=seed))[2]["choices"][0]["message"]["content"]
        for seed in (5, 5, -6, None, None)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    middle = texts[0][5:9]
    cut = tiny.post(CHAT, chat(**drawn, seed=5, stop=["nowhere in it", middle]))[2]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (texts[0][: texts[0].index(middle)], "stop")
    *chunks, _ = events(tiny.post(CHAT, chat(**drawn, seed=5, stop=middle, stream=True))[2])
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == cut["message"]["content"]


def test_equal_prompts_of_a_request_have_seeds_of_their_own_unless_one_is_given(tiny: Server) -> None:
    body = {"model": "tiny", "prompt": ["to be"] * 3, "max_tokens": 12, "temperature": 2, "logit_bias": ENDLESS}
    for seed, answers in ({}, 3), ({"seed": 5}, 1):
        status, _, received = tiny.post("/v1/completions", body | seed)
        assert (status, len({choice["text"] for choice in received["choices"]})) == (200, answers)


def test_models_are_loaded_when_they_are_asked_for(tiny: Server) -> None:
    listed = tiny.get("/v1/models")[2]["data"]
    assert [model["id"] for model in listed] == ["tiny", "other"]
    assert all(set(model) >= {"id", "object", "created", "owned_by"} for model in listed)
    assert tiny.get("/props?model=other")[2]["default_generation_settings"]["n_ctx"] == 128
    first, second = (tiny.post(CHAT, chat(model=name, max_tokens=20))[2] for name in ("tiny", "other:latest"))
    assert first["system_fingerprint"] != second["system_fingerprint"]


def test_what_prompts_begin_alike_with_is_found(tiny: Server) -> None:
    """A hundred tokens are three full blocks of 32, and a rest whose last token runs in any case."""
    body = {"model": "tiny", "prompt": list(range(100, 200)), "max_tokens": 2, "temperature": 0, "n": 2}
    before = tiny.gauge("llama2_cached_prompt_tokens_total")
    usages = [tiny.post("/v1/completions", body)[2]["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 96]
    assert {usage["prompt_tokens"] for usage in usages} == {100}
    assert tiny.gauge("llama2_cached_prompt_tokens_total") == before + 96
    assert tiny.gauge("llama2_kv_cache_kept_ratio") > 0
    assert tiny.gauge("llama2_preemptions") == 0


def test_llamacpp_routes(tiny: Server) -> None:
    assert tiny.get("/health")[2] == {"status": "ok"}
    tokens = tiny.post("/tokenize", {"content": "to be", "add_special": True})[2]["tokens"]
    assert tokens[0] == 1  # BOS
    assert tiny.post("/detokenize", {"tokens": tokens})[2] == {"content": "to be", "prompt": "to be"}
    pieces = tiny.post("/tokenize", {"content": "é", "with_pieces": True})[2]["tokens"]
    assert [piece["piece"] for piece in pieces[-2:]] == [[0xC3], [0xA9]]
    prompt = tiny.post("/apply-template", {"messages": [{"role": "user", "content": "to be"}]})[2]["prompt"]
    assert prompt.replace("<s>", "").strip() == "[INST] to be [/INST]"
    metrics = tiny.get("/metrics")[2].decode()
    for name in ("queue", "prefill", "time_to_first_token", "inter_token", "request"):
        assert f'llama2_{name}_seconds_bucket{{le="+Inf",model="tiny"}}' in metrics
    assert re.search(r'llama2_answers_total\{finish="length",model="tiny"\} \d', metrics)


def test_many_streams_at_once_are_what_they_are_alone(tiny: Server) -> None:
    bodies = [chat(temperature=1, seed=i, max_tokens=30, stream=bool(i % 2)) for i in range(24)]

    def text(body: dict[str, Any]) -> str:
        answer = tiny.post(CHAT, body)[2]
        if not body["stream"]:
            return str(answer["choices"][0]["message"]["content"])
        return "".join(part["choices"][0]["delta"].get("content", "") for part in events(answer)[:-1])

    alone = list(map(text, bodies))
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: text(bodies[i])})) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(24)] == alone
    assert len(set(alone)) == 24


def test_answers_over_http_are_the_same_bytes_under_load(tmp_path: Path) -> None:
    """A smaller run of the benchmark, which asks two servers, so log-probabilities survive a restart as well."""
    script = Path(__file__).parents[2] / "bench" / "same_bytes_http.py"
    words = ["-m", str(write_model(tmp_path)), "--requests", "100", "--threads", "1"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["different"] == []
    assert result["preemptions"] > 0
    assert result["scored_tokens"] > 500
    assert result["different_texts"] > 10


@pytest.mark.parametrize("count", [16, 32])
def test_a_stop_signal_lets_streams_finish(tmp_path: Path, count: int) -> None:
    with serving([write_model(tmp_path)]) as server:
        body = chat(max_tokens=1500, stream=True, stream_options={"include_usage": True})
        streams = [server.open(CHAT, body) for _ in range(count)]
        heads = [stream.recv(16) for stream in streams]
        assert all(head.startswith(b"HTTP/1.1 200") for head in heads)
        server.signal()
        while server.get("/health")[0] == 200:
            time.sleep(0.01)
        status, headers, answer = server.post(CHAT, chat())
        assert (status, answer["error"]["type"]) == (503, "unavailable_error")
        assert int(headers["retry-after"]) > 0
        for stream in streams:
            received = b"".join(iter(lambda stream=stream: stream.recv(65536), b""))
            assert b'"finish_reason":"length"' in received
            assert b'"completion_tokens":1500' in received[-400:]
            assert b"data: [DONE]" in received[-40:]
        assert server.process.wait(10) == 0


def test_streams_that_take_too_long_to_finish_are_told_so(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--drain", "0.2") as server:
        stream = server.open(CHAT, chat(max_tokens=8000, stream=True))
        stream.recv(16)
        server.signal()
        received = b"".join(iter(lambda: stream.recv(65536), b""))
        assert b'"type":"unavailable_error"' in received[-300:]
        assert b"[DONE]" not in received
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)]) as server:
        stream = server.open(CHAT, chat(max_tokens=8000, stream=True))
        stream.recv(16)
        server.signal()
        time.sleep(0.3)
        assert server.process.poll() is None
        server.signal()
        assert server.process.wait(2) == 128 + signal.SIGTERM


def test_a_queue_that_is_full_says_when_to_come_back(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--max-queue", "2") as server:
        endless = chat(max_tokens=900, stream=True)  # 64 of them fit the cache
        running = [server.open(CHAT, {**endless, "n": 32}) for _ in range(2)]
        for stream in running:
            while b'"content":' not in stream.recv(65536):
                pass
        waiting = [server.open(CHAT, endless) for _ in range(2)]
        server.wait_for("llama2_waiting", 2, 10)
        status, headers, answer = server.post(CHAT, chat())
        assert (status, answer["error"]["code"]) == (429, "overloaded")
        assert int(headers["retry-after"]) >= 1
        for stream in (*running, *waiting):
            stream.close()
        server.wait_for("llama2_running", 0, 5)
        assert server.post(CHAT, chat())[0] == 200


def test_more_answers_than_the_cache_holds(tmp_path: Path) -> None:
    """The cache has room for one whole context, 64 blocks, and eight answers grow to 32 blocks each."""
    with serving([write_model(tmp_path, context_length=2048)], "--cache-gb", "0", "--json") as server:
        server.post(CHAT, chat())  # after which it has logged
        loaded = next(json.loads(line) for line in server.messages if '"loaded"' in line)
        assert (loaded["context"], loaded["cache_tokens"]) == (2048, 2048)
        body = chat(max_tokens=1000, temperature=1, seed=1)
        alone = server.post(CHAT, body)[2]["choices"][0]["message"]["content"]
        together = server.post(CHAT, {**body, "n": 8})[2]["choices"]
        assert together[0]["message"]["content"] == alone
        assert len({choice["message"]["content"] for choice in together}) == 8
        assert {choice["finish_reason"] for choice in together} == {"length"}
        assert server.gauge("llama2_preemptions") > 0
        assert server.gauge("llama2_kv_cache_used_ratio") == 0


def test_models_that_nobody_uses_are_let_go(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--keep-alive", "1", "--json") as server:
        before = server.post(CHAT, chat())[2]["choices"]
        maps = Path(f"/proc/{server.process.pid}/maps")
        if maps.exists():
            assert "tiny.gguf" in maps.read_text()
            end = time.monotonic() + 20
            while "tiny.gguf" in maps.read_text():
                assert time.monotonic() < end
                time.sleep(0.1)
        assert server.post(CHAT, chat())[2]["choices"] == before
        time.sleep(0.2)
        lines = [json.loads(line) for line in server.messages if line.startswith("{")]
        received = [(line["route"], line["status"]) for line in lines if line["event"] == "request"]
        assert received == [(CHAT, 200)] * 2
        assert len({line["prompt_tokens"] for line in lines if line["event"] == "request"}) == 1
        loaded = [line for line in lines if line["event"] == "loaded"]
        assert len(loaded) == 2
        assert loaded[0]["model"] == "tiny"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])  # noqa: S104
def test_an_address_that_others_reach_needs_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(["serve", "--host", host, "--port", "0"])
    assert done.value.code == 1
    assert re.fullmatch(
        f"llama2: error: --host {host}: other machines can reach this address; set a key by .*\n",
        capsys.readouterr().err,
    )


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as done:
        run(["serve", "--port", str(taken.getsockname()[1])])
    assert done.value.code == 1
    assert re.fullmatch(r"llama2: error: 127.0.0.1:\d+: Address already in use.*--port\n", capsys.readouterr().err)


def test_a_model_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(SystemExit) as done:
        run(["serve", "-m", str(tmp_path / "bad.gguf"), "--port", "0"])
    assert done.value.code == 1
    assert re.search(r"llama2: error: .*bad\.gguf: ", capsys.readouterr().err)


def test_serving_never_imports_torch() -> None:
    script = "import sys, llama2.cli.commands.serve, llama2.serve.http.server\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    loaded = set(done.stdout.split())
    assert "llama2.serve.http.app" in loaded
    assert not loaded & {"torch", "transformers", "prompt_toolkit", "huggingface_hub", "sentencepiece"}


def test_log_probabilities_that_json_cannot_hold(tiny: Server) -> None:
    """A token that is never sampled has −∞, which becomes −9999."""
    answer = tiny.post(CHAT, chat(logprobs=True, top_logprobs=20, max_tokens=2))[2]
    values = [top["logprob"] for place in answer["choices"][0]["logprobs"]["content"] for top in place["top_logprobs"]]
    assert len(values) == 40
    assert all(math.isfinite(value) for value in values)
