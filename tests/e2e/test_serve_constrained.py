"""JSON and tools over HTTP, as unmodified clients ask for them: what an answer holds is judged by jsonschema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from models import tiny_config, write_tiny_gguf
from serving import Server, serving
from tool_templates import HERMES

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Wien"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
FLAT: Any = {"type": "function", **WEATHER["function"], "strict": True}
ASK: Any = [{"role": "user", "content": "What is the weather in Rom?"}]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model whose template knows tools."""
    path = tmp_path_factory.mktemp("models") / "caller.gguf"
    write_tiny_gguf(path, config=tiny_config(context_length=4096), tokenizer="bpe", template=HERMES)
    with serving([path]) as server:
        yield server


@pytest.fixture(scope="module")
def client(caller: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=caller.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def smol(model_path: Path) -> Iterator[Server]:
    """The default model, whose template knows no tools."""
    with serving([model_path]) as server:
        yield server


def valid(call: Any) -> bool:
    """Whether a call is one of `weather` with arguments that it takes."""
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    return bool(call.function.name == "weather" and call.type == "function" and call.id)


def test_a_schema_is_followed(smol: Server) -> None:
    client = openai.OpenAI(base_url=smol.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    schema: Any = {"name": "city", "schema": CITY, "strict": True}
    options: Any = {"model": model, "temperature": 1, "seed": 3, "max_tokens": 60, "n": 3}
    options["response_format"] = {"type": "json_schema", "json_schema": schema}
    whole = client.chat.completions.create(messages=ASK, **options)
    for choice in whole.choices:
        jsonschema.validate(json.loads(choice.message.content or ""), CITY)
        assert choice.finish_reason == "stop"
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(messages=ASK, stream=True, **options):
        for row in chunk.choices:
            texts[row.index] += row.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]

    options["response_format"] = {"type": "json_object"}
    (choice, *_) = client.chat.completions.create(messages=ASK, **{**options, "max_tokens": 200}).choices
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content or ""), dict)
    assert (choice.message.content or "").lstrip().startswith("{")

    format: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}
    response = client.responses.create(model=model, input="Rom", text=format, max_output_tokens=60)
    jsonschema.validate(json.loads(response.output_text), CITY)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.to_dict() == format["format"]

    completed = client.completions.create(
        model=model,
        prompt="The city as JSON:",
        max_tokens=60,
        extra_body={"response_format": {"type": "json_schema", "json_schema": schema}},
    )
    jsonschema.validate(json.loads(completed.choices[0].text), CITY)


def test_a_schema_is_followed_by_ollamas_routes(smol: Server) -> None:
    model = smol.get("/v1/models")[2]["data"][0]["id"]
    body = {"model": model, "format": CITY, "stream": False, "options": {"num_predict": 60, "seed": 1}}
    jsonschema.validate(json.loads(smol.post("/api/chat", {**body, "messages": ASK})[2]["message"]["content"]), CITY)
    for raw in (False, True):
        answer = smol.post("/api/generate", {**body, "prompt": "Rom", "raw": raw})[2]
        jsonschema.validate(json.loads(answer["response"]), CITY)
    lines = smol.post("/api/chat", {**body, "messages": ASK, "format": "json", "stream": True})[2].decode().splitlines()
    assert "".join(json.loads(line)["message"]["content"] for line in lines).lstrip().startswith("{")
    assert smol.post("/api/chat", {**body, "messages": ASK, "format": "yaml"})[0] == 400


def test_tools_of_a_model_that_knows_none(smol: Server) -> None:
    """They are written as text, and a call that must come is a whole one, streamed or not."""
    client = openai.OpenAI(base_url=smol.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    options: Any = {"model": model, "messages": ASK, "tools": [WEATHER], "tool_choice": "required", "seed": 1}
    options |= {"parallel_tool_calls": False, "max_tokens": 120}
    raw = client.chat.completions.with_raw_response.create(**options)
    assert "the chat template knows no tools" in raw.headers["warning"]
    (choice,) = raw.parse().choices
    assert choice.finish_reason == "tool_calls"
    (call, *_) = choice.message.tool_calls or ()
    assert valid(call)
    arguments = "".join(
        part.function.arguments or ""
        for chunk in client.chat.completions.create(**options, stream=True)
        for part in chunk.choices[0].delta.tool_calls or ()
        if part.index == 0
    )
    assert arguments == call.function.arguments
    followed = [
        *ASK,
        choice.message.model_dump(exclude_none=True),
        *({"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in choice.message.tool_calls or ()),
    ]
    answer = client.chat.completions.create(**{**options, "messages": followed, "tool_choice": "auto", "max_tokens": 4})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > (raw.parse().usage.prompt_tokens if raw.parse().usage else 0)
    response: Any = client.responses.create(
        **{"model": model, "input": "Rom", "tools": [FLAT], "tool_choice": "required"},
        **{"parallel_tool_calls": False, "max_output_tokens": 120},
    )
    assert response.output[0].type == "function_call"
    body = {"model": model, "messages": ASK, "tools": [WEATHER], "stream": False, "options": {"num_predict": 80}}
    assert smol.post("/api/chat", body)[0] == 200


def test_tools_may_be_ignored_or_refused_where_the_template_knows_none(model_path: Path) -> None:
    with serving([model_path], "--tools", "refuse") as server:
        model = server.get("/v1/models")[2]["data"][0]["id"]
        body = {"model": model, "messages": ASK, "tools": [WEATHER], "max_tokens": 4, "temperature": 0}
        status, _, answer = server.post("/v1/chat/completions", body)
        assert (status, answer["error"]["param"]) == (400, "tools")
        assert "knows no tools" in answer["error"]["message"]
        plain = server.post("/v1/chat/completions", {**body, "tools": []})[2]["choices"]
    with serving([model_path], "--tools", "ignore") as server:
        status, headers, answer = server.post("/v1/chat/completions", body)
        assert (status, answer["choices"]) == (200, plain)
        assert "they are ignored" in headers["warning"]


def test_no_tool_is_declared_where_none_may_be_called(smol: Server) -> None:
    client = openai.OpenAI(base_url=smol.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    ignored: Any = client.chat.completions.create(
        model=model, messages=ASK, tools=[WEATHER], tool_choice="none", max_tokens=2
    )
    assert ignored.choices[0].message.tool_calls is None


def test_calls_of_tools(client: openai.OpenAI) -> None:
    options: Any = {"model": "caller", "messages": ASK, "tools": [WEATHER], "tool_choice": NAMED}
    options |= {"temperature": 1, "seed": 5, "n": 2, "parallel_tool_calls": False, "max_tokens": 300}
    whole = client.chat.completions.create(**options)
    assert len(whole.choices) == 2
    for choice in whole.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        assert valid(call)
    with client.chat.completions.stream(**{**options, "n": 1}) as stream:
        final = stream.get_final_completion().choices[0]
    first: Any = whole.choices[0].message.tool_calls
    (streamed,) = final.message.tool_calls or ()
    assert final.finish_reason == "tool_calls"
    assert streamed.function.arguments == first[0].function.arguments
    assert streamed.id != first[0].id

    answered: Any = [
        *ASK,
        whole.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": first[0].id, "content": "sun"},
    ]
    asked = client.chat.completions.create(model="caller", messages=answered, max_tokens=4)
    assert asked.usage is not None
    assert whole.usage is not None
    assert asked.usage.prompt_tokens != whole.usage.prompt_tokens
    answered[-1]["tool_call_id"] = "another"
    with pytest.raises(openai.BadRequestError, match="message 2: no call before it with the id 'another'"):
        client.chat.completions.create(model="caller", messages=answered, max_tokens=4)


def test_calls_in_responses(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    options: Any = {"model": "caller", "tools": [FLAT], "tool_choice": choice, "parallel_tool_calls": False}
    options |= {"temperature": 0, "max_output_tokens": 300}
    whole = client.responses.create(input="Rom?", **options)
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.name, call.status, whole.status) == ("weather", "completed", "completed")
    jsonschema.validate(json.loads(call.arguments), CITY)
    assert (whole.tool_choice.to_dict(), whole.parallel_tool_calls) == (choice, False)  # type: ignore[union-attr]
    with client.responses.stream(input="Rom?", **options) as stream:
        received = list(stream)
    kinds = [event.type for event in received if event.type != "response.function_call_arguments.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in received] == list(range(len(received)))
    deltas = "".join(event.delta for event in received if event.type == "response.function_call_arguments.delta")
    assert deltas == call.arguments
    conversation: Any = [
        {"role": "user", "content": "Rom?"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sun"},
    ]
    after = client.responses.create(model="caller", input=conversation, max_output_tokens=4)
    assert after.output[0].type == "message"
    conversation[2]["call_id"] = "another"
    with pytest.raises(openai.BadRequestError, match="no call before it with the id 'another'"):
        client.responses.create(model="caller", input=conversation, max_output_tokens=4)


def test_calls_in_ollamas_chat(caller: Server) -> None:
    """Its clients cannot demand a call, so a schema that no text can follow leaves nothing else."""
    never = {"type": "string", "pattern": "^never$", "maxLength": 5}
    body = {"model": "caller", "messages": ASK, "tools": [WEATHER], "options": {"seed": 1, "num_predict": 300}}
    received = []
    for seed in range(8):
        body["options"]["seed"] = seed  # type: ignore[index]
        whole = caller.post("/api/chat", {**body, "stream": False, "format": never})[2]["message"]
        lines = caller.post("/api/chat", {**body, "format": never})[2].decode().splitlines()
        parts = [json.loads(line)["message"] for line in lines]
        assert "".join(part["content"] for part in parts) == whole["content"]
        calls = [call for part in parts for call in part.get("tool_calls", ())]
        assert [call["function"] for call in calls] == [call["function"] for call in whole.get("tool_calls", [])]
        assert calls or whole["content"] == '"never"'
        received += calls
    for call in received:
        assert call["function"]["name"] == "weather"
        jsonschema.validate(call["function"]["arguments"], CITY)
    assert received
    turns = [*ASK, {"role": "assistant", "content": "", "tool_calls": received[:1]}, {"role": "tool", "content": "sun"}]
    assert caller.post("/api/chat", {**body, "messages": turns, "stream": False})[0] == 200
    turns[2]["tool_name"] = "weather"
    assert caller.post("/api/chat", {**body, "messages": turns, "stream": False})[0] == 200
    turns[2]["tool_name"] = "clock"
    refused = caller.post("/api/chat", {**body, "messages": turns})
    assert refused[0] == 400
    assert refused[2]["error"] == "message 2: no call before it of 'clock' is without an answer"
    assert "tools" in caller.post("/api/show", {"model": "caller"})[2]["capabilities"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}, "strict": True}}},
            "response_format.json_schema.schema",
        ),
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_what_constrains_badly_is_refused_by_name(caller: Server, fields: dict[str, Any], param: str) -> None:
    status, _, answer = caller.post("/v1/chat/completions", {"model": "caller", "messages": ASK, **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [FLAT, FLAT]}, "tools[1].name"),
        ({"tools": [{**FLAT, "parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [{**FLAT, "parameters": {"type": "object", "not": {}}}]}, "tools[0].parameters"),
        ({"tools": [{**FLAT, "description": 5}]}, "tools[0].description"),
        ({"tools": [WEATHER]}, "tools[0].name"),  # as chat completions declare it
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tools": [FLAT], "tool_choice": NAMED}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_what_responses_refuse_by_name(caller: Server, fields: dict[str, Any], param: str) -> None:
    status, _, answer = caller.post("/v1/responses", {"model": "caller", "input": "Rom?", **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(param)


DAYS = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}
HELD: Any = {"type": "object", "properties": {"days": DAYS}, "required": ["days"]}
UNIQUE = {**HELD, "properties": {"days": {**DAYS, "uniqueItems": True}}}


@pytest.mark.parametrize("strict", [{}, {"strict": False}], ids=["unsaid", "not strict"])
@pytest.mark.parametrize("field", ["tools[0].function.parameters", "response_format.json_schema.schema"])
def test_what_no_grammar_can_hold_is_dropped_with_one_warning_unless_strict(
    caller: Server, field: str, strict: dict[str, bool]
) -> None:
    body = {"model": "caller", "messages": ASK, "seed": 1, "n": 2, "max_tokens": 300}
    if field.startswith("tools"):
        function = {"name": "weather", "parameters": UNIQUE, **strict}
        body |= {"tools": [{"type": "function", "function": function}], "tool_choice": NAMED}
        body |= {"parallel_tool_calls": False}
    else:
        schema = {"name": "days", "schema": UNIQUE, **strict}
        body |= {"response_format": {"type": "json_schema", "json_schema": schema}}
    status, headers, answer = caller.post("/v1/chat/completions", body)
    assert status == 200, answer
    assert headers["warning"] == f'299 llama2 "{field}: no grammar can enforce uniqueItems"'
    for choice in answer["choices"]:
        message = choice["message"]
        text = message["tool_calls"][0]["function"]["arguments"] if "tools" in body else message["content"]
        jsonschema.validate(json.loads(text), HELD)


def test_what_no_grammar_can_hold_of_responses_is_dropped_with_one_warning(caller: Server) -> None:
    format = {"type": "json_schema", "name": "days", "schema": UNIQUE}
    function = {"type": "function", "name": "weather", "parameters": UNIQUE}
    for field, fields in (
        ("text.format.schema", {"text": {"format": format}}),
        ("tools[0].parameters", {"tools": [function], "tool_choice": {"type": "function", "name": "weather"}}),
    ):
        body = {"model": "caller", "input": "Rom?", "seed": 1, "max_output_tokens": 300, **fields}
        status, headers, answer = caller.post("/v1/responses", body)
        assert status == 200, answer
        assert headers["warning"] == f'299 llama2 "{field}: no grammar can enforce uniqueItems"'


def test_a_grammar_that_would_take_for_ever(caller: Server) -> None:
    large = {"enum": [{"a": [i]} for i in range(10_000)]}
    schema = {"type": "json_schema", "json_schema": {"schema": large}}
    body = {"model": "caller", "messages": ASK, "response_format": schema, "max_tokens": 4}
    assert caller.post("/v1/chat/completions", body)[0] == 400
    assert caller.post("/v1/chat/completions", {**body, "response_format": {"type": "text"}})[0] == 200
