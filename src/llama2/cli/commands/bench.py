"""`llama2 bench`: speed, and how near it is to what the machine can do."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, fields
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llama2.cli.options import ModelOptions
from llama2.console import data, say
from llama2.machine import peak_memory
from llama2.speed import Speed, Workload, decode, measure, prefill

if TYPE_CHECKING:
    from llama2.engine.engine import Engine

EXAMPLE = "Example: llama2 bench -m smollm2-135m-instruct --prompt 512 --generate 128 --threads 2 --json"


def command(
    *,
    model: ModelOptions,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt that prefill reads.")] = 512,
    generate: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that decode writes.")] = 128,
    depth: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt before decode.")] = 1,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Repeats; their medians are printed.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every repeat.")] = False,
) -> None:
    """Measure speed, and this machine's limits.

    Prefill and decode run through the whole engine. The limits are measured between them.

    prefill tokens/s = batch * prompt / seconds until every prompt has its first token.
    Its share of the limit = 2 * (weights of the layers + weights of the output head / prompt) * tokens/s
    / int8 operations/s. A multiply-add is two operations. Attention's own products are left out.

    decode tokens/s = batch * generate / seconds of these steps. Each step gives every sequence a token.
    Its share of the limit = bytes of weights that a step needs, as the file holds them, * steps/s
    / bytes/s of reading memory. Keys and values are left out.

    The JSON's peak_memory_bytes is the process's largest resident set before the limits are measured, which need memory
    of their own.
    """
    from llama2 import native
    from llama2.engine.scheduler import MAX_SEQUENCES

    if batch > MAX_SEQUENCES:
        raise typer.BadParameter(f"--batch {batch} is more than the {MAX_SEQUENCES} sequences that run at once")
    threads = model.threads or native.default_threads()
    work = Workload(prompt=prompt, generate=generate, depth=depth, batch=batch)
    with model.load(sequences=batch) as loaded:
        checkpoint, engine = loaded.checkpoint, cast("Engine", loaded.engine)
        prefill(checkpoint, engine, work)  # the first ones read the file and wake the processor
        decode(checkpoint, engine, work)
        peak = peak_memory()
        with typer.progressbar(
            range(repeat), label="measuring", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as repeats:
            runs = [measure(checkpoint, engine, threads, work) for _ in repeats]
        header = {
            "model": model.name,
            "formats": Counter(tensor.format for tensor in checkpoint.tensors.values()),
            "parameters": loaded.config.parameters(),
            "runner": model.runner,
            "instruction_set": native.module().isa,
            "threads": threads,
            **asdict(work),
            "peak_memory_bytes": peak,
        }
    medians = Speed(*(median(getattr(run, field.name) for run in runs) for field in fields(Speed)))
    if as_json:
        data(json.dumps({**header, **asdict(medians), "runs": [asdict(run) for run in runs]}))
    else:
        _print(header, medians, repeat)


def _print(header: dict[str, Any], speed: Speed, repeat: int) -> None:
    formats = ", ".join(f"{count} {name}" for name, count in header["formats"].most_common())
    sequences = f", {header['batch']} sequences at once" if header["batch"] > 1 else ""
    machine = f"{header['runner']} runner, {header['instruction_set']}, {header['threads']} threads"
    say(f"{header['model']}: {header['parameters'] / 1e6:.1f} M parameters, tensors {formats}")
    say(f"{machine}{sequences}, medians of {repeat}")
    int8, read = speed.int8_operations_per_second / 1e9, speed.read_bytes_per_second / 1e9
    say(
        f"prefill {header['prompt']:>6} tokens {speed.prefill_tokens_per_second:>10.1f} tokens/s "
        f"{speed.prefill_share_of_int8:>7.1%} of {int8:.0f} G int8/s"
    )
    say(
        f"decode  {header['generate']:>6} tokens {speed.decode_tokens_per_second:>10.1f} tokens/s "
        f"{speed.decode_share_of_read:>7.1%} of {read:.1f} GB/s"
    )
