"""An answer while it comes: shown piece by piece, stopped by Ctrl-C, timed."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from llama2.cli.output import warn
from llama2.cli.signals import on_ctrl_c
from llama2.console import aside, data, stream
from llama2.engine.request import FinishReason, Logprob, Request, Sampling
from llama2.errors import EngineError

if TYPE_CHECKING:
    from llama2.engine.protocol import EngineProtocol


@dataclass
class Reply:
    """What came of a request, also when Ctrl-C ended it."""

    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    first_token_seconds: float = 0.0  # from the request to its first token
    seconds: float = 0.0  # and to its end
    drafted_tokens: int = 0  # by --lookup
    accepted_tokens: int = 0  # of these, the drawn ones

    def decode_rate(self) -> float | None:
        """Tokens per second after the first token; None when no other followed."""
        count = len(self.token_ids) - 1
        return count / (self.seconds - self.first_token_seconds) if count > 0 else None

    def summary(self) -> str:
        """Tokens and speed, for people."""
        count, rate = len(self.token_ids), self.decode_rate()
        speed = f", {rate:.1f} tokens/s" if rate else ""
        drafts = f", {self.accepted_tokens} of {self.drafted_tokens} drafts accepted" if self.drafted_tokens else ""
        return f"{count} token{'s' * (count != 1)}{speed}{drafts}"


def follow(engine: EngineProtocol, request: Request, show: Callable[[str], None]) -> Reply:
    """Run a request to its end, handing each piece of text to `show`.

    Ctrl-C ends it after the current step; at once while there is no token yet, or at the second press. Raises
    ContextError or RequestError like the engine, EngineError when it failed.
    """
    reply, start, stopped = Reply(len(request.prompt)), time.perf_counter(), False

    def interrupt() -> None:
        nonlocal stopped
        if stopped or not reply.token_ids:
            raise KeyboardInterrupt
        stopped = True

    try:
        with on_ctrl_c(interrupt):
            for event in engine.run(request):
                reply.seconds = time.perf_counter() - start
                if event.error is not None:
                    raise EngineError(event.error)
                if event.token is not None:
                    reply.first_token_seconds = reply.first_token_seconds or reply.seconds
                    reply.token_ids.append(event.token)
                if event.logprob is not None:
                    reply.logprobs.append(event.logprob)
                if event.text:
                    reply.text += event.text
                    show(event.text)
                if event.finish is not None:
                    reply.finish_reason = event.finish
                    reply.drafted_tokens, reply.accepted_tokens = event.drafted_tokens, event.accepted_tokens
                elif stopped:
                    engine.cancel(event.request)  # what was drawn still comes, then the last event with held back text
    except KeyboardInterrupt:
        reply.seconds = time.perf_counter() - start
    return reply


def print_answer(
    engine: EngineProtocol,
    request: Request,
    model: str,
    *,
    before: str = "",
    as_json: bool,
    sign: Callable[[str], str] | None = None,
) -> None:
    """Print the answer to a request, after `before`: piece by piece, or as one JSON object.

    What `sign` adds to the whole text comes at its end.

    Raises typer.Exit with code 130 when Ctrl-C ended it, after printing what was drawn.
    """
    if note := unmarked(request):
        warn(note)
    if as_json:
        reply = follow(engine, request, lambda _: None)
        text = before + reply.text
        text = text if sign is None else sign(text)
        record = asdict(reply) | {"text": text, "model": model, "seed": request.sampling.seed}
        if request.logprobs is None:
            del record["logprobs"]
        data(json.dumps(record))
    else:
        stream(before)
        reply = follow(engine, request, stream)
        if sign is not None:
            text = unicodedata.normalize("NFC", before + reply.text)
            stream(sign(text).removeprefix(text))
        stream("\n")
        aside(reply.summary())
        if reply.finish_reason == "length" and request.max_tokens is None:
            warn(f"the answer ends here, since the context of {engine.context} tokens is full")
    if reply.finish_reason == "cancelled":
        raise typer.Exit(130)


def unmarked(request: Request) -> str | None:
    """What to say where an answer is to be marked and cannot be."""
    if request.watermark is not None and request.sampling.temperature == 0:
        return "at temperature 0 nothing is drawn, so nothing is marked"
    return None


def seeded(settings: Mapping[str, Any]) -> Sampling:
    """Sampling with these settings, and a random seed if there is none among them."""
    return Sampling(**{"seed": int.from_bytes(os.urandom(4), "big"), **settings})
