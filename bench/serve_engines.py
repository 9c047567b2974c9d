"""Does vLLM answer through our server as our own engine does? The same HTTP requests to both, over one model.

Each is asked with a server of its own: status and the shape of every answer must be equal (names, and types of values),
greedy texts should be. What vLLM does not do must be a 400 that names the field. Prints JSON; exit code 1 for a
difference in shape or status, and for an answer that is not there twice the same with one seed.

    llama2 convert MODEL FOLDER --to hf --format BF16
    python bench/serve_engines.py FOLDER --vllm PATH/python --tensor-parallel 2 > engines.json
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from itertools import takewhile
from pathlib import Path
from typing import Any

from http_load import Process, ours, running
from provenance import provenance

#: Fields of ours that vLLM leaves out, because they need a grammar.
_SCHEMA = {"name": "city", "schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def requests(model: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Route and body by name. What begins with `greedy` should have the same text."""
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    chat = {"model": model, "messages": messages, "max_tokens": 32}
    text = {"model": model, "prompt": "The capital of France is", "max_tokens": 24}
    completions = {
        "greedy text": text | {"temperature": 0},
        "greedy text from tokens": text | {"temperature": 0, "prompt": [504, 3575, 282, 4649, 314]},
        "greedy text with logprobs": text | {"temperature": 0, "logprobs": 3, "echo": True},
        "greedy prompt alone": text | {"max_tokens": 0, "logprobs": 0, "echo": True},
        "greedy text to a stop string": text | {"temperature": 0, "stop": ["."]},
        "greedy text with a bias": text | {"temperature": 0, "logit_bias": {"7042": -100, "9042": -100}},
        "greedy text with penalties": text | {"temperature": 0, "presence_penalty": 1.5, "repetition_penalty": 1.3},
        "drawn texts": text | {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 7, "n": 3},
        "greedy stream": text | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}},
        "greedy texts": text | {"temperature": 0, "prompt": ["One, two,", "Monday, Tuesday,"]},
        "too long": text | {"max_tokens": 1 << 20},
        "not a token": text | {"prompt": [1 << 30]},
    }
    chats = {
        "greedy chat": chat | {"temperature": 0},
        "greedy chat with logprobs": chat | {"temperature": 0, "logprobs": True, "top_logprobs": 2},
        "greedy chat stream": chat | {"temperature": 0, "stream": True},
        "drawn chats": chat | {"temperature": 1, "seed": 3, "n": 2, "min_p": 0.05},
        "grammar": chat | {"response_format": {"type": "json_schema", "json_schema": _SCHEMA}},
    }
    ollama = {"model": model, "messages": messages, "stream": False, "options": {"temperature": 0, "num_predict": 16}}
    asked = {name: ("/v1/completions", body) for name, body in completions.items()}
    asked |= {name: ("/v1/chat/completions", body) for name, body in chats.items()}
    asked["greedy response"] = "/v1/responses", {"model": model, "input": "Say hello.", "temperature": 0}
    asked["greedy response"][1]["max_output_tokens"] = 16
    asked["greedy Ollama chat"] = "/api/chat", ollama
    return asked


def ask(server: Process, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer; a stream's events as a list."""
    address, head = f"http://127.0.0.1:{server.port}{path}", {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), head)) as answer:
            status, data = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, data = error.code, error.read().decode()
    if data.startswith("data: "):
        events = [line[6:] for line in data.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
        return status, list(map(json.loads, events))
    return status, json.loads(data)


def shape(value: Any) -> Any:
    """Names and types of a JSON value, those of a list's items once each."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in sorted(value.items()) if name not in ("top_logprobs", "warning")}
    if isinstance(value, list):
        return sorted({json.dumps(shape(item)) for item in value})
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def said(value: Any) -> str:
    """All texts of an answer, one after the other."""
    if isinstance(value, dict):
        return "".join(
            inner if name in ("text", "content") and isinstance(inner, str) else said(inner)
            for name, inner in value.items()
            if name not in ("logprobs", "token")
        )
    return "".join(map(said, value)) if isinstance(value, list) else ""


def compare(name: str, own: tuple[int, Any], theirs: tuple[int, Any]) -> dict[str, Any]:
    """What two answers to one request have in common."""
    report: dict[str, Any] = {"status": [own[0], theirs[0]], "same_shape": shape(own[1]) == shape(theirs[1])}
    if theirs[0] != 200:
        return report | {"error": theirs[1].get("error")}
    if name.startswith("greedy"):
        texts = said(own[1]), said(theirs[1])
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
        report |= {"same_text": texts[0] == texts[1], "equal_characters": equal, "texts": texts}
    return report


def main() -> int:
    """Ask, compare, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="of an environment that has vLLM and llama2")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    args = parser.parse_args()
    name, model = args.folder.resolve().name, ["-m", str(args.folder)]
    division = ["--tensor-parallel", str(args.tensor_parallel), "--pipeline-parallel", str(args.pipeline_parallel)]
    engines = {"llama2": ours(*model), "vllm": [args.vllm, *ours(*model, "--engine", "vllm", *division)[1:]]}
    answers, ready, again = {}, {}, {}
    for engine, command in engines.items():
        with running(engine, command) as server:
            ready[engine] = server.ready
            answers[engine] = {key: ask(server, *request) for key, request in requests(name).items()}
            drawn = [ask(server, *requests(name)["drawn texts"]) for _ in range(2)]
            again[engine] = said(drawn[0][1]) == said(drawn[1][1])
    table = {key: compare(key, *(answers[engine][key] for engine in engines)) for key in requests(name)}
    grammar = table.pop("grammar")
    named = grammar["status"][1] == 400 and grammar["error"]["param"].startswith("response_format")
    texts = [row["same_text"] for row in table.values() if "same_text" in row]
    report = {
        "provenance": provenance(),
        "ready_seconds": ready,
        "same_seed_same_answer": again,
        "grammar_refused_by_name": named,
        "greedy_texts_equal": [sum(texts), len(texts)],
        "requests": table,
    }
    json.dump(report, sys.stdout, indent=1)
    print()
    same = all(row["same_shape"] and row["status"][0] == row["status"][1] for row in table.values())
    return 0 if same and named and all(again.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
