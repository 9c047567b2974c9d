"""The interactive chat of `llama2 chat`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from llama2.cli.answer import follow, seeded, unmarked
from llama2.cli.conversation import Conversation
from llama2.cli.output import one_line
from llama2.console import aside, say, stream
from llama2.engine.request import Request
from llama2.errors import ContextError, Llama2Error
from llama2.hub import home

if sys.platform != "win32":
    import termios

if TYPE_CHECKING:
    from llama2.api import Model

#: Command, its argument, what it does.
_COMMANDS = (
    ("/system", "[TEXT]", "set the system prompt, or remove it"),
    ("/clear", "", "forget what was said; the system prompt stays"),
    ("/save", "FILE", "write the conversation to a file"),
    ("/load", "FILE", "take up a saved conversation"),
    ("/help", "", "show this"),
    ("/exit", "", "leave, as Ctrl-D does"),
)
_KEYS = """\
Enter sends. Alt-Enter, or Esc and then Enter, begins a new line; pasted lines stay together.
Up and down bring back earlier lines, Tab completes commands. A space before / sends it as text.
Ctrl-C stops an answer, Ctrl-D leaves."""


@dataclass
class TerminalChat:
    """A conversation with a person at a terminal."""

    model: Model
    conversation: Conversation
    limits: dict[str, Any]  # of each answer, by the names of `Request`
    neutralise: bool

    def run(self) -> None:
        """Answer and obey until Ctrl-D or /exit. An error ends the line that caused it, not the chat."""
        session = _session()
        name, context = Path(self.conversation.model).name, self.model.engine.context
        aside(f"{name}, context of {context} tokens; /help lists the commands")
        while True:
            try:
                line = session.prompt("> ")
                if command := re.fullmatch(r"(/[A-Za-z]+)(?:\s+(.*))?", line.rstrip(), re.DOTALL):
                    self._obey(command[1], command[2] or "")
                elif line.strip():
                    self._ask(line)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            except ContextError as error:
                say(f"error: {one_line(error)}; /clear begins anew")
            except (Llama2Error, OSError, MemoryError) as error:
                say("error:", one_line(error))

    def _ask(self, question: str) -> None:
        messages = [*self.conversation.messages, {"role": "user", "content": question}]
        request = Request((), **self.limits, sampling=seeded(self.conversation.sampling))
        prompt = self.model.prompt(messages, neutralise=self.neutralise)
        for note in prompt.notes:
            aside(note)
        request = self.model.answering(request, prompt)
        if (unmarkable := unmarked(request)) is not None:
            aside(unmarkable)
        with _hidden_keys():
            reply = follow(self.model.engine, request, stream)
        say()
        context, used = self.model.engine.context, reply.prompt_tokens + len(reply.token_ids)
        aside(f"{reply.summary()}, {used} of {context} tokens of context")
        if reply.text.strip():
            self.conversation.messages = [*messages, {"role": "assistant", "content": reply.text}]
        else:
            say("There is no answer, so the question is dropped too.")
        if reply.finish_reason == "length":
            full = f"the context is full, {used} of {context} tokens; /clear begins anew."
            say("The answer ends here:", full if request.max_tokens is None else "--max-tokens is reached.")

    def _obey(self, command: str, argument: str) -> None:
        match command:
            case "/system":
                self.conversation.system = argument or None
                say("The system prompt is set." if argument else "There is no system prompt now.")
            case "/clear":
                self.conversation.clear()
                say("Forgotten." + " The system prompt stays." * bool(self.conversation.system))
            case "/save" | "/load" if not argument:
                say(f"error: {command} needs the name of a file")
            case "/save" if not self.conversation.turns:
                say("error: nothing has been said yet")
            case "/save":
                path = Path(os.path.expanduser(argument))
                self.conversation.save(path)
                say(f"Saved {len(self.conversation.turns)} messages to {path}.")
            case "/load":
                self._load(Path(os.path.expanduser(argument)))
            case "/help":
                for name, argument_name, action in _COMMANDS:
                    say(f"  {name + ' ' + argument_name:<16}{action}")
                say(_KEYS)
            case "/exit":
                raise EOFError
            case _:
                near = get_close_matches(command, [name for name, _, _ in _COMMANDS], 1)
                hint = f"did you mean {near[0]}?" if near else "/help lists them, and a space before / sends it as text"
                say(f"error: there is no command {command}; {hint}")

    def _load(self, path: Path) -> None:
        loaded = Conversation.load(path)
        say(f"Loaded {len(loaded.turns)} messages from {path}.")
        before, now = (" + ".join([c.model, *c.adapters]) for c in (loaded, self.conversation))
        if before != now:
            say(f"They are with {before}; {now} continues.")
        self.conversation = replace(loaded, model=self.conversation.model, adapters=self.conversation.adapters)


class _History(FileHistory):
    """Earlier lines in a file of the user's alone. One that cannot be written is remembered until the end only."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            os.close(os.open(self.filename, os.O_CREAT | os.O_WRONLY, 0o600))
            super().store_string(string)


@contextmanager
def _hidden_keys() -> Iterator[None]:
    """Keys typed within the block are not shown amid the answer, and appear in the next line. Ctrl-C still works."""
    if sys.platform == "win32":  # whose console shows nothing that is typed ahead
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _session() -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    folder = home()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return PromptSession(
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=_History(str(folder / "chat_history")),
        completer=WordCompleter([f"{name} " if wants else name for name, wants, _ in _COMMANDS], sentence=True),
        complete_while_typing=False,
    )
