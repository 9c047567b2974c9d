"""`llama2 moderate`: what a policy says of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from llama2.cli.options import Json, PolicyFile, inputs, moderator
from llama2.cli.output import warn
from llama2.console import data

RECIPES = {"llama2 moderate": "llama2.safety.policy:Policy"}

EXAMPLE = "Example: llama2 moderate 'Have a nice day.' --json"


def command(
    *,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="One input each.", show_default="standard input's lines"),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="More inputs, one a line.")] = None,
    policy: PolicyFile = None,
    guard: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Judge by this Llama Guard.", show_default="the policy's judge"),
    ] = None,
    side: Annotated[
        Literal["input", "output"], typer.Option(help="Judge the texts as prompts, or as answers.")
    ] = "input",
    categories: Annotated[
        bool, typer.Option("--categories", help="Show the categories, and how those of others map to them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge texts by a policy: a line with action, category, scores and text.

    By default the small classifiers judge, which know harassment in English alone. What was not judged has no score.
    """
    if categories:
        _show_categories(as_json=as_json)
        return
    given = inputs(texts, file)
    judging = moderator(policy, guard)
    if judging.unjudgeable:
        warn(f"not judged by {judging.judge.name}: {', '.join(judging.unjudgeable)}; give them phrases, or a guard")
    for text in given:
        said = [{"role": "user", "content": text}]
        if side == "output":
            said = [{"role": "user", "content": "…"}, {"role": "assistant", "content": text}]
        verdict = judging.moderate(said, side)
        if as_json:
            data(json.dumps({"text": text, **judging.result(verdict)}, ensure_ascii=False))
            continue
        scores = ", ".join(f"{name} {score:.3f}" for name, score in verdict.scores.items() if score >= 0.01)
        what = verdict.action or ("not judged" if verdict.reason else "pass")
        about = verdict.category or verdict.reason or ""
        data("\t".join((what, about, scores, text)))


def _show_categories(*, as_json: bool) -> None:
    from llama2.safety.categories import CATEGORIES, table

    columns = ("category", "paper", "llama_guard_1", "llama_guard_3", "openai")
    for row in table():
        if as_json:
            data(json.dumps({**dict(zip(columns, row, strict=True)), "meaning": CATEGORIES[row[0]].meaning}))
        else:
            data("\t".join(row))
