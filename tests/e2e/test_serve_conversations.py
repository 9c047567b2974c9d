"""What real clients send: taken where it has one meaning, refused by name where it would change the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from folders import Folder
from serving import ENDLESS, Server, chat, events, serving, write_model

CHAT, COMPLETE, RESPOND = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PLACE = {"type": "object", "properties": {"city": {"enum": ["Rom", "Wien"]}}, "required": ["city"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model in Llama 2's own format, which knows two roles in turn."""
    with serving([write_model(tmp_path_factory.mktemp("models"), context_length=512)], "--max-wait", "600") as server:
        yield server


def turns(*texts: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in texts]


def prompt(server: Server, messages: list[dict[str, Any]]) -> str:
    status, _, answer = server.post("/apply-template", {"messages": messages})
    assert status == 200, answer
    text: str = answer["prompt"]
    return text


USER, ANSWER = ("user", "to be or not"), ("assistant", "to be")

TAKEN: dict[str, tuple[list[dict[str, Any]], str, str | None]] = {
    "nothing said": (turns(USER, ("assistant", ""), USER), "[INST] to be or not [/INST]  ", None),
    "lines said": (turns(USER, ("assistant", "\n\n"), USER), "[INST] to be or not [/INST]  ", None),
    "null said": (turns(USER, ("assistant", None), USER), "[INST] to be or not [/INST]  ", None),
    "a list of nothing": (turns(USER, ("assistant", []), USER), "[INST] to be or not [/INST]  ", None),
    "no content": ([*turns(USER), {"role": "assistant"}, *turns(USER)], "[INST] to be or not [/INST]  ", None),
    "two systems": (turns(("system", "A"), ("developer", "B"), USER), "<<SYS>>\nA\n\nB\n<</SYS>>", None),
    "a later system": (
        turns(("system", "A"), USER, ANSWER, ("system", "B"), USER),
        "<<SYS>>\nA\n\nB\n<</SYS>>",
        "system",
    ),
    "two users": (turns(USER, ("user", "that")), "[INST] to be or not\n\nthat [/INST]", "neighbouring user"),
    "two assistants": (turns(USER, ANSWER, ("assistant", "it"), USER), "to be\n\nit", "neighbouring assistant"),
    "a greeting": (turns(("assistant", "Hello"), USER), "[INST]  [/INST] Hello ", "empty user message"),
    "an empty question": (turns(("user", "")), "[INST]  [/INST]", None),
}


@pytest.mark.parametrize("case", TAKEN)
def test_conversations_are_taken_by_every_route(server: Server, case: str) -> None:
    messages, written, warning = TAKEN[case]
    assert written in prompt(server, messages)
    status, headers, answer = server.post(CHAT, chat(messages=messages))
    assert status == 200, answer
    assert (warning in headers["warning"]) if warning else "warning" not in headers
    ollama = [{**message, "role": message["role"].replace("developer", "system")} for message in messages]
    asked = {"model": "tiny", "messages": ollama, "stream": False, "options": {"num_predict": 2}}
    assert server.post("/api/chat", asked)[0] == 200
    if all(isinstance(message.get("content"), str) for message in messages):
        items = [{"type": "message", **message} for message in messages]
        assert server.post(RESPOND, {"model": "tiny", "input": items, "max_output_tokens": 2})[0] == 200


THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAAAAB="}

#: Instructions and items, what they are in Llama 2's format, and what a warning names.
ITEMS: dict[str, tuple[str | None, list[dict[str, Any]], str, str | None]] = {
    "instructions and a developer": (
        "A",
        turns(("developer", [{"type": "input_text", "text": "B"}]), USER),
        "[INST] <<SYS>>\nA\n\nB\n<</SYS>>\n\nto be or not [/INST]",
        None,
    ),
    "instructions and a system": (
        "A",
        turns(("system", "B"), USER),
        "[INST] <<SYS>>\nA\n\nB\n<</SYS>>\n\nto be or not [/INST]",
        None,
    ),
    "a thought": (
        None,
        [*turns(USER), THOUGHT, *turns(ANSWER)],
        "[INST] to be or not [/INST] to be",
        "input.encrypted_content",
    ),
}


@pytest.mark.parametrize("case", ITEMS)
def test_items_of_responses_as_codex_sends_them(server: Server, case: str) -> None:
    instructions, items, written, warning = ITEMS[case]
    options = {"model": "tiny", "temperature": 0, "logit_bias": ENDLESS}
    raw = server.post(COMPLETE, {**options, "prompt": written, "max_tokens": 8})[2]
    asked = {**options, "instructions": instructions, "input": items, "max_output_tokens": 8}
    status, headers, answer = server.post(RESPOND, asked)
    assert status == 200, answer
    assert answer["usage"]["input_tokens"] == raw["usage"]["prompt_tokens"]
    assert answer["output"][0]["content"][0]["text"].lstrip() == raw["choices"][0]["text"].lstrip()
    assert (warning in headers["warning"]) if warning else "warning" not in headers


def test_strict_turns_refuse_what_they_refused(tmp_path: Path) -> None:
    with serving([write_model(tmp_path)], "--turns", "strict") as server:
        for case in ("two users", "two assistants", "a greeting", "nothing said", "an empty question"):
            status, _, answer = server.post(CHAT, chat(messages=TAKEN[case][0]))
            assert (status, answer["error"]["code"]) == (400, "invalid_messages"), case


def test_the_assistants_last_message_is_continued(server: Server) -> None:
    """As if the model had written it: by Llama 2's format, its text stands behind the question."""
    begun = turns(USER, ("assistant", "that is"))
    continued = server.post(CHAT, chat(messages=begun, max_tokens=8))[2]["choices"][0]["message"]["content"]
    raw = {"model": "tiny", "prompt": "[INST] to be or not [/INST] that is", "max_tokens": 8, "temperature": 0}
    assert server.post(COMPLETE, {**raw, "logit_bias": ENDLESS})[2]["choices"][0]["text"] == continued
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    again = server.post(CHAT, chat(messages=begun, max_tokens=8, **flags))
    assert again[2]["choices"][0]["message"]["content"] == continued
    for wrong in ({"continue_final_message": False}, {"add_generation_prompt": True, "continue_final_message": False}):
        status, _, answer = server.post(CHAT, chat(messages=begun, **wrong))
        assert (status, answer["error"]["param"]) == (400, "continue_final_message")
    for wrong in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        status, _, answer = server.post(CHAT, chat(**wrong))
        assert (status, answer["error"]["param"]) == (400, next(iter(wrong)))


IGNORED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"store": True}, "store"),
    (CHAT, {"reasoning_effort": "low", "verbosity": "high"}, "reasoning_effort, verbosity"),
    (CHAT, {"service_tier": "flex"}, "service_tier"),
    (CHAT, {"messages": [{"role": "user", "content": "to be", "name": "Ann"}]}, "messages.name"),
    (CHAT, {"stop": ["", "zzz"]}, "empty stop"),
    (CHAT, {"max_tokens": 100000}, "the prompt leaves no more of the context"),
    (RESPOND, {"truncation": "auto", "store": True}, "store, truncation"),
    (RESPOND, {"include": ["reasoning.encrypted_content"]}, "reasoning.encrypted_content"),
    (RESPOND, {"reasoning": {"effort": "low"}}, "reasoning"),
]


@pytest.mark.parametrize(("route", "fields", "named"), IGNORED)
def test_what_has_no_effect_is_taken_and_named(server: Server, route: str, fields: dict[str, Any], named: str) -> None:
    body = chat(**fields) if route == CHAT else {"model": "tiny", "input": "to be", "max_output_tokens": 2, **fields}
    if "max_tokens" in fields:
        body |= {"logit_bias": {"2": 100}}  # it ends at once
    status, headers, answer = server.post(route, body)
    assert status == 200, answer
    assert named in headers["warning"]


NEUTRAL = [{"stop": [f"z{i}" for i in range(16)]}, {"stop": None}, {"top_k": -1}, {"typical_p": 1.0}, {"store": False}]


@pytest.mark.parametrize("fields", NEUTRAL)
def test_what_asks_for_nothing_is_taken_silently(server: Server, fields: dict[str, Any]) -> None:
    status, headers, answer = server.post(CHAT, chat(**fields))
    assert status == 200, answer
    assert "warning" not in headers
    assert answer["choices"] == server.post(CHAT, chat())[2]["choices"]


def test_minus_one_is_no_limit_and_zero_is_no_token(server: Server) -> None:
    body = chat(max_tokens=-1)
    del body["logit_bias"]
    status, _, answer = server.post(CHAT, {**body, "logit_bias": {"2": 100}})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 1)
    status, _, answer = server.post(CHAT, chat(max_tokens=0))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 0)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("route", [CHAT, COMPLETE])
def test_llama_cpps_name_for_the_limit(server: Server, route: str) -> None:
    """OpenAI's come first."""
    asked = chat(n_predict=3)
    if route == COMPLETE:
        asked["prompt"] = asked.pop("messages")[0]["content"]
    del asked["max_tokens"]
    for fields, limit in (({}, 3), ({"max_tokens": 2}, 2)):
        status, headers, answer = server.post(route, {**asked, **fields})
        assert (status, "warning" in headers) == (200, False)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (limit, "length")


REFUSED = [
    {"typical_p": 0.9},
    {"prompt_logprobs": 1},
    {"stop": [f"z{i}" for i in range(17)]},
    {"json_schema": PLACE, "grammar": "root ::= "},
    {"grammar": "root = 3 ::="},
    {"guided_regex": "(?=a)"},
    {"guided_choice": []},
    {"min_tokens": 3, "json_schema": PLACE},
]


@pytest.mark.parametrize("fields", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(server: Server, fields: dict[str, Any]) -> None:
    status, _, answer = server.post(CHAT, chat(**fields))
    assert status == 400
    assert next(iter(fields)) in (answer["error"]["param"] or answer["error"]["message"])
    assert server.post(CHAT, chat(structured_outputs={"structural_tag": "x"}))[0] == 400


CONSTRAINED: list[dict[str, Any]] = [
    {"json_schema": PLACE},
    {"response_format": {"type": "json_object", "schema": PLACE}},
    {"guided_json": PLACE},
    {"guided_json": json.dumps(PLACE)},
    {"structured_outputs": {"json": PLACE}},
    {"guided_regex": r'\{"city": "(Rom|Wien)"\}'},
    {"guided_choice": ['{"city": "Rom"}', '{"city": "Wien"}']},
    {"structured_outputs": {"choice": ['{"city": "Rom"}', '{"city": "Wien"}']}},
    {"grammar": r"""root ::= "{\"city\": \"" ("Rom" | "Wien") "\"}" """},
    {"structured_outputs": {"grammar": r"""start: "{\"city\": \"" ("Rom" | "Wien") "\"}" """}},
]


@pytest.mark.parametrize("route", [CHAT, COMPLETE])
@pytest.mark.parametrize("fields", CONSTRAINED)
def test_every_ones_names_for_a_form(server: Server, route: str, fields: dict[str, Any]) -> None:
    asked = chat(max_tokens=60, temperature=1, seed=2, **fields)
    if route == COMPLETE:
        asked["prompt"] = asked.pop("messages")[0]["content"]
    del asked["logit_bias"]
    status, _, answer = server.post(route, asked)
    assert status == 200, answer
    choice = answer["choices"][0]
    jsonschema.validate(json.loads(choice["text"] if route == COMPLETE else choice["message"]["content"]), PLACE)
    assert choice["finish_reason"] == "stop"


def test_tokens_that_end_an_answer_and_may_not(server: Server) -> None:
    body = chat(max_tokens=6, return_token_ids=True)
    whole = server.post(CHAT, body)[2]
    tokens = whole["choices"][0]["token_ids"]
    assert len(tokens) == 6
    assert (
        server.post("/detokenize", {"tokens": whole["prompt_token_ids"][1:]})[2]["content"]
        == "[INST] to be or not [/INST]"
    )
    at = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    ended = server.post(CHAT, {**body, "stop_token_ids": [tokens[at]]})[2]["choices"][0]
    assert (ended["token_ids"][:at], ended["finish_reason"]) == (tokens[:at], "stop")
    late = server.post(CHAT, {**body, "stop_token_ids": [tokens[0]], "min_tokens": 4})[2]["choices"][0]
    assert len(late["token_ids"]) >= 4
    ends = {**body, "logit_bias": {"2": 100}}
    assert server.post(CHAT, ends)[2]["usage"]["completion_tokens"] == 1
    assert server.post(CHAT, {**ends, "ignore_eos": True})[2]["usage"]["completion_tokens"] == 6
    streamed = events(server.post(CHAT, {**body, "stream": True})[2])
    assert [id for chunk in streamed[:-1] for id in chunk["choices"][0].get("token_ids", ())] == tokens


def test_defaults_of_the_server(tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": "to be", "max_tokens": 6, "seed": 1}
    with serving([write_model(tmp_path)], "--temperature", "0") as server:
        first, other = (server.post(COMPLETE, {**body, "seed": seed})[2]["choices"] for seed in (1, 2))
        assert first == other == server.post(COMPLETE, {**body, "temperature": 0})[2]["choices"]
        assert server.get("/props")[2]["default_generation_settings"]["params"]["temperature"] == 0
    with serving([write_model(tmp_path)]) as server:
        same = server.post(COMPLETE, {**body, "temperature": 0.6, "top_p": 0.9})[2]["choices"]
        assert server.post(COMPLETE, body)[2]["choices"] == same


def test_defaults_of_a_folder(tmp_path: Path) -> None:
    """Its generation_config.json, without what is out of range; the operator's choice comes first."""
    published = {"temperature": 0.3, "top_p": 1.5, "top_k": 7, "min_p": 0.05, "repetition_penalty": None}
    folder = Folder(files={"generation_config.json": json.dumps(published).encode()}).write(tmp_path / "published")
    with serving([folder], "--temperature", "0.2") as server:
        drawn = server.get("/props")[2]["default_generation_settings"]["params"]
    expected = {"temperature": 0.2, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repeat_penalty": 1.0}
    assert {name: drawn[name] for name in expected} == expected
