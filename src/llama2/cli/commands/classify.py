"""`llama2 classify`: is a text toxic, is an answer a refusal; and the training of what decides that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llama2.cli.options import Json, inputs
from llama2.console import data, say

if TYPE_CHECKING:
    from llama2.classify.classifier import Verdict

group = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Texts = Annotated[
    list[str] | None, typer.Argument(metavar="TEXT", help="One input each.", show_default="standard input's lines")
]
File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="More inputs, one a line.")]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A classifier that `train` wrote.", show_default="the package's own"),
]


@group.callback(epilog="Example: llama2 classify toxicity 'Have a nice day.'")
def _classify() -> None:
    """Judge texts by small classifiers: is one toxic, is an answer a refusal.

    They know English. A text in other words is reported as not judged, and never as harmless.
    """


@group.command(epilog="Example: llama2 classify toxicity 'Have a nice day.' --json")
def toxicity(texts: Texts = None, file: File = None, weights: Weights = None, as_json: Json = False) -> None:
    """Judge whether a text is toxic: a line with the probability, and the text."""
    _judge("toxicity", texts, file, weights, as_json=as_json)


@group.command(epilog='Example: llama2 classify refusal "I\'m sorry, but I cannot help with that."')
def refusal(texts: Texts = None, file: File = None, weights: Weights = None, as_json: Json = False) -> None:
    """Judge whether an answer complies, refuses partly, or refuses: a line with label, probability and text."""
    _judge("refusal", texts, file, weights, as_json=as_json)


def _judge(name: str, texts: list[str] | None, file: Path | None, weights: Path | None, *, as_json: bool) -> None:
    from llama2.classify.classifier import Classifier, bundled

    given = inputs(texts, file)
    classifier = bundled(name) if weights is None else Classifier.open(weights)
    if classifier.name != name:
        raise typer.BadParameter(f"--weights {weights}: judges {classifier.name}, not {name}")
    for text in given:
        found = classifier.judge(text)
        if as_json:
            data(json.dumps({"text": text, "label": found.label, **_rest(found)}, ensure_ascii=False))
        elif found.label is None:
            data(f"not judged, {found.reason}\t{text}")
        else:
            data(f"{found.label} {found.probabilities[found.label]:.3f}\t{text}")


def _rest(found: Verdict) -> dict[str, object]:
    return {"probabilities": found.probabilities, "reason": found.reason}


@group.command(epilog="Example: llama2 classify train refusal --data data --out refusal.npz")
def train(
    name: Annotated[
        Literal["refusal", "toxicity", "truth", "information"], typer.Argument(help="What the classifier judges.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The classifier to write.")],
    folder: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder of the sets, one folder each.")] = Path(
        "data"
    ),
    as_json: Json = False,
) -> None:
    """Train a classifier from public sets, and report how right it is on texts that it did not see.

    The package's own classifiers are what this writes. It takes less than a minute.
    """
    from llama2.classify.training import TRAIN, lines

    made, report = TRAIN[name](folder)
    made.save(out)
    if as_json:
        data(json.dumps(report))
        return
    for line in lines(report):
        say(line)
    say(f"{out}: use it with llama2 classify {name} --weights {out}")
