"""What serve_clients.py tries with each Python client; run by the interpreter of that client's environment.

    python bench/client_probes.py CLIENT URL MODEL

Writes a line of JSON for each feature: its name and `passes`, or the error. Nothing but the standard library and the
client itself is imported.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

#: What a check calls; it raises for whatever is not as it should be.
Check = Callable[[], object]
Probe = Callable[[str, str], dict[str, Check]]

SECONDS = 240  # of a check, at most
QUESTION = "Name the capital of Japan."
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
SAID = "Tokyo"
CITIES = ("Tokyo", "Kyoto")
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": list(CITIES)}},
    "required": ["city"],
    "additionalProperties": False,
}
RESPONSE_FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
SHORT = 40  # tokens of an answer whose text does not matter


def expect(true: object, what: object) -> None:
    """Raises AssertionError, also where assertions are off."""
    if not true:
        raise AssertionError(str(what)[:200])


def capital(text: object) -> None:
    """Raises when a text does not name Japan's capital, which the greedy answer does."""
    expect(SAID in str(text), text)


def city(arguments: str | dict[str, Any] | None) -> None:
    """Raises when a value, or the JSON of one, is not what SCHEMA describes."""
    value = json.loads(arguments or "") if isinstance(arguments, str | None) else arguments
    expect(value["city"] in CITIES, arguments)


def city_model() -> Any:
    """SCHEMA as a pydantic class."""
    from pydantic import create_model

    fields: Any = {"city": (Literal["Tokyo", "Kyoto"], ...)}
    return create_model("City", **fields)


@contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def until_called(attempt: Callable[[int], bool], attempts: int = 30) -> None:
    """For clients that cannot demand a call: tries seeds until `attempt` saw one."""
    expect(any(attempt(seed) for seed in range(attempts)), f"no call in {attempts} answers")


def openai_chat(client: Any, model: str) -> dict[str, Check]:
    """Checks of any client with the methods of openai's."""
    create = client.chat.completions.create

    def stream() -> None:
        parts = list(create(model=model, messages=MESSAGES, temperature=0, stream=True))
        capital("".join(part.choices[0].delta.content or "" for part in parts))

    def tools() -> None:
        options = {"model": model, "tools": [WEATHER], "max_tokens": 100}
        answer = create(**options, messages=MESSAGES, tool_choice=NAMED, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls
        city(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        after = create(**options, messages=[*MESSAGES, answer.choices[0].message, result], tool_choice="none")
        expect(after.choices[0].message.content, after)

    def tools_stream() -> None:
        parts = create(model=model, messages=MESSAGES, tools=[WEATHER], tool_choice=NAMED, stream=True, max_tokens=100)
        calls = [call for part in parts for call in part.choices[0].delta.tool_calls or ()]
        expect(calls[0].function.name == "weather" and calls[0].id, calls)
        city("".join(call.function.arguments or "" for call in calls if call.index == 0))

    def logprobs() -> None:
        answer = create(model=model, messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=2, n=2)
        expect(all(len(choice.logprobs.content[0].top_logprobs) == 2 for choice in answer.choices), answer)

    return {
        "chat": lambda: capital(create(model=model, messages=MESSAGES, temperature=0).choices[0].message.content),
        "stream": stream,
        "completions": lambda: expect(client.completions.create(model=model, prompt="Once", max_tokens=3).choices, ""),
        "logprobs": logprobs,
        "schema": lambda: city(
            create(model=model, messages=MESSAGES, response_format=RESPONSE_FORMAT).choices[0].message.content
        ),
        "tools": tools,
        "tools, stream": tools_stream,
        "embeddings": lambda: expect(client.embeddings.create(model=model, input=["a", "b"]).data[1].embedding, ""),
    }


def openai_python(url: str, model: str) -> dict[str, Check]:
    import openai

    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)

    def responses() -> None:
        capital(client.responses.create(model=model, input=QUESTION, temperature=0).output_text)
        with client.responses.stream(model=model, input=QUESTION, temperature=0) as stream:
            capital(stream.get_final_response().output_text)

    def errors() -> None:
        with raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=MESSAGES)

    return {
        "models": lambda: expect(model in [one.id for one in client.models.list()], "not listed"),
        **openai_chat(client, model),
        "responses": responses,
        "errors": errors,
    }


def openai_azure(url: str, model: str) -> dict[str, Check]:
    import openai

    client = openai.AzureOpenAI(azure_endpoint=url, api_key="none", api_version="2024-10-21", max_retries=0)

    def errors() -> None:
        with raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=MESSAGES)

    return {**openai_chat(client, model), "errors": errors}


def azure_inference(url: str, model: str) -> dict[str, Check]:
    from azure.ai.inference import ChatCompletionsClient, EmbeddingsClient
    from azure.ai.inference.models import JsonSchemaFormat
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import ResourceNotFoundError

    key = AzureKeyCredential("none")
    client = ChatCompletionsClient(endpoint=url, credential=key)

    def tools() -> None:
        choice: Any = client.complete(messages=MESSAGES, tools=[WEATHER], tool_choice=NAMED, max_tokens=100).choices[0]
        (call,) = choice.message.tool_calls
        city(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        after = client.complete(messages=[*MESSAGES, choice.message, result], tools=[WEATHER], max_tokens=SHORT)
        expect(after.choices, after)

    def stream() -> None:
        parts = client.complete(messages=MESSAGES, temperature=0, stream=True)
        capital("".join(part.choices[0].delta.content or "" for part in parts if part.choices))

    def schema() -> None:
        shape = JsonSchemaFormat(name="city", schema=SCHEMA)
        city(client.complete(messages=MESSAGES, response_format=shape).choices[0].message.content)

    def errors() -> None:
        with raises(ResourceNotFoundError):
            client.complete(messages=MESSAGES, model="nobody")

    return {
        "models": lambda: expect(client.get_model_info().model_name == model, client.get_model_info()),
        "chat": lambda: capital(client.complete(messages=MESSAGES, temperature=0).choices[0].message.content),
        "stream": stream,
        "schema": schema,
        "tools": tools,
        "embeddings": lambda: expect(EmbeddingsClient(endpoint=url, credential=key).embed(input=["a"]).data, ""),
        "errors": errors,
    }


def anthropic_python(url: str, model: str) -> dict[str, Check]:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    tool: Any = {"name": "weather", "description": "Weather.", "input_schema": SCHEMA}
    options: Any = {"model": model, "max_tokens": 100}
    greedy: Any = {"messages": MESSAGES, "extra_body": {"temperature": 0}}  # no argument of newer versions
    forced: Any = {"tools": [tool], "tool_choice": {"type": "tool", "name": "weather"}}

    def stream() -> None:
        with client.messages.stream(**options, **greedy) as stream:
            capital("".join(stream.text_stream))
            expect(stream.get_final_message().stop_reason == "end_turn", stream.get_final_message())

    def tools() -> None:
        answer = client.messages.create(**options, **forced, messages=MESSAGES)
        call: Any = answer.content[-1]
        city(call.input)
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]}
        messages: Any = [*MESSAGES, {"role": "assistant", "content": answer.content}, result]
        after = client.messages.create(**options, tools=[tool], tool_choice={"type": "none"}, messages=messages)
        expect(after.content[0].type == "text", after)

    def tools_stream() -> None:
        with client.messages.stream(**options, **forced, messages=MESSAGES) as stream:
            call: Any = stream.get_final_message().content[-1]
        city(call.input)

    def errors() -> None:
        with raises(anthropic.NotFoundError):
            client.messages.create(model="nobody", max_tokens=SHORT, messages=MESSAGES)

    return {
        "models": lambda: expect(model in [one.id for one in client.models.list()], "not listed"),
        "chat": lambda: capital(client.messages.create(**options, **greedy).content),
        "stream": stream,
        "tools": tools,
        "tools, stream": tools_stream,
        "count": lambda: expect(client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens > 5, "few"),
        "errors": errors,
    }


def ollama_python(url: str, model: str) -> dict[str, Check]:
    import ollama

    client: Any = ollama.Client(host=url)

    def stream() -> None:
        parts = list(client.chat(model=model, messages=MESSAGES, options={"temperature": 0}, stream=True))
        capital("".join(part.message.content for part in parts))

    def tools() -> None:
        """It cannot demand a call, so one of two things is left: a call, or a text that the schema allows."""

        def attempt(seed: int) -> bool:
            options = {"seed": seed, "temperature": 2, "num_predict": 100}
            never = {"type": "string", "enum": ["never"]}
            answer = client.chat(model=model, messages=MESSAGES, tools=[WEATHER], format=never, options=options)
            if not answer.message.tool_calls:
                return False
            (call, *_) = answer.message.tool_calls
            city(dict(call.function.arguments))
            message = {**answer.message.model_dump(exclude_none=True), "tool_calls": [call.model_dump()]}
            result = {"role": "tool", "tool_name": "weather", "content": "sun"}
            after = client.chat(model=model, messages=[*MESSAGES, message, result], options={"num_predict": 30})
            expect(after.message.content, after)
            return True

        until_called(attempt)

    def errors() -> None:
        with raises(ollama.ResponseError):
            client.chat(model="nobody", messages=MESSAGES)

    def generate() -> None:
        expect(client.generate(model=model, prompt="Once", options={"num_predict": 3}).response, "nothing")

    return {
        "models": lambda: expect(model in [one.model.split(":")[0] for one in client.list().models], client.list()),
        "chat": lambda: capital(
            client.chat(model=model, messages=MESSAGES, options={"temperature": 0}).message.content
        ),
        "stream": stream,
        "completions": generate,
        "schema": lambda: city(client.chat(model=model, messages=MESSAGES, format=SCHEMA).message.content),
        "tools": tools,
        "embeddings": lambda: expect(client.embed(model=model, input=["a", "b"]).embeddings[1], ""),
        "errors": errors,
    }


def langchain(url: str, model: str) -> dict[str, Check]:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    def chat(**options: Any) -> Any:
        return ChatOpenAI(base_url=url + "/v1", api_key="none", model=model, max_retries=0, **options)

    def tools() -> None:
        bound = chat(max_tokens=100).bind_tools([WEATHER], tool_choice="weather", parallel_tool_calls=False)
        answer = bound.invoke("Weather?")
        (call,) = answer.tool_calls
        city(call["args"])
        result = ToolMessage("sun", tool_call_id=call["id"])
        expect(chat(max_tokens=30).invoke([HumanMessage("Weather?"), answer, result]).content, "nothing")

    def schema() -> None:
        named = {"title": "city", "description": "A city.", **SCHEMA}
        city(chat().with_structured_output(named, method="json_schema").invoke("The capital of Japan?"))

    def embeddings() -> None:
        client = OpenAIEmbeddings(base_url=url + "/v1", api_key="none", model=model, check_embedding_ctx_length=False)
        expect(client.embed_query("a"), "")

    return {
        "chat": lambda: capital(chat(temperature=0).invoke(QUESTION).content),
        "stream": lambda: capital("".join(part.content for part in chat(temperature=0).stream(QUESTION))),
        "responses": lambda: capital(chat(temperature=0, use_responses_api=True).invoke(QUESTION).content),
        "logprobs": lambda: expect(chat(logprobs=True).invoke("Hi").response_metadata["logprobs"], ""),
        "schema": schema,
        "tools": tools,
        "embeddings": embeddings,
    }


def litellm_openai(url: str, model: str) -> dict[str, Check]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    here: Any = {"api_base": url + "/v1", "api_key": "none"}
    create: Any = partial(litellm.completion, f"openai/{model}", messages=MESSAGES, max_retries=0, **here)
    forced: Any = {"tools": [WEATHER], "tool_choice": NAMED, "parallel_tool_calls": False, "max_tokens": 100}
    return {
        "chat": lambda: capital(create(temperature=0).choices[0].message.content),
        "stream": lambda: capital(
            "".join(part.choices[0].delta.content or "" for part in create(temperature=0, stream=True))
        ),
        "completions": lambda: expect(
            litellm.text_completion("Once", f"text-completion-openai/{model}", max_tokens=3, **here).choices, ""
        ),
        "logprobs": lambda: expect(create(logprobs=True, top_logprobs=2).choices[0].logprobs, ""),
        "schema": lambda: city(create(response_format=RESPONSE_FORMAT).choices[0].message.content),
        "tools": lambda: city(create(**forced).choices[0].message.tool_calls[0].function.arguments),
        "embeddings": lambda: expect(litellm.embedding(f"openai/{model}", input=["a"], **here).data, ""),
    }


def litellm_ollama(provider: str, url: str, model: str) -> dict[str, Check]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    create: Any = partial(litellm.completion, f"{provider}/{model}", messages=MESSAGES, api_base=url)

    never = {"type": "json_schema", "json_schema": {"name": "never", "schema": {"type": "string", "enum": ["never"]}}}

    def attempt(seed: int) -> bool:
        options = {"response_format": never, "seed": seed, "temperature": 2, "max_tokens": 100}
        answer = create(tools=[WEATHER], **options).choices[0].message
        if answer.tool_calls:
            city(answer.tool_calls[0].function.arguments)
        return bool(answer.tool_calls)

    def written() -> None:
        """By `ollama/` the library itself writes tools into the prompt, and takes any JSON object for an answer."""
        answer = create(tools=[WEATHER], max_tokens=100).choices[0].message
        expect(answer.tool_calls or answer.content, answer)

    return {
        "chat": lambda: capital(create(temperature=0).choices[0].message.content),
        "stream": lambda: capital(
            "".join(part.choices[0].delta.content or "" for part in create(temperature=0, stream=True))
        ),
        "schema": lambda: city(create(response_format=RESPONSE_FORMAT).choices[0].message.content),
        "tools": written if provider == "ollama" else lambda: until_called(attempt),
        **(
            {"embeddings": lambda: expect(litellm.embedding(f"ollama/{model}", input=["a"], api_base=url).data, "")}
            if provider == "ollama"
            else {}
        ),
    }


def pydantic_ai(url: str, model: str) -> dict[str, Check]:
    from pydantic_ai import Agent, UsageLimitExceeded, UsageLimits
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url + "/v1", api_key="none"))
    City = city_model()

    def agent(**options: Any) -> Any:
        return Agent(chat, model_settings={"temperature": options.pop("temperature", 0), "max_tokens": 100}, **options)

    async def stream() -> None:
        async with agent().run_stream(QUESTION) as answer:
            capital("".join([part async for part in answer.stream_text(delta=True)]))

    def tools() -> None:
        """The library demands a call: of the tool, or of the one that ends the run with its answer."""

        def attempt(seed: int) -> bool:
            called: list[str] = []
            caller = agent(output_type=City, temperature=1)

            def weather(city: Literal["Tokyo", "Kyoto"]) -> str:
                """The weather of a city."""
                called.append(city)
                return "sun"

            caller.tool_plain(weather)
            with suppress(UsageLimitExceeded):
                caller.run_sync("What is the weather in Kyoto?", usage_limits=UsageLimits(request_limit=2))
            return bool(called)

        until_called(attempt, 10)

    return {
        "chat": lambda: capital(agent().run_sync(QUESTION).output),
        "stream": lambda: asyncio.run(stream()),
        "schema": lambda: city(agent(output_type=City).run_sync(QUESTION).output.model_dump()),
        "tools": tools,
    }


def instructor_mode(mode: str, url: str, model: str) -> dict[str, Check]:
    import instructor
    import openai
    import pydantic

    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    create: Any = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create
    held = mode in ("TOOLS", "JSON_SCHEMA")

    def schema() -> None:
        """In JSON and MD_JSON the schema is in the prompt alone, where a small model misses it: any object is taken."""
        kind = city_model() if held else pydantic.create_model("Any", __config__={"extra": "allow"})
        answer = create(model=model, response_model=kind, messages=MESSAGES, max_retries=8, max_tokens=200).model_dump()
        city(answer) if held else expect(isinstance(answer, dict), answer)

    return {"schema": schema}


def smolagents(url: str, model: str) -> dict[str, Check]:
    from smolagents import ActionStep, OpenAIServerModel, ToolCallingAgent

    chat = OpenAIServerModel(model_id=model, api_base=url + "/v1", api_key="none", temperature=0, max_tokens=60)
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]

    def step() -> None:
        """Its call arrives; whether a small model calls too much, which ends the step with an error, is not judged."""
        agent = ToolCallingAgent(tools=[], model=chat, max_steps=1, verbosity_level=0)
        expect(agent.run(QUESTION) is not None, "nothing")
        outputs = [one.model_output_message for one in agent.memory.steps if isinstance(one, ActionStep)]
        expect(outputs[0].tool_calls[0].function.name == "final_answer", outputs)

    return {
        "chat": lambda: capital(chat.generate(messages).content),
        "stream": lambda: capital("".join(part.content or "" for part in chat.generate_stream(messages))),
        "agent": step,
    }


def dspy_predict(url: str, model: str) -> dict[str, Check]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import dspy

    options: Any = {"cache": False, "num_retries": 0, "temperature": 0, "max_tokens": 100}
    lm: Any = dspy.LM(f"openai/{model}", api_base=url + "/v1", api_key="none", **options)
    local: Any = dspy.LM(f"ollama_chat/{model}", api_base=url, api_key="none", **options)

    def predict(lm: Any) -> None:
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
            expect(dspy.Predict("question -> answer")(question=QUESTION).answer, "nothing")

    def both() -> None:
        predict(lm)
        predict(local)

    def chats() -> None:
        capital(lm(QUESTION))
        capital(local(QUESTION))

    return {"chat": chats, "schema": both}


def autogen(url: str, model: str) -> dict[str, Check]:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_agentchat.conditions import MaxMessageTermination
    from autogen_agentchat.teams import RoundRobinGroupChat, SelectorGroupChat
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info: Any = dict.fromkeys(("vision", "function_calling", "json_output", "structured_output"), False)
    info |= {"family": "unknown", "multiple_system_messages": True}
    here: Any = {"model": model, "base_url": url + "/v1", "api_key": "none", "model_info": info, "max_tokens": 20}

    async def group(team: Any, **options: Any) -> None:
        client: Any = OpenAIChatCompletionClient(**here)
        try:
            agents: Any = [
                AssistantAgent(name, client, system_message=f"You are {name}.", description=name)
                for name in ("ann", "bob")
            ]
            chat = team(
                agents, termination_condition=MaxMessageTermination(5), **({"model_client": client} if options else {})
            )
            answer = await chat.run(task="Talk about the weather.")
            expect({one.source for one in answer.messages} >= {"ann", "bob"} or options, answer.messages)
            expect(len(answer.messages) == 5, answer.messages)
        finally:
            await client.close()

    def both() -> None:
        asyncio.run(group(RoundRobinGroupChat))
        asyncio.run(group(SelectorGroupChat, selected=True))

    return {"agent": both}


def llama_index(url: str, model: str) -> dict[str, Check]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding
    from llama_index.llms.openai_like import OpenAILike

    here: Any = {"api_base": url + "/v1", "api_key": "none", "max_retries": 0}

    def chat(**options: Any) -> Any:
        options = {"is_chat_model": True, "temperature": 0, "max_tokens": 60, "context_window": 2048} | options
        return OpenAILike(model=model, **here, **options)

    messages = [ChatMessage(role="user", content=QUESTION)]

    def weather(city: str) -> str:
        """The weather of a city."""
        return "sun"

    def tools() -> None:
        llm = chat(is_function_calling_model=True)
        answer = llm.chat_with_tools(
            [FunctionTool.from_defaults(weather)],
            user_msg=QUESTION,
            tool_required=True,
            allow_parallel_tool_calls=False,
        )
        (call,) = llm.get_tool_calls_from_response(answer)
        expect(call.tool_name == "weather" and "city" in call.tool_kwargs, call)

    def schema() -> None:
        llm = chat(is_function_calling_model=True).as_structured_llm(city_model())
        city(llm.chat(messages).raw.model_dump())

    def embeddings() -> None:
        client = OpenAILikeEmbedding(model_name=model, **here)
        expect(len(client.get_text_embedding_batch(["a", "b"])) == 2, "")

    return {
        "chat": lambda: capital(chat().chat(messages).message.content),
        "stream": lambda: capital("".join(part.delta or "" for part in chat().stream_chat(messages))),
        "completions": lambda: expect(chat(is_chat_model=False).complete("Once").text, "nothing"),
        "schema": schema,
        "tools": tools,
        "embeddings": embeddings,
    }


def llm_program(url: str, model: str) -> dict[str, Check]:
    folder = Path(tempfile.mkdtemp())
    entry = [{"model_id": "here", "model_name": model, "api_base": url + "/v1"}]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(entry))  # JSON is YAML
    program = partial(command, sys.executable, "-m", "llm", LLM_USER_PATH=str(folder), OPENAI_API_KEY="none")
    question = (QUESTION, "-m", "here", "-o", "temperature", "0")
    return {
        "models": lambda: expect("here" in program("models"), "not listed"),
        "chat": lambda: capital(program(*question, "--no-stream")),
        "stream": lambda: capital(program(*question)),
    }


def aider(provider: str, url: str, model: str) -> dict[str, Check]:
    """One message about a scratch repository; its tokens are counted when the answer has ended, whatever the answer."""

    def edit() -> None:
        folder = Path(tempfile.mkdtemp())
        command("git", "init", "-q", str(folder))
        (folder / "add.py").write_text("def add(a, b):\n    return a - b\n")
        name = f"{provider}/{model}"
        settings = [{"name": name, "edit_format": "whole", "extra_params": {"max_tokens": 400, "stop": ["\n\n"]}}]
        (folder / "settings.yml").write_text(json.dumps(settings))
        options = (
            "--model", name, "--message", "Add a comment to add.py.", "--model-settings-file", "settings.yml",
            "--yes-always", "--no-auto-commits", "--no-gitignore", "--no-show-model-warnings", "--no-check-update",
            "--no-show-release-notes", "--no-detect-urls", "--analytics-disable", "--map-tokens", "0", "--no-pretty",
        )  # fmt: skip
        here = {"OPENAI_API_BASE": url + "/v1", "OPENAI_API_KEY": "none", "OLLAMA_API_BASE": url, "HOME": str(folder)}
        said = command(sys.executable, "-m", "aider", *options, "add.py", cwd=folder, **here)
        expect("Tokens:" in said, said[-200:])

    return {"agent": edit}


def lm_eval(url: str, model: str) -> dict[str, Check]:
    folder = Path(tempfile.mkdtemp())
    data = folder / "rows.json"
    rows = (("The capital of Japan is", " Tokyo"), ("Two and two is", " four"))
    data.write_text("\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in rows))
    tasks = {
        "asked": 'output_type: generate_until\ngeneration_kwargs: {max_gen_toks: 8, until: ["\n"]}\n'
        "metric_list: [{metric: exact_match}]\n",
        "scored": "output_type: loglikelihood\nmetric_list: [{metric: perplexity}]\n",
    }
    for task, kind in tasks.items():
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
            f"doc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{answer}}}}'\n{kind}"
        )

    def run(kind: str, route: str, task: str, *more: str) -> None:
        tokenizer = (
            "tokenizer_backend=remote" if task == "scored" else "tokenizer_backend=None,tokenized_requests=False"
        )
        options = f"model={model},base_url={url}/v1/{route},{tokenizer}"
        words = ("--model", kind, "--model_args", options, "--tasks", task, "--include_path", str(folder), *more)
        said = command(
            sys.executable, "-m", "lm_eval", *words, OPENAI_API_KEY="none", HF_HUB_OFFLINE="1", HF_HOME=str(folder)
        )
        expect(f"|{task}" in said, said[-200:])

    return {
        "completions": lambda: run("local-completions", "completions", "asked"),
        "logprobs": lambda: run("local-completions", "completions", "scored"),
        "chat": lambda: run("local-chat-completions", "chat/completions", "asked", "--apply_chat_template"),
    }


def garak(url: str, model: str) -> dict[str, Check]:
    """Its probes of itself: a few prompts, whose answers are all judged."""
    folder = Path(tempfile.mkdtemp())
    options = folder / "options.json"
    options.write_text(json.dumps({"openai": {"OpenAICompatible": {"uri": url + "/v1", "max_tokens": SHORT}}}))

    def run() -> None:
        words = ("--target_type", "openai.OpenAICompatible", "--target_name", model, "--probes", "test.Test,test.Blank")
        homes: Any = {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
        said = command(
            *(sys.executable, "-m", "garak", *words, "--generator_option_file", str(options), "--generations", "2"),
            OPENAICOMPATIBLE_API_KEY="none",
            HF_HUB_OFFLINE="1",
            **homes,
        )
        (report,) = folder.rglob("*.report.jsonl")
        attempts = [json.loads(line) for line in report.read_text().splitlines()]
        answered = [one for one in attempts if one["entry_type"] == "attempt" and any(one["outputs"])]
        expect(answered, said[-200:])

    return {"chat": run}


@contextmanager
def open_webui_page(url: str, model: str) -> Iterator[Any]:
    """Open WebUI with its defaults, both connections to our server, and a new chat with a model in a browser."""
    from playwright.sync_api import sync_playwright

    folder = Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"OPENAI_API_BASE_URL": url + "/v1", "OPENAI_API_KEY": "none", "OLLAMA_BASE_URL": url, "WEBUI_AUTH": "False"}
    offline = {"HF_HUB_OFFLINE": "1", "DATA_DIR": str(folder), "WEBUI_SECRET_KEY": "0" * 32}
    program = Path(sys.executable).with_name("open-webui")
    words = (str(program), "serve", "--host", "127.0.0.1", "--port", str(port))
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, env=os.environ | here | offline, stdout=log, stderr=log)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(SECONDS * 1000)
            until = time.monotonic() + SECONDS
            while True:
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                expect(server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-200:])
                time.sleep(1)
            page.goto(f"http://127.0.0.1:{port}/?models={model}")
            page.wait_for_selector("#chat-input")
            page.wait_for_timeout(3000)
            page.keyboard.press("Escape")  # what is new in this version
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait()


def open_webui(suffix: str, url: str, model: str) -> dict[str, Check]:
    """By its connection to OpenAI's routes or, with `:latest` behind the name, to Ollama's."""
    stop, again = "button[aria-label=Stop]", "button[aria-label=Regenerate]"
    stack = ExitStack()
    page: Any = stack.enter_context(open_webui_page(url, model + suffix))
    atexit.register(stack.close)

    def answers() -> list[str]:
        return [text for text in page.locator("#response-content-container").all_inner_texts() if text.strip()]

    def ask(text: str) -> None:
        page.click("#chat-input")
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        page.wait_for_selector(stop)

    def answered() -> None:
        page.wait_for_selector(again)  # while follow-ups, which are requested after an answer, may go on
        expect(answers(), page.inner_text("#messages-container"))

    def chat() -> None:
        chosen = page.get_attribute("#model-selector-model-button", "aria-label")
        expect(chosen == f"Selected model: {model}{suffix}", chosen)
        ask(QUESTION)
        answered()

    def title() -> None:
        page.wait_for_function("document.title && !document.title.startsWith('New Chat')")

    def regenerate() -> None:
        page.click(again)
        page.get_by_text("Try Again", exact=True).click()
        page.wait_for_function("document.querySelector('#messages-container').innerText.includes('2/2')")
        answered()

    def cancelled() -> str:
        with urllib.request.urlopen(f"http://{url.removeprefix('http://')}/metrics") as response:
            found = re.search(r'llama2_answers_total\{finish="cancelled".*', response.read().decode())
        return found[0] if found else ""

    def stopped() -> None:
        before = cancelled()
        ask("Count from one to five thousand, in words.")
        page.wait_for_function("document.querySelectorAll('#response-content-container')[1]?.innerText.trim()")
        page.click(stop)
        page.wait_for_selector(stop, state="hidden")
        until = time.monotonic() + SECONDS
        while cancelled() == before:
            expect(time.monotonic() < until, "the server goes on answering")
            time.sleep(0.5)

    return {"chat": chat, "title": title, "regenerate": regenerate, "stop": stopped}


def command(*words: str, cwd: Path | None = None, **environment: str) -> str:
    """What a program wrote. Raises RuntimeError with the end of its complaint."""
    done = subprocess.run(
        words,
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(" ".join((done.stderr or done.stdout).split())[-400:])
    return done.stdout


class Client(NamedTuple):
    """The folder of a client's environment, the packages in it, and what is tried."""

    environment: str
    packages: tuple[str, ...]
    probe: Probe


CLIENTS: dict[str, Client] = {
    "openai": Client("openai", ("openai",), openai_python),
    "openai AzureOpenAI": Client("openai", ("openai",), openai_azure),
    "azure-ai-inference": Client("azure-ai-inference", ("azure-ai-inference",), azure_inference),
    "anthropic": Client("anthropic", ("anthropic",), anthropic_python),
    "ollama": Client("ollama", ("ollama",), ollama_python),
    "LangChain": Client("langchain", ("langchain-openai",), langchain),
    "LiteLLM openai/": Client("litellm", ("litellm",), litellm_openai),
    "LiteLLM ollama/": Client("litellm", ("litellm",), partial(litellm_ollama, "ollama")),
    "LiteLLM ollama_chat/": Client("litellm", ("litellm",), partial(litellm_ollama, "ollama_chat")),
    "pydantic-ai": Client("pydantic-ai", ("pydantic-ai-slim[openai]",), pydantic_ai),
    **{
        f"instructor {mode}": Client("instructor", ("instructor",), partial(instructor_mode, mode))
        for mode in ("TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON")
    },
    "smolagents": Client("smolagents", ("smolagents[openai]",), smolagents),
    "dspy": Client("dspy", ("dspy",), dspy_predict),
    "autogen-agentchat": Client("autogen", ("autogen-agentchat", "autogen-ext[openai]"), autogen),
    "llama-index": Client(
        "llama-index",
        ("llama-index-core", "llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
        llama_index,
    ),
    "llm": Client("llm", ("llm",), llm_program),
    "aider openai/": Client("aider", ("aider-chat",), partial(aider, "openai")),
    "aider ollama_chat/": Client("aider", ("aider-chat",), partial(aider, "ollama_chat")),
    "lm-evaluation-harness": Client("lm-eval", ("lm-eval[api]",), lm_eval),
    "garak": Client("garak", ("torch==2.13.0", "garak"), garak),
    **{
        f"Open WebUI {connection}": Client(
            "open-webui", ("torch==2.13.0", "open-webui", "playwright"), partial(open_webui, suffix)
        )
        for connection, suffix in (("openai", ""), ("ollama", ":latest"))
    },
}


def outcome(check: Check) -> str:
    """`passes`, or `FAILS` and the error; a check that takes longer than SECONDS fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        check()
    except BaseException as error:  # some clients raise SystemExit, and groups of errors
        return f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[-400:]}"
    finally:
        signal.alarm(0)
    return "passes"


if __name__ == "__main__":
    for feature, check in CLIENTS[sys.argv[1]].probe(*sys.argv[2:]).items():
        print(json.dumps([feature, outcome(check)]), file=sys.__stdout__, flush=True)
