"""`llama2 generate`: a raw completion."""

from __future__ import annotations

from typing import Annotated

import typer

from llama2.cli.answer import print_answer, seeded
from llama2.cli.options import AnswerOptions, Json, ModelOptions, Sign, Words, prompt, signer
from llama2.engine.request import Request

EXAMPLE = "Example: llama2 generate 'Once upon a time' --max-tokens 64 --temperature 0 --json"


def command(
    *,
    model: ModelOptions,
    options: AnswerOptions,
    words: Words = None,
    logprobs: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="With --json: log-probabilities, and N alternatives each.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Begin the text with the prompt.")] = False,
    sign: Sign = None,
    as_json: Json = False,
) -> None:
    """Continue a text, without a chat format.

    An empty text starts from BOS. Ctrl-C ends the answer, and what was drawn is printed.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs needs --json")
    text = prompt(words)
    with model.load() as loaded:
        request = Request(
            prompt=tuple(loaded.encode(text)),
            **options.limits(),
            sampling=seeded(options.sampling()),
            logprobs=logprobs,
            raw_completion=True,
        )
        signing = signer(sign, model, request)
        before = text if echo else ""
        print_answer(loaded.engine, request, model.name, before=before, as_json=as_json, sign=signing)
