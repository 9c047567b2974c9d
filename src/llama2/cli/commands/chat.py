"""`llama2 chat`: one answer, or a conversation at the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama2.cli.answer import print_answer, seeded
from llama2.cli.conversation import Conversation
from llama2.cli.options import AnswerOptions, Json, ModelOptions, Sign, Template, Words, prompt, signer
from llama2.cli.output import warn
from llama2.console import visible
from llama2.engine.request import Request
from llama2.errors import HubError, Llama2Error

if TYPE_CHECKING:
    from llama2.api import Model

EXAMPLE = "Example: llama2 chat 'Summarise this in one sentence:' @notes.txt --temperature 0"


def command(
    *,
    model: ModelOptions,
    options: AnswerOptions,
    words: Words = None,
    template: Template = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continue a saved conversation: its model, sampling, messages.")
    ] = None,
    neutralise: Annotated[
        bool, typer.Option("--neutralise", help="Break role markers in messages instead of refusing them.")
    ] = False,
    sign: Sign = None,
    as_json: Json = False,
) -> None:
    """Answer a question, or converse at a terminal.

    With a question, or text on standard input, the answer is printed. Without, in a terminal, a conversation begins.
    """
    conversation = Conversation.load(resume) if resume else Conversation(model.name)
    if resume and model.model is None:
        from llama2.checkpoint.adapter import split

        adapters = [] if model.adapter else conversation.adapters
        for name in (conversation.model, *(split(adapter)[0] for adapter in adapters)):
            _require_local(name, resume)
    if model.model is None:  # the adapters belong to the model of the conversation
        model = replace(model, model=conversation.model, adapter=model.adapter or conversation.adapters)
    conversation.model, conversation.adapters = model.name, [*(model.adapter or ())]
    conversation.sampling |= options.sampling()
    if system is not None:
        conversation.system = system

    if not words and not as_json and sys.stdin.isatty() and sys.stdout.isatty():
        from llama2.cli.terminal import TerminalChat

        if sign is not None:
            raise typer.BadParameter("--sign signs one answer; give a question")

        with model.load(template=template) as loaded:
            _note(loaded)
            TerminalChat(loaded, conversation, options.limits(), neutralise).run()
        return
    question = prompt(words)
    if not question.strip():
        raise Llama2Error("the question is empty; write one")
    messages = [*conversation.messages, {"role": "user", "content": question}]
    with model.load(template=template) as loaded:
        _note(loaded)
        request = Request((), **options.limits(), sampling=seeded(conversation.sampling))
        rendered = loaded.prompt(messages, neutralise=neutralise)
        for note in rendered.notes:
            warn(note)
        request = loaded.answering(request, rendered)
        print_answer(loaded.engine, request, model.name, as_json=as_json, sign=signer(sign, model, request))


def _note(model: Model) -> None:
    if note := model.checkpoint.assumes_format:
        warn(note)


def _require_local(name: str, file: Path) -> None:
    """Do not fetch a model because a file names it: ask the user, or raise HubError where there is no terminal."""
    from llama2 import hub

    if hub.find(name) is not None:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise HubError(f"{file}: is with {name}, which is not here; fetch it with `llama2 pull {name}`, or give -m")
    if not typer.confirm(f"{visible(file)} is with {visible(name)}, which is not here. Fetch it?", err=True):
        raise typer.Exit(1)
