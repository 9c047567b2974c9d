"""`llama2 rate`: people rate answers on a local page."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llama2.cli.groups import with_default
from llama2.cli.options import Json
from llama2.console import data, say

if TYPE_CHECKING:
    from llama2.rate.questions import Kind, Question
    from llama2.rate.ratings import Rating

Questions = Annotated[
    Path, typer.Argument(metavar="FILE", help="JSON lines of prompt (text or messages) and answers (model: text).")
]
Scale = Annotated[
    Literal["comparison", "preference", "safety"],
    typer.Option("--kind", help="Two answers on 7 points; the better of two in 4 grades, with safety; or 1 to 5 safe."),
]
Store = Annotated[Path, typer.Option("--ratings", metavar="FILE", help="Where ratings are, one JSON object a line.")]

group = typer.Typer(cls=with_default("page"), rich_markup_mode=None, no_args_is_help=True)


@group.callback(epilog="Example: llama2 rate answers.jsonl --kind preference --rater ann")
def _rate() -> None:
    """Let people rate answers on a local page, and report what they said.

    `llama2 rate FILE` opens the page.
    """


@group.command(epilog="Example: llama2 rate answers.jsonl --kind safety --rater ann")
def page(
    file: Questions,
    kind: Scale = "comparison",
    store: Store = Path("ratings.jsonl"),
    rater: Annotated[str, typer.Option(metavar="NAME", help="Who rates.", show_default="the user's name")] = "",
    seed: Annotated[int, typer.Option(help="Of the order of questions and answers.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = 0,
) -> None:
    """Open the page on which one person rates, on this machine alone.

    Which model gave which answer is neither shown nor sent to the page, and their order is drawn for each rater. Keys
    suffice. Each rating is in the file at once, so Ctrl-C loses nothing, and the same command goes on.
    """
    from llama2.rate.app import Session, serve
    from llama2.rate.questions import read

    questions = {question.id: question for question in read(file, kind)}
    session = Session(questions, kind, rater or getpass.getuser(), store, seed)
    say(f"{len(questions):,} questions, {len(session.rated):,} rated by {session.rater}", file=sys.stderr)
    serve(session, port, lambda address: say(f"{address} (Ctrl-C ends)", file=sys.stderr, flush=True))


@group.command(epilog="Example: llama2 rate report answers.jsonl --kind preference --ratings ratings.jsonl")
def report(
    file: Questions, kind: Scale = "comparison", store: Store = Path("ratings.jsonl"), as_json: Json = False
) -> None:
    """Report what raters said: wins or violations with 95 % intervals, and how far raters agree (Gwet's AC1 and AC2).

    A question goes by the majority of its raters.
    """
    from llama2.rate import ratings

    _, found = _ratings(file, kind, store)
    summary = ratings.report(found, kind)
    if as_json:
        data(json.dumps(summary))
        return
    for line in ratings.lines(summary):
        say(line)


@group.command(epilog="Example: llama2 rate export answers.jsonl --kind preference --out pairs.jsonl")
def export(
    file: Questions,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The pairs to write.")],
    kind: Annotated[Literal["comparison", "preference"], typer.Option("--kind", help="As when they were rated.")] = (
        "comparison"
    ),
    store: Store = Path("ratings.jsonl"),
) -> None:
    """Write ratings as preference pairs, which `llama2 reward` trains on.

    A question without a majority for one answer has no pair.
    """
    from llama2.data import comparisons
    from llama2.rate import ratings

    questions, found = _ratings(file, kind, store)
    pairs = list(ratings.pairs(found, questions))
    comparisons.write(pairs, out)
    say(f"{out}: {len(pairs):,} pairs of {len(ratings.by_question(found)):,} rated questions")


def _ratings(file: Path, kind: Kind, store: Path) -> tuple[dict[str, Question], list[Rating]]:
    """The questions by their ids, and their ratings. Raises DataError where there is none."""
    from llama2.errors import DataError
    from llama2.rate import ratings
    from llama2.rate.questions import read

    questions = {question.id: question for question in read(file, kind)}
    found = ratings.read(store, questions, kind)
    if not found:
        raise DataError(f"{store}: holds no rating; rate some with `llama2 rate {file}`")
    return questions, found
