"""A policy over HTTP: the same verdict on every route, streamed or not, with an end that clients know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

import llama2
from llama2.classify.features import normalise
from serving import ENDLESS, Server, events, serving, write_model

QUESTION = "to be or not"
MESSAGES = [{"role": "user", "content": QUESTION}]
BIAS = {int(token): bias for token, bias in ENDLESS.items()}
TOKENS = 150
WORDS = "I would rather not."


@dataclass(frozen=True)
class Served:
    server: Server
    chat: str  # what the model answers without a policy
    raw: str


def late_word(text: str) -> str:
    """A word of a text that is in it once, after the first windows."""
    found = normalise(text)
    words = [m for m in re.finditer(r"\w{2,}", found) if len(re.findall(rf"(?<!\w){m[0]}(?!\w)", found)) == 1]
    return next(m[0] for m in words if m.start() > len(found) * 0.6)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("moderated")
    path = write_model(folder)
    with llama2.load(path, threads=1) as model:
        options: Any = {"max_tokens": TOKENS, "temperature": 0, "logit_bias": BIAS}
        chat, raw = model.chat(QUESTION, **options).text, model.generate(QUESTION, **options).text
    policy = folder / "policy.toml"
    lines = [f"refusal = {json.dumps(WORDS)}", "[categories.fraud]", 'action = "stop"', 'where = "output"']
    lines.append(f"phrases = {json.dumps([late_word(chat), late_word(raw)])}")
    lines += ["[categories.drugs]", 'action = "refuse"', 'phrases = ["white powder"]', 'where = "input"']
    lines += ["[categories.weapons]", 'action = "stop"', 'phrases = ["sharp knife"]', 'where = "input"']
    lines += ["[categories.spam]", 'action = "warn"', 'phrases = ["buy now"]', 'where = "input"']
    policy.write_text("\n".join(lines))
    with serving([path], "--policy", str(policy)) as server:
        yield Served(server, chat, raw)


def sse(body: bytes) -> list[dict[str, Any]]:
    return [event for event in events(body) if event != "[DONE]"]


@dataclass(frozen=True)
class Route:
    """A route: the body of a request, and what a whole answer and a stream say: text and reason."""

    path: str
    body: Callable[[str], dict[str, Any]]
    whole: Callable[[Any], tuple[str, Any]]
    stream: Callable[[bytes], tuple[str, Any]]
    ends: Any  # the reason of a moderated end
    raw: bool = False


def chat_body(text: str) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "logit_bias": ENDLESS}


def of_lines(body: bytes, text: Callable[[Any], str]) -> tuple[str, Any]:
    lines = [json.loads(line) for line in body.splitlines()]
    return "".join(map(text, lines)), lines[-1]["done_reason"]


OLLAMA = {"num_predict": TOKENS, "temperature": 0, "logit_bias": BIAS, "repeat_penalty": 1.0}
ROUTES = {
    "chat": Route(
        "/v1/chat/completions",
        lambda text: {**chat_body(text), "max_tokens": TOKENS},
        lambda a: (a["choices"][0]["message"]["content"], a["choices"][0]["finish_reason"]),
        lambda b: (
            "".join(e["choices"][0]["delta"].get("content", "") for e in sse(b)),
            sse(b)[-1]["choices"][0]["finish_reason"],
        ),
        "content_filter",
    ),
    "completions": Route(
        "/v1/completions",
        lambda t: {"model": "tiny", "prompt": t, "temperature": 0, "logit_bias": ENDLESS, "max_tokens": TOKENS},
        lambda a: (a["choices"][0]["text"], a["choices"][0]["finish_reason"]),
        lambda b: ("".join(e["choices"][0]["text"] for e in sse(b)), sse(b)[-1]["choices"][0]["finish_reason"]),
        "content_filter",
        raw=True,
    ),
    "responses": Route(
        "/v1/responses",
        lambda t: {"model": "tiny", "input": t, "temperature": 0, "logit_bias": ENDLESS, "max_output_tokens": TOKENS},
        lambda a: (a["output"][0]["content"][0]["text"], (a["status"], a["incomplete_details"])),
        lambda b: (
            "".join(e["delta"] for e in sse(b) if e["type"] == "response.output_text.delta"),
            (sse(b)[-1]["type"].removeprefix("response."), sse(b)[-1]["response"]["incomplete_details"]),
        ),
        ("incomplete", {"reason": "content_filter"}),
    ),
    "llama.cpp": Route(
        "/completion",
        lambda t: {
            **{"prompt": t, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True, "logit_bias": [[0, False]]},
        },
        lambda a: (a["content"], (a["stop"], a["stop_type"], a.get("finish_reason"))),
        lambda b: (
            "".join(e["content"] for e in sse(b)),
            tuple(sse(b)[-1].get(name) for name in ("stop", "stop_type", "finish_reason")),
        ),
        (True, "none", "content_filter"),
        raw=True,
    ),
}


@pytest.mark.parametrize("name", ROUTES)
def test_the_same_verdict_on_every_route_streamed_or_not(served: Served, name: str) -> None:
    """The answer ends before the window with the word. What was sent is the beginning of the unmoderated answer."""
    route = ROUTES[name]
    answer = served.raw if route.raw else served.chat
    status, _, whole = served.server.post(route.path, route.body(QUESTION))
    assert status == 200, whole
    text, reason = route.whole(whole)
    body = served.server.post(route.path, {**route.body(QUESTION), "stream": True})[2]
    assert route.stream(body) == (text, reason)
    assert reason == route.ends
    assert text
    assert answer.startswith(text)
    assert late_word(answer) not in normalise(text).split()
    assert len(answer) - len(text) > 10


def test_anthropics_and_ollamas_ends(served: Served) -> None:
    """Their routes have no bias of logits, so their answers may be others; the prompt is refused on all alike."""
    server, asked = served.server, [{"role": "user", "content": "I sell White  Powder"}]
    anthropic = {"model": "tiny", "messages": asked, "max_tokens": 9}
    status, _, whole = server.post("/v1/messages", anthropic)
    assert (status, whole["content"][0]["text"], whole["stop_reason"]) == (200, WORDS, "refusal")
    found = sse(server.post("/v1/messages", {**anthropic, "stream": True})[2])
    assert "".join(e["delta"].get("text", "") for e in found if e["type"] == "content_block_delta") == WORDS
    assert found[-2]["delta"]["stop_reason"] == "refusal"
    assert found[-1] == {"type": "message_stop"}
    for path, fields, text in (
        ("/api/chat", {"messages": asked}, lambda a: a["message"]["content"]),
        ("/api/generate", {"prompt": asked[0]["content"]}, lambda a: a["response"]),
        ("/api/generate", {"prompt": asked[0]["content"], "raw": True}, lambda a: a["response"]),
    ):
        whole = server.post(path, {"model": "tiny", "stream": False, **fields})[2]
        assert (text(whole), whole["done_reason"]) == (WORDS, "content_filter")
        assert of_lines(server.post(path, {"model": "tiny", **fields})[2], text) == (WORDS, "content_filter")


@pytest.mark.parametrize("name", ROUTES)
def test_a_refused_prompt_never_reaches_the_model(served: Served, name: str) -> None:
    route = ROUTES[name]
    before = served.server.gauge("llama2_prompt_tokens_total")
    whole = served.server.post(route.path, route.body("some white powder, please"))[2]
    assert route.whole(whole) == (WORDS, route.ends)
    body = served.server.post(route.path, {**route.body("some white powder, please"), "stream": True})[2]
    assert route.stream(body) == (WORDS, route.ends)
    status, _, answer = served.server.post(route.path, route.body("a SHARP knife"))
    assert (status, answer["error"]["code"]) == (400, "content_filter")
    assert served.server.gauge("llama2_prompt_tokens_total") == before


def test_earlier_turns_are_judged_and_the_operators_words_are_not(served: Served) -> None:
    turns = [
        {"role": "user", "content": "white powder"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on."},
    ]
    body = {**chat_body(""), "max_tokens": 4}
    whole = served.server.post("/v1/chat/completions", {**body, "messages": turns})[2]
    assert whole["choices"][0]["finish_reason"] == "content_filter"
    system = [{"role": "system", "content": "Say nothing of white powder."}, {"role": "user", "content": QUESTION}]
    whole = served.server.post("/v1/chat/completions", {**body, "messages": system})[2]
    assert whole["choices"][0]["finish_reason"] == "length"


def test_a_warning_is_in_the_response(served: Served) -> None:
    _, headers, whole = served.server.post("/v1/chat/completions", {**chat_body("Buy now!"), "max_tokens": 4})
    assert whole["choices"][0]["finish_reason"] == "length"
    assert "the input is of the category spam" in headers["warning"]
    assert served.server.gauge("llama2_moderated_total") > 0


def test_other_choices_go_on(served: Served) -> None:
    """Of several choices, those that are harmless end by themselves."""
    body = {**chat_body(QUESTION), "max_tokens": 60, "n": 3, "temperature": 1.0, "seed": 4}
    whole = served.server.post("/v1/chat/completions", body)[2]
    assert [choice["finish_reason"] for choice in whole["choices"]].count("length") >= 2


def test_moderations_by_openais_client(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.server.url}/v1", api_key="none")
    found = client.moderations.create(input=["Have a nice day.", "You are a stupid idiot."])
    assert (found.model, [result.flagged for result in found.results]) == ("llama2-classifiers", [False, True])
    assert found.results[1].categories.harassment is True
    assert found.results[1].category_scores.harassment > 0.9
    assert found.results[1].category_scores.violence is None
    one = client.moderations.create(input=[{"type": "text", "text": "You are a"}, {"type": "text", "text": "idiot."}])
    assert len(one.results) == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("", "input: is empty"),
        ([""], "input: is empty"),
        ([], "input"),
        ("a " * 500_000, "input: has 1000000 characters, and the limit is 200000"),
        ([{"type": "image_url", "image_url": {"url": "http://x.test/a.png"}}], "input.0: 'image_url' is not supported"),
        (7, "input"),
    ],
)
def test_a_bad_moderation_request_is_refused_in_one_line(served: Served, given: Any, problem: str) -> None:
    status, _, answer = served.server.post("/v1/moderations", {"input": given})
    assert status == 400
    assert problem in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_a_bad_policy_ends_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from llama2.cli.main import run

    policy = tmp_path / "policy.toml"
    policy.write_text('[categories.fraud]\naction = "stop"\nthreshold = 2')
    with pytest.raises(SystemExit) as ended:
        run(["serve", "-m", "nothing.gguf", "--policy", str(policy)])
    assert ended.value.code == 1
    assert "categories.fraud.threshold" in capfd.readouterr().err
