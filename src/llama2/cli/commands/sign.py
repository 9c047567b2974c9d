"""`llama2 sign`: sign a model's files, sign a text, and make the keys for both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama2 import files
from llama2.cli.groups import with_default
from llama2.cli.options import SignAs, read_text, signing_files
from llama2.console import data, say
from llama2.errors import SafetyError

group = typer.Typer(cls=with_default("model"), rich_markup_mode=None, no_args_is_help=True)


@group.callback(epilog="Example: llama2 sign runs/nano --key signing.pem")
def _sign() -> None:
    """Sign weights or a text, so that others can check from whom they are and that nothing changed.

    `llama2 sign MODEL` signs a model's files. `llama2 verify` checks.
    """


@group.command(epilog="Example: llama2 sign model runs/nano --key signing.pem")
def model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Name, file or folder.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private key of an elliptic curve, in PEM.")],
    signature: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write.", show_default="MODEL/model.sig, or FILE.sig beside a file"),
    ] = None,
) -> None:
    """Sign every file of a model by OpenSSF's model signing, offline."""
    from llama2 import hub
    from llama2.safety import signing

    say(f"{signing.sign(hub.locate(name), key, signature)}: check it with `llama2 verify {name} --key CERTIFICATE`")


@group.command(epilog="Example: llama2 sign text answer.txt -m runs/nano --sign signing")
def text(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A text in UTF-8.")],
    sign: SignAs,
    name: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="The model that wrote the text.")
    ] = None,
    watermark: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The key by which the text was marked; its scheme is named.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the signed text goes.", show_default="standard output")
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the manifest to this file, and leave the text as it is.")
    ] = None,
) -> None:
    """Sign a text that a model wrote: a C2PA manifest with model, weights, watermark and time.

    It is behind the text, in characters that nobody sees, or in a file beside it.
    """
    from llama2 import hub
    from llama2.safety import keys, manifest

    given, (key, chain) = read_text(file), signing_files(sign)
    scheme = None if watermark is None else keys.scheme_of(keys.load(watermark))
    used = name or hub.DEFAULT
    said = manifest.describe(used, hub.locate(used), scheme)
    if beside is not None:
        with files.create(beside, error=SafetyError) as made:
            made.write(manifest.beside(given, said, key, chain))
    elif out is not None:
        with files.create(out, error=SafetyError) as made:
            made.write(manifest.embed(given, said, key, chain).encode())
    else:
        data(manifest.embed(given, said, key, chain))


@group.command(epilog="Example: llama2 sign key --out signing --name 'Example Ltd'")
def key(
    out: Annotated[str, typer.Option(metavar="NAME", help="Writes NAME.pem, which is secret, and NAME.crt.")],
    name: Annotated[str, typer.Option(help="Who signs, for the certificate.")] = "llama2",
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days until the key expires.")] = 365,
) -> None:
    """Make a key, and a certificate that names its owner and when it expires.

    Nobody vouches for that certificate: give it to those who check by a way that they trust.
    """
    from llama2.safety import signing

    private, chain = Path(f"{out}.pem"), Path(f"{out}.crt")
    signing.create_key(private, chain, name, days)
    say(f"{private}: the private key; keep it secret. {chain}: the certificate, for those who check")
