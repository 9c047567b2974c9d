"""An answer while it comes: shown piece by piece, stopped by Ctrl-C, timed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from llama2.cli.output import aside, warn, write
from llama2.engine.request import Event, FinishReason, Logprob
from llama2.errors import EngineError

if TYPE_CHECKING:
    from llama2.api import Model


@dataclass
class Reply:
    """What came of a request, also when Ctrl-C ended it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    first_token_seconds: float = 0.0  # from the request to its first token
    seconds: float = 0.0  # and to its end

    def speed(self) -> str:
        """Tokens, and tokens per second after the first, for people."""
        count = len(self.token_ids)
        rate = f" · {(count - 1) / (self.seconds - self.first_token_seconds):.1f} tokens/s" if count > 1 else ""
        return f"{count} token{'s' * (count != 1)}{rate}"


def follow(model: Model, events: Iterator[Event], show: Callable[[str], None]) -> Reply:
    """Take an answer to its end, handing each piece of text to `show`.

    Ctrl-C ends it: after the token at hand, so that the engine is not cut in the middle of a step, or at once while
    there is no token yet. Raises EngineError when the answer failed.
    """
    reply, start, stopped = Reply(), time.perf_counter(), False

    def interrupt() -> None:
        nonlocal stopped
        if stopped or not reply.token_ids:
            raise KeyboardInterrupt
        stopped = True

    try:
        with _on_ctrl_c(interrupt):
            for event in events:
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
                elif stopped:
                    model.engine.cancel(event.request)  # the next event is its last
    except KeyboardInterrupt:
        reply.seconds = time.perf_counter() - start
    return reply


@contextmanager
def _on_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_answer(
    model: Model,
    name: str,
    events: Callable[..., Iterator[Event]],
    options: dict[str, Any],
    *,
    before: str = "",
    as_json: bool,
) -> None:
    """Print the answer of `events(**options)`, after `before`: piece by piece, or as one JSON object.

    Raises typer.Exit with code 130 when Ctrl-C ended it; what there is has been printed then.
    """
    options = {"seed": fresh_seed()} | options
    if as_json:
        reply = follow(model, events(**options), lambda _: None)
        record = {"model": name, "seed": options["seed"]} | asdict(reply) | {"text": before + reply.text}
        if options.get("logprobs") is None:
            del record["logprobs"]
        print(json.dumps(record))
    else:
        write(before)
        reply = follow(model, events(**options), write)
        print(flush=True)
        aside(reply.speed())
        if reply.finish_reason == "length" and options["max_tokens"] is None:
            warn(f"the answer ends here because the context of {model.engine.context} tokens is full")
    if reply.finish_reason == "cancelled":
        raise typer.Exit(130)


def fresh_seed() -> int:
    """A seed that nobody chose; small enough for every JSON reader."""
    return int.from_bytes(os.urandom(4), "big")
