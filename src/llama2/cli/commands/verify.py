"""`llama2 verify`: does a model's or a text's signature hold."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llama2.cli.groups import with_default
from llama2.cli.options import Json, read_text
from llama2.console import data, say

Key = Annotated[
    Path, typer.Option(metavar="FILE", help="Certificate, or a model's public key, of who should have signed.")
]

group = typer.Typer(cls=with_default("model"), rich_markup_mode=None, no_args_is_help=True)


@group.callback(epilog="Example: llama2 verify runs/nano --key signing.crt")
def _verify() -> None:
    """Check a model's or a text's signature.

    `llama2 verify MODEL` checks a model's files. A signature that does not hold is one line, and exit code 1.
    """


@group.command(epilog="Example: llama2 verify model runs/nano --key signing.crt")
def model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file or folder.")],
    key: Key,
    signature: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The signature.", show_default="MODEL/model.sig, or FILE.sig beside a file"),
    ] = None,
) -> None:
    """Check that a model's files are those that the owner of a key signed, with none more or less.

    A certificate must be valid today.
    """
    from llama2 import hub
    from llama2.safety import signing

    signing.verify(hub.locate(name), key, signature)
    say(f"{name}: unchanged since it was signed by the owner of {key}")


@group.command(epilog="Example: llama2 verify text answer.txt --key signing.crt")
def text(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text in UTF-8.")],
    key: Key,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The manifest.", show_default="inside the text")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a text is the one that was signed, and show which model wrote it, and when."""
    from llama2.safety import manifest as manifests

    beside = None if manifest is None else manifest.read_bytes()
    found = manifests.check(read_text(file), key, beside)
    if as_json:
        data(json.dumps(asdict(found)))
        return
    mark = found.watermark or "no watermark"
    say(f"{file}: unchanged since {found.signer} signed it at {found.time}")
    say(f"written by {found.model}, weights {found.weights}, {mark}")
