"""Anthropic's Messages API as its own Python client uses it, and its events as their documentation orders them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from models import tiny_config, write_tiny_gguf
from serving import Server, events, serving
from tool_templates import HERMES

QUESTION: Any = [{"role": "user", "content": "Name the capital of Japan."}]
ANSWER = "The capital of Japan is Tokyo."
CITY: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Wien"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "The weather.", "input_schema": CITY}
ASK: Any = [{"role": "user", "content": "What is the weather in Rom?"}]


@pytest.fixture(scope="module")
def smol(model_path: Path) -> Iterator[Server]:
    with serving([model_path], "--api-key", "secret") as server:
        yield server


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random models, the first with a template that knows tools."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "caller.gguf", config=tiny_config(context_length=4096), tokenizer="bpe", template=HERMES)
    write_tiny_gguf(folder / "other.gguf", config=tiny_config(context_length=96))
    with serving([folder / "caller.gguf", folder / "other.gguf"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(smol: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=smol.url, api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tools(caller: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=caller.url, api_key="none", max_retries=0) as client:
        yield client


def options(client: anthropic.Anthropic, **changes: Any) -> Any:
    model = client.models.list().data[0].id
    return {"model": model, "max_tokens": 30, "messages": QUESTION, "extra_body": {"temperature": 0}, **changes}


def grammatical(stream: list[dict[str, Any]]) -> bool:
    """Whether events come as Anthropic's page on streaming has them, pings aside, the blocks numbered from 0."""
    kinds = [event["type"] for event in stream if event["type"] != "ping"]
    numbers = [event["index"] for event in stream if event["type"].startswith("content_block_")]
    block = "content_block_start (content_block_delta )*content_block_stop "
    whole = re.fullmatch(f"message_start ({block})*message_delta message_stop ", " ".join(kinds) + " ")
    return bool(whole) and [key for key, _ in itertools.groupby(numbers)] == list(range(len(set(numbers))))


def test_a_message_whole_and_streamed(client: anthropic.Anthropic, smol: Server) -> None:
    whole = client.messages.create(**options(client))
    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": ANSWER}]
    assert (whole.type, whole.role, whole.stop_reason, whole.stop_sequence) == (
        "message",
        "assistant",
        "end_turn",
        None,
    )
    usage = whole.usage
    assert (usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens) == (36, 8)  # as OpenAI's

    with client.messages.stream(**options(client)) as stream:
        assert "".join(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("end_turn", None)
    assert final.usage.cache_read_input_tokens == 32  # a block
    assert (final.usage.input_tokens, final.usage.output_tokens) == (4, 8)

    asked = {"model": whole.model, "max_tokens": 30, "messages": QUESTION, "temperature": 0, "stream": True}
    body = smol.post("/v1/messages", asked, **{"x-api-key": "secret"})[2]
    names = [line[7:] for line in body.decode().splitlines() if line.startswith("event: ")]
    said = events(body)
    assert names == [event["type"] for event in said]
    assert grammatical(said)
    for event in said:
        TypeAdapter(RawMessageStreamEvent).validate_python(event)
    start = said[0]["message"]
    assert (start["content"], start["stop_reason"], start["stop_sequence"]) == ([], None, None)
    assert said[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert said[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_what_ends_a_message(client: anthropic.Anthropic, tools: anthropic.Anthropic) -> None:
    stopped = client.messages.create(**options(client, stop_sequences=["Kyoto", " is"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " is")
    empty = client.messages.with_raw_response.create(**options(client, stop_sequences=["", "Kyoto"]))
    assert (empty.parse().stop_reason, "stop_sequences" in empty.headers["warning"]) == ("end_turn", True)
    assert [block.to_dict() for block in stopped.content] == [{"type": "text", "text": "The capital of Japan"}]
    with client.messages.stream(**options(client, stop_sequences=[" is"])) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", " is")
    cut = client.messages.create(**options(client, max_tokens=3))
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 3)

    endless: Any = [{"role": "user", "content": "to be"}]
    drawn = {"seed": 2, "temperature": 1, "top_p": 1}
    full = tools.messages.create(model="other", max_tokens=4000, messages=endless, extra_body=drawn)
    used = full.usage.input_tokens + (full.usage.cache_read_input_tokens or 0) + full.usage.output_tokens
    assert (full.stop_reason, used) == ("model_context_window_exceeded", 96)


def test_a_conversation_in_blocks(client: anthropic.Anthropic) -> None:
    first = client.messages.create(**options(client, system="You are brief."))
    blocks: Any = [{"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}}]
    again = client.messages.create(**options(client, system=blocks, metadata={"user_id": "7"}))
    assert again.content == first.content
    conversation: Any = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]},
        first.to_param(),
        {"role": "user", "content": "And of France?"},
    ]
    assert "Paris" in client.messages.create(**options(client, messages=conversation)).content[0].text  # type: ignore[union-attr]

    begun = client.messages.create(
        **options(client, messages=[*QUESTION, {"role": "assistant", "content": "The capital of"}])
    )
    assert begun.content[0].text == " Japan is Tokyo."  # type: ignore[union-attr]
    thought: Any = {"type": "thinking", "thinking": "Japan?", "signature": "x"}
    conversation[1] = {"role": "assistant", "content": [thought, *first.content]}
    raw = client.messages.with_raw_response.create(**options(client, messages=conversation))
    assert "thinking" in raw.headers["warning"]


def test_tokens_are_counted(client: anthropic.Anthropic, tools: anthropic.Anthropic) -> None:
    model = client.models.list().data[0].id
    assert client.messages.count_tokens(model=model, messages=QUESTION).input_tokens == 36
    counts = []
    for declared in ([], [WEATHER]):
        counted = tools.messages.count_tokens(model="caller", messages=ASK, tools=declared)
        made = tools.messages.create(model="caller", max_tokens=1, messages=ASK, tools=declared).usage
        assert counted.input_tokens == made.input_tokens + (made.cache_read_input_tokens or 0)
        counts.append(counted.input_tokens)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_used(tools: anthropic.Anthropic, choice: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    asked = options(tools, messages=ASK, tools=[WEATHER], tool_choice=choice, max_tokens=300)
    whole = tools.messages.create(**asked)
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    jsonschema.validate(call.input, CITY)
    assert (whole.stop_reason, call.name) == ("tool_use", "weather")
    with tools.messages.stream(**asked) as stream:
        said = [json.loads(event.to_json()) for event in stream if event.type not in ("text", "input_json")]
        final = stream.get_final_message()
    assert grammatical(said)
    (streamed,) = [block for block in final.content if block.type == "tool_use"]
    assert (final.stop_reason, streamed.name, streamed.input) == ("tool_use", "weather", call.input)
    starts = [event["content_block"] for event in said if event["type"] == "content_block_start"]
    assert starts[-1] == {"type": "tool_use", "id": streamed.id, "name": "weather", "input": {}}

    answered: Any = [
        *ASK,
        whole.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]},
    ]
    counts = []
    for content, failed in (("sun", False), ([{"type": "text", "text": "sun"}], False), ("sun", True)):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": content, "is_error": failed}
        answered[-1]["content"] = [{"type": "text", "text": "And now?"}, result]
        counts.append(tools.messages.count_tokens(model="caller", messages=answered, tools=[WEATHER]).input_tokens)
    assert counts[0] == counts[1] < counts[2]  # "Error: "
    assert tools.messages.create(**options(tools, messages=answered, tools=[WEATHER])).role == "assistant"


def test_a_tool_whose_input_is_cut_short(tools: anthropic.Anthropic) -> None:
    asked = options(tools, messages=ASK, tools=[WEATHER], tool_choice={"type": "any"})
    seen = set()
    for limit in range(20, 60, 4):
        whole = tools.messages.create(**{**asked, "max_tokens": limit})
        with tools.messages.stream(**{**asked, "max_tokens": limit}) as stream:
            final = stream.get_final_message()
        assert [block.to_dict() | {"id": ""} for block in whole.content] == [
            block.to_dict() | {"id": ""} for block in final.content
        ]
        seen.add((whole.stop_reason, bool(whole.content)))
    assert ("max_tokens", True) in seen


def test_none_of_the_tools(tools: anthropic.Anthropic) -> None:
    without = tools.messages.count_tokens(model="caller", messages=ASK).input_tokens
    count = tools.messages.count_tokens(
        model="caller", messages=ASK, tools=[WEATHER], tool_choice={"type": "none"}
    ).input_tokens
    assert count == without


def test_an_answer_follows_a_schema(client: anthropic.Anthropic) -> None:
    format: Any = {"format": {"type": "json_schema", "schema": CITY}}
    message = client.messages.create(**options(client, messages=ASK, output_config=format, max_tokens=60))
    jsonschema.validate(json.loads(message.content[0].text), CITY)  # type: ignore[union-attr]


def test_models_are_listed_for_each_client(tools: anthropic.Anthropic, caller: Server) -> None:
    assert [(model.id, model.type) for model in tools.models.list()] == [("caller", "model"), ("other", "model")]
    assert [model.id for model in tools.models.list(limit=1)] == ["caller", "other"]  # page by page
    assert [model.id for model in tools.models.list(before_id="other")] == ["caller"]
    tools.messages.count_tokens(model="other", messages=[{"role": "user", "content": "to be"}])  # loads it
    card = tools.models.retrieve("other")
    assert (card.id, card.display_name, card.max_input_tokens) == ("other", "other", 96)
    with pytest.raises(anthropic.NotFoundError):
        tools.models.retrieve("third")
    assert caller.get("/v1/models")[2]["object"] == "list"


def test_refusals_are_the_clients_classes(client: anthropic.Anthropic, smol: Server) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**options(client, model="claude-opus-4-5"))
    assert (missing.value.type, "claude-opus-4-5" in missing.value.message) == ("not_found_error", True)
    wrong = anthropic.Anthropic(base_url=smol.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as denied:
        wrong.messages.create(model="any", max_tokens=1, messages=QUESTION)
    assert denied.value.body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "the API key is wrong"},
    }
    with pytest.raises(anthropic.BadRequestError) as long:
        client.messages.create(**options(client, messages=[{"role": "user", "content": "word " * 9000}]))
    assert "do not fit the context" in long.value.message


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0.type"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]},
            "messages.0.content.0.name",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}]}
                ]
            },
            "messages.0.content.0.content.0",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "weather"}]}, "tools.0.input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "time"}}, "tool_choice.name"),
        ({"container": "x"}, "container"),
    ],
)
def test_refusals_name_the_field(tools: anthropic.Anthropic, caller: Server, changes: Any, field: str) -> None:
    body = {"model": "caller", "max_tokens": 4, "messages": ASK} | changes
    status, _, answer = caller.post("/v1/messages", {name: value for name, value in body.items() if value is not None})
    assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")
    assert answer["error"]["message"].startswith(f"{field}: ")


def test_what_changes_nothing_is_taken(tools: anthropic.Anthropic) -> None:
    taken: Any = {"thinking": {"type": "disabled"}, "service_tier": "auto", "speed": "standard"}
    raw = tools.messages.with_raw_response.create(**options(tools, **taken))
    assert "warning" not in raw.headers
    ignored: Any = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}, "inference_geo": "eu"}
    raw = tools.messages.with_raw_response.create(**options(tools, **ignored))
    assert all(name in raw.headers["warning"] for name in ("thinking", "output_config.effort", "inference_geo"))
