"""Warnings, and errors in one line."""

from __future__ import annotations

import errno
import sys

import typer

from llama2.console import say, visible

#: What typer raises for every wrong use of a command; of its kinds only this one, a subclass, has a public name.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


def warn(text: str) -> None:
    """One line on standard error that a person should see."""
    say(f"llama2: {one_line(text)}", file=sys.stderr)


def one_line(message: object) -> str:
    """An exception, or text, in one line; names and contents of files may hold anything."""
    if isinstance(message, UsageError):
        command = message.ctx.command_path if message.ctx else "llama2"
        text = f"{message.format_message()} (see `{command} --help`)"
    elif isinstance(message, OSError) and message.errno == errno.EBADF and not message.filename:
        text = "standard input or output is closed; give the program one, if only /dev/null"
    elif isinstance(message, OSError) and message.strerror:
        text = f"{message.filename}: {message.strerror}" if message.filename else message.strerror
    elif isinstance(message, MemoryError):
        text = "out of memory; a smaller model or --context needs less"
    else:
        text = str(message)
    return visible(" ".join(text.split()))


def size(count: int) -> str:
    """Bytes in words."""
    from rich.filesize import decimal

    return decimal(count)
