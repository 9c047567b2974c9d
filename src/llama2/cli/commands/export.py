"""`llama2 export`: a model for another runtime, compared with ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llama2.cli.local_models import FileOptions, local_path
from llama2.cli.output import one_line, warn
from llama2.cli.signals import exit_on_signals
from llama2.console import data, say

EXAMPLE = "Example: llama2 export smollm2-135m-instruct smollm2-onnx --to onnx --precision int4"


def command(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model that is here: name, file or folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    to: Annotated[Literal["onnx"], typer.Option(help="The form: a folder for onnxruntime-genai.")],
    files: FileOptions,
    precision: Annotated[
        Literal["fp32", "fp16", "int4"], typer.Option(help="Numbers of the weights; fp16 is for dml.")
    ] = "fp32",
    provider: Annotated[
        Literal["cpu", "dml"], typer.Option(help="What runs it: processors, or Windows' DirectML.")
    ] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export left at DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as one JSON object.")] = False,
) -> None:
    """Write a model as ONNX, for Windows' Foundry Local and other programs over onnxruntime-genai.

    The receipt in DST compares it with ours: tokens of texts, the chat template, the logits of 200 tokens. A model for
    DirectML runs on Windows alone; elsewhere it is not compared. It needs `pip install 'whole-llama[onnx]'`.
    """
    from llama2.convert.onnx import export

    with exit_on_signals():
        proof = export(local_path(source), target, precision, provider, **files.arguments(), force=force)
    found = proof["comparison"]
    if found is None:
        warn(f"{target}: was not compared with its source, as a model for {provider} runs on Windows alone")
    else:
        if found["other_tokens"]:
            warn(
                f"{target}: onnxruntime-genai's tokenizer gives {len(found['other_tokens'])} of {found['texts']} texts "
                "other tokens; its receipt lists them"
            )
        if found["template"] is False:
            warn(f"{target}: onnxruntime-genai writes a dialog with other tokens than the model's template")
    data(json.dumps(proof)) if as_json else say(_summary(target, proof))


def _summary(target: Path, proof: dict[str, Any]) -> str:
    found, size = proof["comparison"], sum(file["bytes"] for file in proof["output"]["files"])
    words = [f"{proof['precision']} for {proof['provider']}, {size / 1e6:.0f} MB"]
    if found is not None:
        count = len(found["tokens"])
        words.append(f"{found['same_tokens']} of {count} greedy tokens are the same")
        words.append(f"KL divergence {found['kl_mean']:.2g} nats")
        words.append(f"{found['texts'] - len(found['other_tokens'])} of {found['texts']} texts have the same tokens")
    return f"{one_line(target)}: " + "; ".join(words)
