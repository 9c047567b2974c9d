"""`llama2 watermark`: keys of watermarks, and whether a text has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from llama2.cli.options import Json, inputs
from llama2.console import data, say

group = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@group.callback(epilog="Example: llama2 watermark key --out key.toml")
def _watermark() -> None:
    """Make a watermark's key, and detect the mark in texts.

    `chat`, `generate` and `serve` mark what they draw with --watermark FILE.
    """


@group.command(epilog="Example: llama2 watermark key --out key.toml --scheme synthid")
def key(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The key to write, for its owner's eyes alone.")],
    scheme: Annotated[
        Literal["synthid", "kgw"],
        typer.Option(help="SynthID's tournament, which keeps the model's distribution; or a green list."),
    ] = "synthid",
    layers: Annotated[int, typer.Option(min=1, max=32, help="Layers of a tournament.")] = 30,
) -> None:
    """Make a random key. A file that is there is never overwritten, since texts that it marked need it."""
    from llama2.safety import keys

    keys.create(out, scheme, layers)
    say(f"{out}: use it with --watermark {out}, and keep it secret")


@group.command(epilog="Example: llama2 watermark detect --file answers.txt --key key.toml --json")
def detect(
    key: Annotated[Path, typer.Option(metavar="FILE", help="The key that `llama2 watermark key` wrote.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="One text each.", show_default="standard input, as one text"),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="More texts, one a line.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="The model that may have written them: its tokenizer."),
    ] = None,
    level: Annotated[
        float, typer.Option(min=1e-12, max=0.5, help="P-value up to which a text is called marked.")
    ] = 0.01,
    as_json: Json = False,
) -> None:
    """Say whether texts are marked: a line with the verdict, the p-value, and the text.

    The p-value is the probability that an unmarked text scores as high, from an exact binomial test. With fewer than 25
    scored tokens, nothing can be said.
    """
    from llama2 import api, hub
    from llama2.cli.options import prompt
    from llama2.safety import detection, keys

    watermark = keys.load(key)
    given = inputs(texts, file) if texts or file else [prompt(["-"])]
    with api.open_checkpoint(model or hub.DEFAULT) as checkpoint:
        tokenizer = checkpoint.tokenizer
        for text in given:
            found = detection.detect_text(watermark, text, tokenizer, level=level)
            if as_json:
                data(json.dumps({"text": text, "level": level, **found.to_json()}, ensure_ascii=False))
            else:
                p = "-" if found.p_value is None else f"{found.p_value:.2g}"
                data(f"{found.verdict}\t{p}\t{found.scored} of {found.tokens} tokens scored\t{text}")
