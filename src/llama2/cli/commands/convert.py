"""`llama2 convert`: a model in another file format, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llama2.cli.local_models import FileOptions, local_path
from llama2.cli.output import one_line, warn
from llama2.cli.signals import exit_on_signals
from llama2.console import data, say

EXAMPLE = "Example: llama2 convert Llama-2-7b-chat-hf llama-2-7b-chat.gguf --to gguf --format Q8_0"


def command(  # 9 parameters: one for each option
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model that is here: name, file or folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The file or folder to make.")],
    to: Annotated[
        Literal["gguf", "hf", "meta", "llama2c"],
        typer.Option(help="Files for llama.cpp, for transformers, as Meta's, or for llama2.c."),
    ],
    files: FileOptions,
    shards: Annotated[int, typer.Option(min=1, metavar="N", help="Meta: number of files, one for each process.")] = 1,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="F32, F16, BF16, for GGUF also Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, for llama2.c Q8_0.",
            show_default="the source's, F32 where DST has it not",
        ),
    ] = None,
    receipt: Annotated[
        Literal["full", "tensors"],
        typer.Option(help="full also runs both models, which need room in memory; tensors compares without."),
    ] = "full",
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier conversion left at DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as one JSON object.")] = False,
) -> None:
    """Write a model in another file format, and prove that nothing was lost.

    The receipt, JSON beside DST or in its folder, compares every number, both tokenizers and chat templates, and what
    both models answer. If anything is out of bounds, nothing is left at DST.
    """
    from llama2.convert import convert as run
    from llama2.convert.receipt import lost

    with exit_on_signals():
        proof = run(
            local_path(source),
            target,
            to,
            format=format.upper() if format else None,
            **files.arguments(),
            shards=shards,
            run=receipt == "full",
            force=force,
        )
    for words in lost(proof):
        warn(f"{target}: {to} has no place for {words}")
    data(json.dumps(proof)) if as_json else say(_summary(target, proof))


def _summary(target: Path, proof: dict[str, Any]) -> str:
    tensors, template, answers = proof["tensors"], proof["chat_template"], proof.get("answers")
    rounded = [each for each in tensors["each"].values() if "rounded_to" in each]
    words = [f"{tensors['bitwise_equal']} of {tensors['count']} tensors have the same numbers, bit by bit"]
    if rounded:
        formats = ", ".join(sorted({each["rounded_to"] for each in rounded}))
        worst = max(each["relative_rms"] for each in rounded)
        words.append(f"{len(rounded)} are rounded to {formats}, off by up to {worst:.2%} (RMS)")
    words.append(f"{proof['tokenizer']['strings']:,} texts have the same tokens")
    if template["kept"]:
        words.append(f"{template['dialogs']} dialogs too")
    if answers:
        count = len(answers["tokens"])
        words.append(
            f"the same logits, bit by bit, for {count} tokens"
            if answers["bitwise_equal"]
            else f"{answers['same_tokens']} of {count} greedy tokens are the same, "
            f"KL divergence {answers['mean_divergence']:.2g} nats"
        )
    return f"{one_line(target)}: " + "; ".join(words)
