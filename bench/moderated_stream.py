"""Answers under a policy beside the same answers without: what reaches the client, how late, and with which verdicts.

Two servers of one model, one with a policy whose phrases are words of the model's own answers, run in turn. Of each
prompt, the answer without a policy says at which token a phrase completes. Counted is what the client of the moderated
server gets after that token, streamed and not, on every route that has the same text.

    python bench/moderated_stream.py smollm2-135m-instruct --data DIR -o moderated-stream.json
    python bench/moderated_stream.py MODEL --data DIR --prompts 4 --streams 2 --tokens 48 -o tiny.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from http_load import ours, post, running
from provenance import provenance

from llama2.classify.features import normalise


@dataclass
class Streamed:
    """One streamed answer: tokens with the times when they came, and its end."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each token, since the request
    text: str = ""
    finish: str | None = None
    seconds: float = 0.0


def body(model: str, prompt: str, tokens: int, seed: int) -> dict[str, Any]:
    """A chat request; equal ones have equal answers."""
    message = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": message, "max_tokens": tokens, "seed": seed, "return_token_ids": True}


def stream(port: int, request: dict[str, Any]) -> Streamed:
    """The streamed answer to a request."""
    answer, begun = Streamed(), time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    data = json.dumps({**request, "stream": True})
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        choice = json.loads(line[6:])["choices"][0]
        answer.text += choice["delta"].get("content") or ""
        for token in choice.get("token_ids", ()):
            answer.tokens.append(token)
            answer.times.append(time.perf_counter() - begun)
        answer.finish = choice["finish_reason"] or answer.finish
    connection.close()
    answer.seconds = time.perf_counter() - begun
    return answer


def streams(port: int, requests: Sequence[dict[str, Any]], at_once: int) -> list[Streamed]:
    """The answers to all requests, so many at once."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda request: stream(port, request), requests))


def whole(port: int, requests: Sequence[dict[str, Any]], path: str) -> list[tuple[str, bool]]:
    """The text of each answer, not streamed, on a route; and whether a moderator ended it."""
    found = []
    for request in requests:
        given = {name: value for name, value in request.items() if name != "return_token_ids"}
        if path == "/v1/responses":
            given |= {"input": given.pop("messages"), "max_output_tokens": given.pop("max_tokens")}
        if path == "/api/chat":
            options = {"num_predict": given.pop("max_tokens"), "seed": given.pop("seed")}
            given |= {"options": options, "stream": False}
        answer = json.loads(post(port, path, given))
        if path == "/v1/responses":
            texts = [part["text"] for item in answer["output"] for part in item["content"]]
            found.append(("".join(texts), answer["incomplete_details"] == {"reason": "content_filter"}))
        elif path == "/v1/messages":
            texts = [block["text"] for block in answer["content"]]
            found.append(("".join(texts), answer["stop_reason"] == "refusal"))
        elif path == "/api/chat":
            found.append((answer["message"]["content"], answer["done_reason"] == "content_filter"))
        else:
            choice = answer["choices"][0]
            found.append((choice["message"]["content"], choice["finish_reason"] == "content_filter"))
    return found


def phrases_of(texts: Sequence[str]) -> dict[int, str]:
    """For every second text, three words in a row that are in it once, in its middle: what the policy forbids."""
    chosen = {}
    for i, text in enumerate(texts):
        words = [match.group() for match in re.finditer(r"[a-z']{2,}", normalise(text))]
        if i % 2 == 0 and len(words) > 24:
            phrase = " ".join(words[len(words) // 2 : len(words) // 2 + 3])
            if phrase in " ".join(normalise(text).split()):
                chosen[i] = phrase
    return chosen


def completes(plain: Streamed, phrases: Sequence[str], decode: Any) -> int | None:
    """The number of tokens of an unmoderated answer in which the first forbidden phrase is complete; None: never."""
    for count in range(1, len(plain.tokens) + 1):
        text = " ".join(normalise(decode(plain.tokens[:count])).split())
        if any(re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) for phrase in phrases):
            return count
    return None


def policy(folder: Path, name: str, phrases: Sequence[str], *, hold_back: bool) -> Path:
    """A policy that stops answers with these phrases."""
    path = folder / f"{name}.toml"
    rules = f'[categories.other]\naction = "stop"\nwhere = "output"\nphrases = {json.dumps([*phrases])}\n'
    default = '[categories.harassment]\naction = "stop"\nwhere = "output"\nthreshold = 0.9\n'
    path.write_text(f"hold_back = {str(hold_back).lower()}\n{rules}{default}")
    return path


def compare(plain: Sequence[Streamed], moderated: Sequence[Streamed], ends: Sequence[int | None]) -> dict[str, Any]:
    """What came after the first unsafe token, and how late answers that nobody ended are."""
    after = [max(0, len(m.tokens) - end) for m, end in zip(moderated, ends, strict=True) if end is not None]
    passed = [
        (p, m) for p, m, end in zip(plain, moderated, ends, strict=True) if end is None and m.finish != "content_filter"
    ]
    ratios = [m.seconds / p.seconds for p, m in passed if p.seconds]
    first = [m.times[0] for m in moderated if m.times]
    return {
        "unsafe": len(after),
        "tokens after the first unsafe one, most": max(after, default=0),
        "caught": sum(m.finish == "content_filter" for m, end in zip(moderated, ends, strict=True) if end is not None),
        "ended besides": sum(
            m.finish == "content_filter" for m, end in zip(moderated, ends, strict=True) if end is None
        ),
        "end, ratio to unmoderated, median": statistics.median(ratios) if ratios else None,
        "first text, seconds, median": statistics.median(first) if first else None,
        "first text unmoderated, seconds, median": statistics.median([p.times[0] for p in plain if p.times]),
        "same text": sum(p.text == m.text for p, m in passed),
        "passed": len(passed),
    }


def main() -> None:
    """Read the command line, run both servers in turn, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets; prompts are XSTest's")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3, help="of both servers, interleaved")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    from llama2 import api
    from llama2.evaluate.intervals import wilson

    lines = (options.data / "xstest/xstest_prompts.csv").read_text(encoding="utf-8").splitlines()[1:]
    prompts = [line.split(",")[1].strip('"') for line in lines if len(line.split(",")) > 2][: options.prompts]
    public = Path(options.model).stem if Path(options.model).exists() else options.model
    plainly = ours("-m", options.model)
    requests = [body(public, prompt, options.tokens, i) for i, prompt in enumerate(prompts)]
    with api.open_checkpoint(options.model) as checkpoint, tempfile.TemporaryDirectory() as name:
        decode, folder = checkpoint.tokenizer.decode, Path(name)
        with running("plain", plainly) as served:
            plain = streams(served.port, requests, options.streams)
        phrases = [*phrases_of([answer.text for answer in plain]).values()]
        ends = [completes(answer, phrases, decode) for answer in plain]
        held = policy(folder, "held", phrases, hold_back=True)
        ahead = policy(folder, "ahead", phrases, hold_back=False)
        record: dict[str, Any] = {"provenance": provenance(), "phrases": len(phrases), "rounds": []}
        for _ in range(options.rounds):
            with running("plain", plainly) as served:
                again = streams(served.port, requests, options.streams)
            with running("held", [*plainly, "--policy", str(held)]) as served:
                moderated = streams(served.port, requests, options.streams)
            with running("ahead", [*plainly, "--policy", str(ahead)]) as served:
                early = streams(served.port, requests, options.streams)
            record["rounds"].append(
                {"default": compare(again, moderated, ends), "hold_back = false": compare(again, early, ends)}
            )
        verdicts = [answer.finish == "content_filter" for answer in moderated]
        with running("held", [*plainly, "--policy", str(held)]) as served:
            paths = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat")
            routes = {path: whole(served.port, requests, path) for path in paths}
        record["routes"] = {
            path: {
                "same verdict": sum(ended == verdict for (_, ended), verdict in zip(found, verdicts, strict=True)),
                "same text": sum(text == answer.text for (text, _), answer in zip(found, moderated, strict=True)),
                "n": len(found),
            }
            for path, found in routes.items()
        }
        caught = record["rounds"][-1]["default"]
        record["caught, 95 % interval"] = wilson(caught["caught"] / max(1, caught["unsafe"]), max(1, caught["unsafe"]))
    options.output.write_text(json.dumps(record, indent=1))
    print(json.dumps({name: value for name, value in record.items() if name != "provenance"}, indent=1))


if __name__ == "__main__":
    main()
