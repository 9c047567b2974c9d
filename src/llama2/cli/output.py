"""What the program prints: text that is safe for a terminal, and errors in one line."""

from __future__ import annotations

import os
import sys

import typer

#: What typer raises for every wrong use of a command; of its kinds only this one, a subclass, has a public name.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

#: Control characters, which a terminal would obey, and what stands for them. Newline and tab stay.
_VISIBLE = {c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\t\n"} | dict.fromkeys(
    range(0x7F, 0xA0), "\ufffd"
)


def write(text: str) -> None:
    """Print a piece of an answer at once. What a model says must not steer the terminal that shows it."""
    sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def aside(text: str) -> None:
    """A dim line beside the answers, only in a terminal."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        print(text if plain else f"\x1b[2m{text}\x1b[0m", file=sys.stderr)


def warn(text: str) -> None:
    """One line on standard error that a person should see."""
    print(f"llama2: {one_line(text)}", file=sys.stderr)


def one_line(message: object) -> str:
    """An exception, or text, in one line; names and contents of files may hold anything."""
    if isinstance(message, UsageError):
        command = message.ctx.command_path if message.ctx else "llama2"
        text = f"{message.format_message()} (see `{command} --help`)"
    elif isinstance(message, OSError) and message.strerror:
        text = f"{message.filename}: {message.strerror}" if message.filename else message.strerror
    elif isinstance(message, MemoryError):
        text = "out of memory; a smaller model or --context needs less"
    else:
        text = str(message)
    return " ".join(text.split()).translate(_VISIBLE)
