"""`llama2 bench`: speed, and how near it is to what the machine can do."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from llama2.cli.answer import Reply, follow
from llama2.cli.options import ModelOptions
from llama2.engine.request import Request, Sampling

if TYPE_CHECKING:
    from llama2.api import Model
    from llama2.checkpoint.checkpoint import Checkpoint

EXAMPLE = "Example: llama2 bench -m smollm2-135m-instruct --prompt 512 --generate 128 --threads 2 --json"
_SECONDS = 0.25  # for each of the machine's limits, in each repeat


def bench(
    *,
    model: ModelOptions,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt that prefill reads.")] = 512,
    generate: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that decode writes.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Repeats; their medians are printed.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every repeat.")] = False,
) -> None:
    """Measure speed, and this machine's limits.

    Prefill and decode run through the whole engine, and the limits are measured between them.

    prefill tokens/s = prompt / seconds to the first token.
    Its share of the limit = 2 * (weights of the layers + weights of the output head / prompt) * tokens/s
    / int8 operations/s; a multiply-add is two operations, and attention's own products are left out.

    decode tokens/s = generate / seconds from the first token to the last, after a prompt of one token.
    Its share of the limit = bytes of weights that a token needs, as the file holds them, * tokens/s
    / bytes/s of reading memory.
    """
    from llama2 import native

    threads = model.threads or native.default_threads()
    with model.load() as loaded:
        measure(loaded, threads, prompt, generate)  # the first one reads the file and wakes the processor
        with typer.progressbar(
            range(repeat), label="measuring", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as repeats:
            runs = [measure(loaded, threads, prompt, generate) for _ in repeats]
        medians = {field.name: median(getattr(run, field.name) for run in runs) for field in fields(Run)}
        about = {
            "model": model.name,
            "formats": Counter(tensor.format for tensor in loaded.checkpoint.tensors.values()),
            "parameters": loaded.config.parameters(),
            "runner": model.runner,
            "instruction_set": native.module().isa,
            "threads": threads,
            "prompt": prompt,
            "generate": generate,
        }
    if as_json:
        print(json.dumps({**about, **medians, "runs": [asdict(run) for run in runs]}))
        return
    m = Run(**medians)
    formats = ", ".join(f"{count} {name}" for name, count in about["formats"].most_common())
    print(f"{model.name}: {about['parameters'] / 1e6:.1f} M parameters, tensors {formats}")
    print(f"{model.runner} runner, {about['instruction_set']}, {threads} threads, medians of {repeat}")
    prefill, decode = m.prefill_tokens_per_second, m.decode_tokens_per_second
    int8, read = m.int8_operations_per_second / 1e9, m.read_bytes_per_second / 1e9
    print(
        f"prefill {prompt:>6} tokens {prefill:>10.1f} tokens/s {m.prefill_share_of_int8:>7.1%} of {int8:.0f} G int8/s"
    )
    print(f"decode  {generate:>6} tokens {decode:>10.1f} tokens/s {m.decode_share_of_read:>7.1%} of {read:.1f} GB/s")


@dataclass(frozen=True, slots=True)
class Run:
    """One repeat: the model's speeds and the machine's limits, measured within the same seconds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    int8_operations_per_second: float
    read_bytes_per_second: float
    prefill_share_of_int8: float
    decode_share_of_read: float


def measure(model: Model, threads: int, prompt: int, generate: int) -> Run:
    """One repeat of `llama2 bench`. Raises ContextError when prompt or answer do not fit the context."""
    from llama2 import native

    machine, checkpoint = native.module(), model.checkpoint
    int8 = machine.int8_gemm_rate(threads, _SECONDS)
    prefill = prompt / _follow(model, prompt, 1).first_token_seconds
    read = machine.read_bandwidth(threads, _SECONDS)
    decode = _follow(model, 1, generate + 1).decode_rate() or 0.0
    return Run(
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        int8_operations_per_second=int8,
        read_bytes_per_second=read,
        prefill_share_of_int8=operations(checkpoint, prompt) / prompt * prefill / int8,
        decode_share_of_read=bytes_read(checkpoint) * decode / read,
    )


def _follow(model: Model, prompt: int, answer: int) -> Reply:
    """Run a request of `prompt` tokens, whose answer nothing but its length ends."""
    request = Request(
        prompt=tuple(i % model.config.vocab_size for i in range(1, prompt + 1)),
        max_tokens=answer,
        sampling=Sampling(temperature=0, logit_bias=dict.fromkeys(model.tokenizer.stop_ids, -math.inf)),
    )
    reply = follow(model.engine, request, lambda _: None)
    if reply.finish_reason == "cancelled":
        raise KeyboardInterrupt
    return reply


def operations(checkpoint: Checkpoint, prompt: int) -> int:
    """Multiplications and additions of the matrices in a prefill, whose last token alone needs the output head."""
    weights = {name: math.prod(tensor.shape) for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2}
    head = weights[_head(checkpoint)]
    layers = sum(count for name, count in weights.items() if name.startswith("layers."))
    return 2 * (prompt * layers + head)


def bytes_read(checkpoint: Checkpoint) -> int:
    """Bytes of weights that a token of an answer needs: all but the embeddings, of which it needs one row."""
    unread = {"tok_embeddings.weight"} - {_head(checkpoint)}
    return sum(tensor.data.nbytes for name, tensor in checkpoint.tensors.items() if name not in unread)


def _head(checkpoint: Checkpoint) -> str:
    return "tok_embeddings.weight" if checkpoint.config.tied_embeddings else "output.weight"
