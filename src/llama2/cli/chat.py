"""`llama2 chat`: one answer, or a conversation at the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.answer import print_answer, seeded
from llama2.cli.conversation import Conversation
from llama2.cli.options import AnswerOptions, ModelOptions, Words, prompt
from llama2.engine.request import Request

EXAMPLE = "Example: llama2 chat 'Summarise this in one sentence:' @notes.txt --temperature 0"


def chat(
    *,
    model: ModelOptions,
    options: AnswerOptions,
    words: Words = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continue a saved conversation: its model, sampling, messages.")
    ] = None,
    neutralise: Annotated[
        bool, typer.Option("--neutralise", help="Defuse marks of the chat format in messages instead of refusing them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question, or converse at a terminal.

    With a question, or text on standard input, the answer is printed. Without, in a terminal, a conversation begins.
    """
    conversation = Conversation.load(resume) if resume else Conversation(model.name)
    model = replace(model, model=model.model or conversation.model)
    conversation.model = model.name
    conversation.sampling |= options.sampling()
    if system is not None:
        conversation.system = system

    if not words and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        from llama2.cli.terminal import Chat

        with model.load() as loaded:
            Chat(loaded, conversation, options.limits(), neutralise).run()
        return
    messages = [*conversation.messages, {"role": "user", "content": prompt(words)}]
    with model.load() as loaded:
        ids = tuple(loaded.render(messages, neutralise=neutralise))
        request = Request(ids, **options.limits(), sampling=seeded(conversation.sampling))
        print_answer(loaded.engine, request, model.name, as_json=as_json)
