"""Ollama's routes as its clients use them: life cycle of models, options, and the shapes of requests and answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gguf
import pytest

from models import tiny_config, write_tiny_gguf
from serving import Server, serving, write_model

GREEDY = {"temperature": 0, "num_predict": 5, "top_k": 0}
ASK = [{"role": "user", "content": "to be or not"}]
FEW: dict[str, Any] = {"model": "tiny", "stream": False, "options": GREEDY}
INFILL = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
LATEST = ["tiny:latest", "Other:latest"]

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    write_model(folder, "Other", context_length=128)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Two models, of which only the first is loaded at the start."""
    with serving([folder / "tiny.gguf", folder / "Other.gguf"]) as server:
        yield server


@pytest.fixture(scope="module")
def chatml(folder: Path) -> Iterator[Server]:
    """A model with a byte-level vocabulary, ChatML's control tokens, and those for filling in."""

    def for_infills(writer: gguf.GGUFWriter) -> None:
        data = writer.kv_data[0]
        data["tokenizer.ggml.tokens"].value[-3:] = INFILL
        data["tokenizer.ggml.token_type"].value[-3:] = [int(gguf.TokenType.CONTROL)] * 3

    path = folder / "chatml.gguf"
    config = tiny_config(context_length=1024)
    write_tiny_gguf(path, config=config, tokenizer="bpe", template=_CHATML, edit=for_infills)
    with serving([path]) as server:
        yield server


def loaded(server: Server) -> dict[str, dict[str, Any]]:
    """What is loaded, by name."""
    return {model["name"]: model for model in server.get("/api/ps")[2]["models"]}


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def lines(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.decode().splitlines()]


def left(model: dict[str, Any]) -> float:
    """Seconds until a model that is loaded would be unloaded."""
    return (datetime.fromisoformat(model["expires_at"]) - datetime.now(UTC)).total_seconds()


def test_models_are_loaded_and_unloaded_by_empty_requests(server: Server) -> None:
    assert set(loaded(server)) == {"tiny:latest"}
    for path, empty, content in (
        ("/api/generate", {}, {"response": ""}),
        ("/api/generate", {"prompt": ""}, {"response": ""}),
        ("/api/chat", {}, {"message": {"role": "assistant", "content": ""}}),
        ("/api/chat", {"messages": []}, {"message": {"role": "assistant", "content": ""}}),
    ):
        for keep, reason, there in ((None, "load", True), (0, "unload", False), ("0s", "unload", False)):
            status, headers, answer = server.post(path, {"model": "Other", **empty, "keep_alive": keep})
            assert (status, headers["content-type"]) == (200, "application/json")
            assert datetime.fromisoformat(answer.pop("created_at")) - datetime.now(UTC) < timedelta(seconds=60)
            assert answer == {"model": "Other", **content, "done": True, "done_reason": reason}
            assert ("Other:latest" in loaded(server)) is there
    assert set(loaded(server)) == {"tiny:latest"}


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        *[(300, 300), (2.5, 2.5), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("90s", 90), ("250ms", 0.25)],
        *[("300", 300), (-1, None), ("-1", None), ("-1m", None), (1e300, None), ("24000000h", None)],
    ],
)
def test_a_model_stays_as_long_as_the_request_says(server: Server, keep_alive: Any, seconds: float | None) -> None:
    """Durations as Go's time.ParseDuration reads them; negative ones are forever, to Ollama's program over 20 years."""
    assert server.post("/api/generate", {"model": "tiny", "keep_alive": keep_alive})[0] == 200
    if seconds is None:
        assert left(loaded(server)["tiny:latest"]) > 20 * 365 * 86400
    elif seconds > 10:
        assert seconds - 10 < left(loaded(server)["tiny:latest"]) <= seconds
    else:
        wait_until(lambda: "tiny:latest" not in loaded(server))


@pytest.mark.parametrize("keep_alive", ["5x", "", "m", "1h 5m", "five", True, [5], {"s": 5}, "1" * 100])
def test_what_is_no_duration_is_refused(server: Server, keep_alive: Any) -> None:
    status, _, answer = server.post("/api/generate", {"model": "tiny", "keep_alive": keep_alive})
    assert status == 400
    assert re.match(r"keep_alive\b.*5m", answer["error"])


def test_requests_win_over_the_operator_until_the_model_is_unloaded(folder: Path) -> None:
    with serving([folder / "tiny.gguf"], "--keep-alive", "3600") as server:
        server.post("/api/generate", {**FEW, "prompt": "to be"})
        assert 3500 < left(loaded(server)["tiny:latest"]) <= 3600
        server.post("/api/generate", {**FEW, "prompt": "to be", "keep_alive": "10m"})
        server.post("/api/chat", {**FEW, "messages": ASK})  # which says nothing
        assert 500 < left(loaded(server)["tiny:latest"]) <= 600
        server.post("/api/generate", {**FEW, "prompt": "to be", "keep_alive": 0})
        wait_until(lambda: not loaded(server))
        server.post("/api/chat", {**FEW, "messages": ASK})
        assert 3500 < left(loaded(server)["tiny:latest"]) <= 3600


def test_a_model_in_use_is_unloaded_when_it_is_not(server: Server) -> None:
    body = {"model": "Other", "prompt": "to be", "options": {**GREEDY, "num_predict": 100}}
    stream = server.open("/api/generate", body)
    said = stream.recv(4096)
    assert said.startswith(b"HTTP/1.1 200")
    assert server.post("/api/generate", {"model": "Other", "keep_alive": 0})[2]["done_reason"] == "unload"
    while b'"done":true' not in said:
        said += stream.recv(65536)
    stream.close()
    assert b'"error"' not in said
    wait_until(lambda: "Other:latest" not in loaded(server))


def test_a_model_in_preparation_is_held(folder: Path) -> None:
    """Preparing the grammar of a large schema takes longer than the model would stay without a request."""
    properties = {f"field{i}": {"type": "string", "pattern": f"[a-z]{{{i + 1},60}}"} for i in range(40)}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    with serving([folder / "tiny.gguf"], "--keep-alive", "0") as server:
        for _ in range(3):
            status, _, answer = server.post("/api/chat", {**FEW, "messages": ASK, "format": schema})
            assert (status, answer.get("done_reason")) == (200, "length"), answer
        wait_until(lambda: not loaded(server))


def test_names_with_and_without_tag_library_and_case(server: Server) -> None:
    for name in ("tiny", "tiny:latest", "TINY", "library/tiny", "registry.ollama.ai/library/Tiny:latest"):
        answer = server.post("/api/generate", {**FEW, "model": name, "prompt": "to be"})
        assert (answer[0], answer[2].get("model")) == (200, name)
    assert server.post("/api/show", {"model": "oTher"})[0] == 200
    for path in ("/api/generate", "/api/chat", "/api/show", "/api/pull"):
        status, _, answer = server.post(path, {"model": "tiny:7b", "prompt": "a", "messages": ASK})
        assert (status, list(answer)) == (404, ["error"])
        assert answer["error"].startswith("model 'tiny:7b' not found")
    for path in ("/api/show", "/api/pull"):
        assert server.post(path, {})[::2] == (400, {"error": "model: is missing"})


def test_lists_say_what_the_files_hold(server: Server, folder: Path) -> None:
    """Sizes and facts are those that the gguf package reads, also of a model that is not loaded."""
    models = {model["name"]: model for model in server.get("/api/tags")[2]["models"]}
    assert list(models) == LATEST
    for name, model in models.items():
        reader = gguf.GGUFReader(folder / f"{name.removesuffix(':latest')}.gguf")
        assert model["size"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
        assert re.fullmatch("[0-9a-f]{64}", model["digest"])
        assert model["details"]["quantization_level"] == "F32"
        assert model["details"]["format"] == "gguf"
        count = sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert model["details"]["parameter_size"] == f"{count / 1e6:.1f}M"
    assert models["tiny:latest"]["digest"] != models["Other:latest"]["digest"]
    server.post("/api/generate", {"model": "tiny", "keep_alive": -1})
    running = loaded(server)["tiny:latest"]
    assert running["digest"] == models["tiny:latest"]["digest"]
    assert running["size"] > models["tiny:latest"]["size"]
    assert running["context_length"] == 8192
    for path in ("/api/tags", "/api/ps", "/api/version", "/"):
        assert server.request("HEAD", path)[::2] == (200, b"")


def test_show_says_what_the_file_says_and_loads_nothing(server: Server, folder: Path) -> None:
    shown = server.post("/api/show", {"name": "Other", "verbose": True})[2]
    assert "Other:latest" not in loaded(server)
    fields = gguf.GGUFReader(folder / "Other.gguf").fields
    info = shown["model_info"]
    for key in ("llama.context_length", "llama.block_count", "llama.attention.head_count_kv", "llama.rope.freq_base"):
        assert info[key] == pytest.approx(fields[key].contents())
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"):
        assert info[key] == fields[key].contents()
    assert shown["capabilities"] == ["completion", "tools"]
    assert "tools" in shown["template"]  # by which LiteLLM knows that it may send some
    assert shown["modelfile"].startswith("FROM Other\n")
    assert re.search(r'^stop +"</s>"$', shown["parameters"])
    assert server.post("/api/show", {"model": "Other"})[2]["model_info"]["tokenizer.ggml.tokens"] == []


def test_pulling_succeeds_for_what_is_there_alone(server: Server) -> None:
    status, headers, body = server.post("/api/pull", {"model": "tiny"})
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    assert lines(body)[-1] == {"status": "success"}
    assert server.post("/api/pull", {"name": "Other", "stream": False})[2] == {"status": "success"}
    status, _, answer = server.post("/api/pull", {"model": "llama3"})
    assert status == 404
    assert "clients cannot download models" in answer["error"]


def test_models_are_not_changed_over_http(server: Server) -> None:
    digest = "sha256:" + "0" * 64
    requests = [("POST", f"/api/{what}") for what in ("create", "copy", "push", f"blobs/{digest}")]
    for method, path in [*requests, ("DELETE", "/api/delete")]:
        status, _, answer = server.request(method, path, {"model": "tiny"})
        assert (status, list(answer)) == (403, ["error"])
        assert answer["error"].startswith("/".join(path.split("/")[:3]) + ": ")
    assert server.request("HEAD", f"/api/blobs/{digest}")[0] == 404
    assert [model["name"] for model in server.get("/api/tags")[2]["models"]] == LATEST


def test_lines_end_with_counts_and_durations(server: Server) -> None:
    for path, asked, read in (
        ("/api/chat", {"messages": ASK}, lambda row: row["message"]["content"]),
        ("/api/generate", {"prompt": ASK[0]["content"]}, lambda row: row["response"]),
    ):
        status, headers, body = server.post(path, {"model": "tiny", "options": GREEDY, **asked})
        assert (status, headers["content-type"]) == (200, "application/x-ndjson")
        *parts, last = lines(body)
        whole = server.post(path, {**FEW, **asked})[2]
        assert "".join(map(read, parts)) == read(whole) != ""
        assert read(last) == ""
        assert {row["done"] for row in parts} == {False}
        for end in (last, whole):
            assert (end["done"], end["done_reason"], end["eval_count"]) == (True, "length", 5)
            spent = end["load_duration"] + end["prompt_eval_duration"] + end["eval_duration"]
            assert end["total_duration"] >= spent > 1000  # nanoseconds
            assert end["prompt_eval_count"] > 5


def test_log_probabilities_are_those_of_openais_route(server: Server) -> None:
    asked = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    expected = server.post("/v1/chat/completions", asked)[2]["choices"][0]["logprobs"]["content"]
    body = {**FEW, "messages": ASK, "logprobs": True, "top_logprobs": 3}
    assert server.post("/api/chat", body)[2]["logprobs"] == expected
    parts = lines(server.post("/api/chat", {**body, "stream": True})[2])
    assert [row for part in parts for row in part.get("logprobs", ())] == expected
    assert server.post("/api/generate", {**FEW, "prompt": ASK[0]["content"], "logprobs": True})[2]["logprobs"]
    warned = server.post("/api/chat", {**FEW, "messages": ASK, "top_logprobs": 3})
    assert "logprobs" not in warned[2]
    assert "top_logprobs" in warned[1]["warning"]


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "raw"])
def test_what_no_grammar_can_hold_of_a_format_is_dropped_with_a_warning(server: Server, path: str) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "not": {"required": ["m"]}}
    raw = {"raw": True} if path == "raw" else {}
    path = "/api/generate" if raw else path
    asked = {"messages": ASK} if path == "/api/chat" else {"prompt": "to be", **raw}
    body = {
        "model": "tiny",
        "stream": False,
        "format": schema,
        "options": {"temperature": 0, "num_predict": 60},
        **asked,
    }
    status, headers, answer = server.post(path, body)
    assert (status, headers["warning"]) == (200, '299 llama2 "format: no grammar can enforce not"')
    assert json.loads(answer.get("response") or answer["message"]["content"]) == {"n": 7}


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"num_ctx": 1 << 20}, ["options.num_ctx"]),
        ({"num_predict": 5, "num_thread": 8, "use_mmap": True, "numa": True}, ["num_thread", "use_mmap", "numa"]),
        ({"num_keep": 5, "num_batch": 2, "num_gpu": -1, "main_gpu": 0, "f16_kv": True}, ["num_keep", "main_gpu"]),
        ({"mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1.0, "typical_p": 1.0, "unheard_of": 3}, ["unheard_of"]),
        ({"repeat_last_n": 64, "penalize_newline": True}, ["penalize_newline"]),
        ({"stop": ["", "never written"]}, ["options.stop"]),
        ({"top_k": -1}, []),
    ],
)
def test_options_that_change_no_answer_are_taken(server: Server, options: dict[str, Any], ignored: list[str]) -> None:
    expected = server.post("/api/chat", {**FEW, "messages": ASK})[2]["message"]
    status, headers, answer = server.post("/api/chat", {**FEW, "messages": ASK, "options": {**GREEDY, **options}})
    assert (status, answer.get("message")) == (200, expected)
    assert all(name in headers["warning"] for name in ignored)


@pytest.mark.parametrize(
    "options", [{"mirostat": 2}, {"tfs_z": 0.5}, {"vocab_only": True}, {"num_predict": -3}, {"temperature": "hot"}]
)
def test_options_that_would_change_the_answer_are_refused_by_name(server: Server, options: dict[str, Any]) -> None:
    status, _, answer = server.post("/api/chat", {**FEW, "messages": ASK, "options": options})
    assert (status, list(answer)) == (400, ["error"])
    assert next(iter(options)) in answer["error"]


def test_answers_may_be_as_long_as_the_context(server: Server) -> None:
    for limit in (-1, -2, 0, 1000, 1 << 40):
        body = {"model": "Other", "prompt": "to be", "stream": False, "options": {**GREEDY, "num_predict": limit}}
        answer = server.post("/api/generate", body)[2]
        if answer["done_reason"] == "length":
            assert answer["prompt_eval_count"] + answer["eval_count"] == 128
        else:
            assert answer["done_reason"] == "stop"


def test_penalties_of_the_last_tokens_change_the_answer(server: Server) -> None:
    """A window of nothing penalises nothing, and one of everything is the same as none given."""

    def text(**options: Any) -> str:
        body = {**FEW, "prompt": "to be or not to be", "options": {**GREEDY, "num_predict": 40, **options}}
        return str(server.post("/api/generate", body)[2]["response"])

    plain, whole = text(), text(repeat_penalty=1.8)
    assert plain != whole
    assert text(repeat_penalty=1.8, presence_penalty=1.0, repeat_last_n=0) == plain
    assert text(repeat_penalty=1.8, repeat_last_n=-1) == whole == text(repeat_penalty=1.8, repeat_last_n=4096)
    assert text(repeat_penalty=1.8, repeat_last_n=2) not in (plain, whole)
    drawn = {"temperature": 2.0, "seed": 5}
    assert text(**drawn) != text(**drawn, typical_p=0.1)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *[("/api/generate", "suffix", "end"), ("/api/generate", "template", "{{ .Prompt }}")],
        *[("/api/generate", "images", ["aGk="]), ("/api/chat", "images", ["aGk="])],
    ],
)
def test_fields_that_a_model_of_language_has_not_are_refused(server: Server, path: str, field: str, value: Any) -> None:
    inside = {"messages": [{**ASK[0], field: value}]} if path == "/api/chat" else {"prompt": "a", field: value}
    status, _, answer = server.post(path, {**FEW, **inside})
    assert (status, list(answer)) == (400, ["error"])
    assert field in answer["error"]
    empty = {name: [{**ASK[0], field: []}] if name == "messages" else "" for name in inside if name != "prompt"}
    if field == "images":
        empty = {"messages": [{**ASK[0], "images": []}]} if path == "/api/chat" else {"images": []}
    assert server.post(path, {**FEW, **inside, **empty})[0] == 200


def test_thinking_is_no_business_of_a_model_that_does_not_think(server: Server) -> None:
    expected = server.post("/api/chat", {**FEW, "messages": ASK})
    for think, warned in ((False, False), (None, False), (True, True), ("high", True)):
        answer = server.post("/api/chat", {**FEW, "messages": ASK, "think": think})
        assert answer[2]["message"] == expected[2]["message"]
        assert ("think" in answer[1].get("warning", "")) is warned


def test_a_raw_prompt_is_what_the_template_writes(chatml: Server) -> None:
    system = {"role": "system", "content": "Be brief."}
    body = {**FEW, "model": "chatml"}
    written = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nto be<|im_end|>\n<|im_start|>assistant\n"
    expected = chatml.post("/api/chat", {**body, "messages": [system, {"role": "user", "content": "to be"}]})[2]
    plain = chatml.post("/api/generate", {**body, "prompt": "to be", "system": "Be brief."})[2]
    raw = chatml.post("/api/generate", {**body, "prompt": written, "raw": True})[2]
    assert raw["response"] == plain["response"] == expected["message"]["content"] != ""
    assert raw["prompt_eval_count"] == plain["prompt_eval_count"] == expected["prompt_eval_count"]
    assert "context" not in raw
    for field, value in (("system", "Be brief."), ("context", [1, 2]), ("suffix", "end")):
        status, _, answer = chatml.post("/api/generate", {**body, "prompt": written, "raw": True, field: value})
        assert (status, answer["error"].startswith(f"{field}: ")) == (400, True)


def test_what_stands_before_a_suffix_is_filled_in(chatml: Server) -> None:
    """The order is prefix, suffix, middle, as of Bavarian et al. (2022)."""
    body = {**FEW, "model": "chatml"}
    filled = chatml.post("/api/generate", {**body, "prompt": "to be", "suffix": "not to be"})[2]
    written = chatml.post("/api/generate", {**body, "prompt": "{}to be{}not to be{}".format(*INFILL), "raw": True})[2]
    assert filled["response"] == written["response"] != ""
    assert filled["prompt_eval_count"] == written["prompt_eval_count"]
    assert "insert" in chatml.post("/api/show", {"model": "chatml"})[2]["capabilities"]
    assert chatml.post("/api/generate", {**body, "prompt": "to be", "suffix": "end", "system": "a"})[0] == 400


def test_a_raw_prompt_is_a_completion(server: Server) -> None:
    raw = server.post("/api/generate", {**FEW, "prompt": "to be", "raw": True})[2]
    completion = {"model": "tiny", "prompt": "to be", "max_tokens": 5, "temperature": 0}
    assert raw["response"] == server.post("/v1/completions", completion)[2]["choices"][0]["text"]


def test_a_context_is_continued(server: Server) -> None:
    """In Llama 2's own format, whose turns each begin with BOS, that is the dialog of the same messages."""
    first = server.post("/api/generate", {**FEW, "prompt": "to be"})[2]
    assert len(first["context"]) == first["prompt_eval_count"] + first["eval_count"]
    second = server.post("/api/generate", {**FEW, "prompt": "or not", "context": first["context"]})[2]
    assert second["context"][: len(first["context"])] == first["context"]
    alone = server.post("/api/generate", {**FEW, "prompt": "or not"})[2]
    assert second["prompt_eval_count"] == len(first["context"]) + alone["prompt_eval_count"]
    status, _, answer = server.post("/api/generate", {**FEW, "prompt": "a", "context": [1 << 20]})
    assert (status, "is not a token" in answer["error"]) == (400, True)


def test_formats_hold_answers(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    options = {"num_predict": 300, "seed": 1}
    for path, asked, read in (
        ("/api/chat", {"messages": ASK}, lambda row: row["message"]["content"]),
        ("/api/generate", {"prompt": "to be"}, lambda row: row["response"]),
    ):
        answer = server.post(path, {**FEW, **asked, "format": schema, "options": options})[2]
        assert json.loads(read(answer)) in ({"n": 1}, {"n": 2})
        answer = server.post(path, {**FEW, **asked, "format": "json", "options": options})[2]
        assert read(answer).lstrip().startswith("{")
        assert server.post(path, {**FEW, **asked, "format": ""})[0] == 200


def test_calls_are_objects_and_may_be_answered(chatml: Server) -> None:
    """A random model calls where the alternative is a text that it hardly begins; the schema leaves one town."""
    town = {"type": "object", "properties": {"town": {"const": "Bern"}}, "required": ["town"]}
    tool = {"function": {"name": "rain", "parameters": {**town, "additionalProperties": False}}}
    body = {"model": "chatml", "messages": ASK, "tools": [tool], "format": {"const": "no"}}
    calls: list[dict[str, Any]] = []
    for seed in range(8):
        rows = lines(chatml.post("/api/chat", {**body, "options": {"num_predict": 80, "seed": seed}})[2])
        called = [call for row in rows for call in row["message"].get("tool_calls", ())]
        said = "".join(row["message"]["content"] for row in rows)
        assert [call["function"]["index"] for call in called] == [*range(len(called))]
        assert called or said == '"no"'
        calls += called
    assert calls
    for call in calls:
        assert (call["function"]["name"], call["function"]["arguments"]) == ("rain", {"town": "Bern"})
    turns = [*ASK, {"role": "assistant", "content": "", "tool_calls": calls[:1]}]
    turns.append({"role": "tool", "content": "yes", "tool_name": "rain"})
    asked = {"model": "chatml", "messages": turns, "tools": [tool], "stream": False, "options": GREEDY}
    assert chatml.post("/api/chat", asked)[0] == 200


def test_every_documented_request_is_answered_or_refused_by_name(server: Server) -> None:
    """As curl sends them, without a Content-Type of JSON; the script says which refusals count."""
    script = Path(__file__).parents[2] / "bench" / "ollama_docs.py"
    done = subprocess.run(
        [sys.executable, str(script), server.url, "tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    rows = {row["request"]: row["verdict"] for row in json.loads(done.stdout)["rows"]}
    refused = {name for name, verdict in rows.items() if verdict == "refuses"}
    assert len(rows) == 40
    assert {name.partition(":")[0] for name in refused} == {
        "generate",
        "chat",
        "create",
        "blob",
        "copy",
        "delete",
        "push",
    }
    assert {name for name in refused if name.startswith(("generate", "chat"))} == {
        *("generate: suffix", "generate: images", "chat: images")
    }
