"""Unmodified clients against a running server: which feature passes, is refused with a reason, or fails.

Run it where the clients are installed (`pip install openai ollama langchain-openai litellm llm 'lm-eval[api]'
transformers`, and `npm install openai` in the folder that `--node` names); what is not there is left out, and the table
says so. It goes to standard output in Markdown, every outcome to a JSON file. Exit code 1 if something fails.

`TOOLS.gguf` is a model whose template knows tools: for instance the default one, with another template.

    gguf-new-metadata MODEL.gguf TOOLS.gguf --chat-template-file TEMPLATE.jinja
    llama2 convert MODEL.gguf FOLDER --to hf --receipt tensors
    llama2 serve -m MODEL.gguf -m TOOLS.gguf --port 8080
    python bench/serve_clients.py -m MODEL --tools-model TOOLS --tokenizer FOLDER --node DIR -o clients.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from provenance import provenance

#: The columns of the table: what a client may be able to do.
FEATURES = (
    "models", "chat", "stream", "completions", "responses", "logprobs", "schema", "tools", "errors", "embeddings",
)  # fmt: skip

#: What a check calls; it raises for whatever is not as it should be.
Check = Callable[[], object]

ASK: Any = [{"role": "user", "content": "Name the capital of Japan."}]
SAID = "Tokyo"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Tokyo", "Kyoto"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def expect(true: object, what: object) -> None:
    """Raises AssertionError, also where assertions are off."""
    if not true:
        raise AssertionError(str(what)[:200])


def city(text: str | None) -> None:
    """Raises when a text is not what SCHEMA describes."""
    expect(json.loads(text or "")["city"] in ("Tokyo", "Kyoto"), text)


def openai_python(url: str, model: str, tools: str) -> dict[str, Check]:
    import openai

    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    create: Any = client.chat.completions.create
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}

    def stream() -> None:
        parts = list(create(model=model, messages=ASK, temperature=0, stream=True))
        expect(SAID in "".join(part.choices[0].delta.content or "" for part in parts), parts)

    def calls() -> None:
        options = {"model": tools or model, "tools": [WEATHER], "max_tokens": 300}
        answer = create(**options, messages=ASK, tool_choice=NAMED, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls
        city(call.function.arguments)
        told = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        after = create(**options, messages=[*ASK, answer.choices[0].message, told], tool_choice="none")
        expect(after.choices[0].message.content, after)

    def responses() -> None:
        said = client.responses.create(model=model, input=ASK[0]["content"], temperature=0).output_text
        expect(SAID in said, said)
        with client.responses.stream(model=model, input=ASK[0]["content"], temperature=0) as stream:
            expect(SAID in stream.get_final_response().output_text, "another")

    def logprobs() -> None:
        answer = create(model=model, messages=ASK, temperature=0, logprobs=True, top_logprobs=2, n=2)
        expect(all(len(choice.logprobs.content[0].top_logprobs) == 2 for choice in answer.choices), answer)

    def errors() -> None:
        try:
            create(model="nobody", messages=ASK)
        except openai.NotFoundError as error:
            expect(error.code == "model_not_found", error)
        else:
            expect(False, "no error")

    return {
        "models": lambda: expect(model in [one.id for one in client.models.list()], "not listed"),
        "chat": lambda: expect(SAID in create(model=model, messages=ASK, temperature=0).choices[0].message.content, ""),
        "stream": stream,
        "completions": lambda: expect(client.completions.create(model=model, prompt="Once", max_tokens=3).choices, ""),
        "responses": responses,
        "logprobs": logprobs,
        "schema": lambda: city(create(model=model, messages=ASK, response_format=schema).choices[0].message.content),
        "tools": calls,
        "errors": errors,
        "embeddings": lambda: client.embeddings.create(model=model, input="a"),
    }


NODE = """
import OpenAI from "openai";
const [url, model, tools, feature] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name the capital of Japan." }];
const parameters = SCHEMA;
const expect = (value, what) => { if (!value) throw new Error(JSON.stringify(what)); };
const city = text => expect(["Tokyo", "Kyoto"].includes(JSON.parse(text).city), text);
const create = options => client.chat.completions.create({ model, messages, ...options });
await ({
    models: async () => expect((await client.models.list()).data.some(one => one.id === model), "not listed"),
    chat: async () => expect((await create({ temperature: 0 })).choices[0].message.content.includes("Tokyo"), "chat"),
    stream: async () => {
        let text = "";
        for await (const part of await create({ temperature: 0, stream: true }))
            text += part.choices[0].delta.content ?? "";
        expect(text.includes("Tokyo"), text);
    },
    completions: async () =>
        expect((await client.completions.create({ model, prompt: "Once", max_tokens: 3 })).choices, 0),
    responses: async () => {
        const answer = await client.responses.create({ model, input: messages[0].content, temperature: 0 });
        expect(answer.output_text.includes("Tokyo"), answer);
    },
    logprobs: async () =>
        expect((await create({ max_tokens: 8, logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content, 0),
    schema: async () => city((await create({
        response_format: { type: "json_schema", json_schema: { name: "city", schema: parameters } },
    })).choices[0].message.content),
    tools: async () => {
        const options = {
            model: tools || model,
            max_tokens: 300,
            tools: [{ type: "function", function: { name: "weather", parameters } }],
        };
        const choice = { type: "function", function: { name: "weather" } };
        const { message } = (await create({ ...options, tool_choice: choice, parallel_tool_calls: false })).choices[0];
        city(message.tool_calls[0].function.arguments);
        const told = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sun" };
        const after = await create({ ...options, messages: [...messages, message, told], tool_choice: "none" });
        expect(after.choices[0].message.content, after);
    },
    errors: async () => {
        const error = await create({ model: "nobody" }).catch(error => error);
        expect(error instanceof OpenAI.NotFoundError && error.code === "model_not_found", error);
    },
    embeddings: async () => client.embeddings.create({ model, input: "a" }),
})[feature]().catch(error => {
    console.error(`${error.constructor.name}: ${error.message}`);
    process.exit(1);
});
"""


def openai_node(url: str, model: str, tools: str, folder: Path) -> dict[str, Check]:
    script = folder / "serve_clients.mjs"
    script.write_text(NODE.replace("SCHEMA", json.dumps(SCHEMA)))

    def check(feature: str) -> Check:
        return lambda: command("node", str(script), url, model, tools, feature)

    return {name: check(name) for name in FEATURES}


def ollama_python(url: str, model: str, tools: str) -> dict[str, Check]:
    import ollama

    client: Any = ollama.Client(host=url)

    def stream() -> None:
        parts = list(client.chat(model=model, messages=ASK, options={"temperature": 0}, stream=True))
        expect(SAID in "".join(part.message.content for part in parts), parts)

    def calls() -> None:
        """It cannot demand a call, so one of two things is left: a call, or a text that the schema allows."""
        never = {"type": "string", "enum": ["never"]}
        for seed in range(50):
            options = {"seed": seed, "temperature": 2, "num_predict": 300}
            answer = client.chat(model=tools or model, messages=ASK, tools=[WEATHER], format=never, options=options)
            if answer.message.tool_calls:
                (call, *_) = answer.message.tool_calls
                expect(call.function.arguments["city"] in ("Tokyo", "Kyoto"), call)
                break
        else:
            expect(False, "no call in 50 answers")
        message = {**answer.message.model_dump(exclude_none=True), "tool_calls": [call.model_dump()]}
        told = {"role": "tool", "tool_name": "weather", "content": "sun"}
        after = client.chat(model=tools or model, messages=[*ASK, message, told], options={"num_predict": 30})
        expect(after.message.content, after)

    def errors() -> None:
        try:
            client.chat(model="nobody", messages=ASK)
        except ollama.ResponseError as error:
            expect(error.status_code == 404, error)
        else:
            expect(False, "no error")

    def generate() -> None:
        expect(client.generate(model=model, prompt="Once", options={"num_predict": 3}).response, "nothing")

    def chat() -> None:
        expect(SAID in client.chat(model=model, messages=ASK, options={"temperature": 0}).message.content, "another")

    return {
        "models": lambda: expect(model in [one.model for one in client.list().models], "not listed"),
        "chat": chat,
        "stream": stream,
        "completions": generate,
        "schema": lambda: city(client.chat(model=model, messages=ASK, format=SCHEMA).message.content),
        "tools": calls,
        "errors": errors,
        "embeddings": lambda: client.embed(model=model, input="a"),
    }


def langchain(url: str, model: str, tools: str) -> dict[str, Check]:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    def chat(name: str = model, **options: Any) -> Any:
        return ChatOpenAI(base_url=url + "/v1", api_key="none", model=name, max_retries=0, **options)

    def calls() -> None:
        bound = chat(tools or model, max_tokens=300).bind_tools(
            [WEATHER], tool_choice="weather", parallel_tool_calls=False
        )
        answer = bound.invoke("Weather?")
        (call,) = answer.tool_calls
        expect(call["args"]["city"] in ("Tokyo", "Kyoto"), call)
        told = ToolMessage("sun", tool_call_id=call["id"])
        expect(chat(tools or model, max_tokens=30).invoke([HumanMessage("Weather?"), answer, told]).content, "nothing")

    def schema() -> None:
        named = {"title": "city", "description": "A city.", **SCHEMA}
        answer = chat().with_structured_output(named, method="json_schema").invoke("The capital of Japan?")
        expect(answer["city"] in ("Tokyo", "Kyoto"), answer)

    return {
        "chat": lambda: expect(SAID in chat(temperature=0).invoke(ASK[0]["content"]).content, ""),
        "stream": lambda: expect(
            SAID in "".join(part.content for part in chat(temperature=0).stream(ASK[0]["content"])), ""
        ),
        "responses": lambda: expect(
            SAID in str(chat(temperature=0, use_responses_api=True).invoke(ASK[0]["content"]).content), ""
        ),
        "logprobs": lambda: expect(chat(logprobs=True).invoke("Hi").response_metadata["logprobs"], ""),
        "schema": schema,
        "tools": calls,
    }


def lite(url: str, model: str, tools: str) -> dict[str, Check]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    def ask(name: str = model, **options: Any) -> Any:
        return litellm.completion(
            f"openai/{name}", messages=ASK, api_base=url + "/v1", api_key="none", max_retries=0, **options
        )

    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    called = {"tools": [WEATHER], "tool_choice": NAMED, "parallel_tool_calls": False, "max_tokens": 300}
    return {
        "chat": lambda: expect(SAID in ask(temperature=0).choices[0].message.content, ""),
        "stream": lambda: expect(
            SAID in "".join(part.choices[0].delta.content or "" for part in ask(temperature=0, stream=True)), ""
        ),
        "completions": lambda: expect(
            litellm.text_completion(
                "Once", f"text-completion-openai/{model}", api_base=url + "/v1", api_key="none", max_tokens=3
            ).choices,
            "",
        ),
        "logprobs": lambda: expect(ask(logprobs=True, top_logprobs=2).choices[0].logprobs, ""),
        "schema": lambda: city(ask(response_format=schema).choices[0].message.content),
        "tools": lambda: city(ask(tools or model, **called).choices[0].message.tool_calls[0].function.arguments),
    }


def llm_program(url: str, model: str, folder: Path) -> dict[str, Check]:
    import llm  # noqa: F401  # that it is here

    entry = [{"model_id": "here", "model_name": model, "api_base": url + "/v1"}]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(entry))  # JSON is YAML
    environment = {"LLM_USER_PATH": str(folder), "OPENAI_API_KEY": "none"}

    def said(*options: str) -> str:
        words = (ASK[0]["content"], "-m", "here", "-o", "temperature", "0", *options)
        return command(sys.executable, "-m", "llm", *words, **environment)

    return {
        "models": lambda: expect("here" in command(sys.executable, "-m", "llm", "models", **environment), "not listed"),
        "chat": lambda: expect(SAID in said("--no-stream"), ""),
        "stream": lambda: expect(SAID in said(), ""),
    }


def lm_eval(url: str, model: str, folder: Path, tokenizer: Path | None) -> dict[str, Check]:
    import lm_eval as harness  # noqa: F401  # that it is here

    rows = [
        {"question": "The capital of Japan is", "answer": " Tokyo"},
        {"question": "Two and two is", "answer": " four"},
    ]
    data = folder / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    loaded = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
    told = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    metric = "metric_list: [{metric: %s}]\n"
    (folder / "scored.yaml").write_text(
        f"task: scored\n{loaded}output_type: loglikelihood\n{told}{metric % 'perplexity'}"
    )
    generated = "generation_kwargs: {max_gen_toks: 8, until: ['\\n']}\n"
    (folder / "asked.yaml").write_text(
        f"task: asked\n{loaded}output_type: generate_until\n{told}{generated}{metric % 'exact_match'}"
    )

    def run(kind: str, route: str, task: str, *more: str) -> None:
        options = f"model={model},base_url={url}/v1/{route},tokenized_requests=False,tokenizer_backend="
        options += f"huggingface,tokenizer={tokenizer}" if task == "scored" else "None"
        words = ("--model", kind, "--model_args", options, "--tasks", task, "--include_path", str(folder), *more)
        command(sys.executable, "-m", "lm_eval", *words, OPENAI_API_KEY="none", HF_HUB_OFFLINE="1", HF_HOME=str(folder))

    return {
        "completions": lambda: run("local-completions", "completions", "asked"),
        **({"logprobs": lambda: run("local-completions", "completions", "scored")} if tokenizer else {}),
        "chat": lambda: run("local-chat-completions", "chat/completions", "asked", "--apply_chat_template"),
    }


def command(*words: str, **environment: str) -> str:
    """What a program wrote. Raises RuntimeError with the end of its complaint."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False)
    if done.returncode:
        raise RuntimeError(" ".join((done.stderr or done.stdout).split())[-400:])
    return done.stdout


def outcome(check: Check) -> str:
    """`passes`, or why not; a refusal that names its reason is one that is documented."""
    try:
        check()
    except Exception as error:
        text = " ".join(str(error).split())
        refused = any(word in text for word in ("knows no tools", "not supported", "Not Found", "404"))
        return f"{'refused' if refused else 'FAILS'}: {type(error).__name__}: {text[-300:]}"
    return "passes"


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def node_version(folder: Path) -> str:
    """Version of the package `openai` in node_modules."""
    return str(json.loads((folder / "node_modules/openai/package.json").read_text())["version"])


def table(results: dict[str, dict[str, str]]) -> str:
    """Clients by features in Markdown; what was refused or failed is told below."""
    lines = ["| client | version | " + " | ".join(FEATURES) + " |", "| --- " * (len(FEATURES) + 2) + "|"]
    notes: list[str] = []
    for client, told in results.items():
        cells = []
        for feature in FEATURES:
            outcome = told.get(feature, "–")
            if outcome not in ("passes", "–"):
                notes.append(f"{len(notes) + 1}. {client}, {feature}: {outcome}")
                outcome = f"{outcome.split(':')[0]} ({len(notes)})"
            cells.append(outcome)
        lines.append(f"| {client} | {told['version']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes])


def main() -> None:
    """Try everything, tell each outcome on standard error, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--tools-model", default="", help="one whose template knows tools")
    parser.add_argument("--node", type=Path, help="folder with node_modules/openai")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with tokenizer.json, for the harness's log-probabilities"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    url, model, tools = args.url.rstrip("/"), args.model, args.tools_model
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clients: dict[str, tuple[str, Callable[[], dict[str, Check]]]] = {
            "openai (Python)": ("openai", lambda: openai_python(url, model, tools)),
            "ollama (Python)": ("ollama", lambda: ollama_python(url, model, tools)),
            "LangChain ChatOpenAI": ("langchain-openai", lambda: langchain(url, model, tools)),
            "LiteLLM": ("litellm", lambda: lite(url, model, tools)),
            "llm": ("llm", lambda: llm_program(url, model, folder)),
            "lm-evaluation-harness": ("lm-eval", lambda: lm_eval(url, model, folder, args.tokenizer)),
        }
        if args.node:
            clients["openai (Node)"] = ("", lambda: openai_node(url, model, tools, args.node))
        for client, (distribution, checks) in clients.items():
            if distribution and installed(distribution) is None:
                results[client] = {"version": "not installed"}
                continue
            results[client] = {"version": installed(distribution) if distribution else node_version(args.node)}
            for feature, check in checks().items():
                results[client][feature] = outcome(check)
                print(f"{client:22} {feature:12} {results[client][feature]}", file=sys.stderr, flush=True)
    args.output.write_text(json.dumps({**provenance(), "clients": results}, indent=1) + "\n")
    print(table(results))
    if any(told.startswith("FAILS") for rows in results.values() for told in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
