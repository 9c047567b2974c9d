"""Ollama's documented requests against a running server, in the shapes of its API's page: who answers, who refuses.

    python bench/ollama_docs.py http://127.0.0.1:8080 smollm2-135m-instruct

Bodies are sent without a Content-Type, as `curl -d` examples send them, or with its own. The model that is given stands
for every model that the page names. A refusal counts if it names the field or the route, is one line in Ollama's form,
and is of what a server of chosen language models cannot do: images, filling in without the model's tokens for it, and
making, copying, removing or sending away models. Prints JSON, and fails if any request is neither.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

DIGEST = "sha256:" + "29" * 32
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FORECAST = {
    "type": "function",
    "function": {
        "name": "forecast",
        "description": "What the weather will be in a town",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["town"],
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"years": {"type": "integer"}, "free": {"type": "boolean"}},
    "required": ["years", "free"],
}
EVERY_OPTION = {
    **{"num_keep": 5, "seed": 42, "num_predict": 100, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "typical_p": 0.7},
    **{"repeat_last_n": 33, "temperature": 0.8, "repeat_penalty": 1.2, "presence_penalty": 1.5},
    **{"frequency_penalty": 1.0, "penalize_newline": True, "stop": ["\n", "user:"], "numa": False, "num_ctx": 1024},
    **{"num_batch": 2, "num_gpu": 1, "main_gpu": 0, "use_mmap": True, "num_thread": 8},
}

#: A request of the page: what it shows, its method and path, its body, and the words of which a refusal may have one.
Example = tuple[str, str, str, dict[str, Any] | bytes | None, tuple[str, ...]]


def examples(model: str) -> list[Example]:
    """The page's forty requests, in its order."""
    few: dict[str, Any] = {"options": {"num_predict": 24}}
    short: dict[str, Any] = {"stream": False, **few}
    greedy: dict[str, Any] = {"stream": False, "options": {"num_predict": 24, "temperature": 0}}
    asked = {"role": "user", "content": "Why does the sea look blue?"}
    weather = {"role": "user", "content": "Will it rain in Bern tomorrow?"}
    call = {"function": {"name": "forecast", "arguments": {"town": "Bern"}}}
    called = [weather, {"role": "assistant", "content": "", "tool_calls": [call]}]
    told = [*called, {"role": "tool", "content": "rain, 11 degrees", "tool_name": "forecast"}]
    talk = [asked, {"role": "assistant", "content": "Water takes red light."}, {"role": "user", "content": "And ice?"}]

    def generate(what: str, body: dict[str, Any], *refusals: str) -> Example:
        return f"generate: {what}", "POST", "/api/generate", {"model": model, **body}, refusals

    def chat(what: str, body: dict[str, Any], *refusals: str) -> Example:
        return f"chat: {what}", "POST", "/api/chat", {"model": model, **body}, refusals

    def post(what: str, path: str, body: dict[str, Any] | bytes, *refusals: str) -> Example:
        return what, "POST", path, body, refusals

    seen = {"role": "user", "content": "What is on this picture?", "images": [PNG]}
    return [
        generate("stream", {"prompt": "Why does the sea look blue?", **few}),
        generate("whole", {"prompt": "Why does the sea look blue?", **short}),
        generate("suffix", {"prompt": "def double(x):\n", "suffix": "    return y", **short}, "suffix"),
        generate("schema", {"prompt": "Anna is 22 and free. As JSON:", "format": PERSON, **short}),
        generate("JSON", {"prompt": "The sky's colours by hour, as JSON:", "format": "json", **short}),
        generate("images", {"prompt": "What is on this picture?", "images": [PNG], **short}, "images"),
        generate("raw", {"prompt": "[INST] Why does the sea look blue? [/INST]", "raw": True, **short}),
        generate("seed", {"prompt": "Why does the sea look blue?", "options": {"seed": 123, "num_predict": 24}}),
        generate("options", {"prompt": "Why does the sea look blue?", "options": EVERY_OPTION, "stream": False}),
        generate("load", {}),
        generate("unload", {"keep_alive": 0}),
        chat("stream", {"messages": [asked], **few}),
        chat("stream, tools", {"messages": [weather], "tools": [FORECAST], "stream": True, **few}),
        chat("whole", {"messages": [asked], **short}),
        chat("whole, tools", {"messages": [weather], "tools": [FORECAST], **short}),
        chat("schema", {"messages": [asked], "format": PERSON, **greedy}),
        chat("history", {"messages": talk, **few}),
        chat("history, tools", {"messages": told, "tools": [FORECAST], **short}),
        chat("images", {"messages": [seen]}, "images"),
        chat("seed", {"messages": [asked], "options": {"seed": 101, "temperature": 0, "num_predict": 24}}),
        chat("tools", {"messages": [weather], "tools": [FORECAST, FORECAST | _renamed("tides")], **short}),
        chat("load", {"messages": []}),
        chat("unload", {"messages": [], "keep_alive": 0}),
        post("create: system", "/api/create", {"model": "pirate", "from": model, "system": "Talk so."}, "/api/create"),
        post("create: quantize", "/api/create", {"model": "q", "from": model, "quantize": "q4_K_M"}, "/api/create"),
        post("create: GGUF", "/api/create", {"model": "g", "files": {"a.gguf": DIGEST}}, "/api/create"),
        post("create: safetensors", "/api/create", {"model": "s", "files": {"config.json": DIGEST}}, "/api/create"),
        ("blob: is there", "HEAD", f"/api/blobs/{DIGEST}", None, ()),
        post("blob: put", f"/api/blobs/{DIGEST}", b"GGUF", "/api/blobs"),
        ("tags", "GET", "/api/tags", None, ()),
        post("show", "/api/show", {"model": model}),
        post("copy", "/api/copy", {"source": model, "destination": "backup"}, "/api/copy"),
        ("delete", "DELETE", "/api/delete", {"model": model}, ("/api/delete",)),
        post("pull", "/api/pull", {"model": model}),
        post("push", "/api/push", {"model": f"someone/{model}:latest"}, "/api/push"),
        post("embed", "/api/embed", {"model": model, "input": "Why does the sea look blue?"}),
        post("embed: several", "/api/embed", {"model": model, "input": ["The sea is blue.", "Grass is green."]}),
        ("ps", "GET", "/api/ps", None, ()),
        post("embeddings", "/api/embeddings", {"model": model, "prompt": "About llamas."}),
        ("version", "GET", "/api/version", None, ()),
    ]


def _renamed(name: str) -> dict[str, Any]:
    return {"function": FORECAST["function"] | {"name": name}}  # type: ignore[operator]


def send(url: str, example: Example, headers: dict[str, str]) -> dict[str, Any]:
    """What became of one request: `verdict` is answers, refuses or fails."""
    what, method, path, body, refusals = example
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, http.client.HTTPException) as failure:
        return {"request": what, "method": method, "path": path, "verdict": "fails", "says": repr(failure)}
    finally:
        connection.close()
    row: dict[str, Any] = {"request": what, "method": method, "path": path, "status": response.status}
    try:
        lines: Sequence[Any] = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return {**row, "verdict": "fails", "says": text[:200]}
    error = next((line["error"] for line in lines if isinstance(line, dict) and "error" in line), None)
    if response.status == 200 and error is None:
        return {**row, "verdict": "answers"}
    if method == "HEAD":  # of a blob, where 404 is the documented answer
        return {**row, "verdict": "refuses" if response.status == 404 else "fails"}
    refused = response.status in (400, 403) and isinstance(error, str) and "\n" not in error
    named = refused and any(word in str(error) for word in refusals)
    return {**row, "verdict": "refuses" if named else "fails", "says": error or text[:200]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--content-type", help="of bodies; default: none is sent")
    given = parser.parse_args()
    headers = {"Content-Type": given.content_type} if given.content_type else {}
    rows = [send(given.url, example, headers) for example in examples(given.model)]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("answers", "refuses", "fails")}
    print(json.dumps({"requests": len(rows), **counts, "rows": rows}, indent=1))
    return int(counts["fails"] > 0)


if __name__ == "__main__":
    sys.exit(main())
