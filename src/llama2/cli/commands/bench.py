"""`llama2 bench`: speed, and how near it is to what the machine can do."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llama2 import plan
from llama2.cli.options import ModelOptions
from llama2.console import data, say
from llama2.engine.request import Event, Request, Sampling
from llama2.errors import ContextError, EngineError

if TYPE_CHECKING:
    from llama2.api import Model
    from llama2.engine.protocol import EngineProtocol

EXAMPLE = "Example: llama2 bench -m smollm2-135m-instruct --prompt 512 --generate 128 --threads 2 --json"
_SECONDS = 0.25  # for each of the machine's limits, in each repeat


def command(
    *,
    model: ModelOptions,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt that prefill reads.")] = 512,
    generate: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that decode writes.")] = 128,
    depth: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt before decode.")] = 1,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once, each of so many tokens.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Repeats; their medians are printed.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every repeat.")] = False,
) -> None:
    """Measure speed, and this machine's limits.

    Prefill and decode run through the whole engine, and the limits are measured between them.

    prefill tokens/s = batch * prompt / seconds until every prompt has its first token.
    Its share of the limit = 2 * (weights of the layers + weights of the output head / prompt) * tokens/s
    / int8 operations/s; a multiply-add is two operations, and attention's own products are left out.

    decode tokens/s = batch * generate / seconds of so many steps, in each of which every sequence gets a token.
    Its share of the limit = bytes of weights that a step needs, as the file holds them, * steps/s
    / bytes/s of reading memory; keys and values are left out.

    The JSON's peak_memory_bytes is the process's largest resident set before the limits, which need memory of their
    own, are measured.
    """
    from llama2 import native
    from llama2.engine.scheduler import MAX_SEQUENCES

    if batch > MAX_SEQUENCES:
        raise typer.BadParameter(f"--batch {batch} is more than the {MAX_SEQUENCES} sequences that run at once")
    threads = model.threads or native.default_threads()
    work = Work(prompt=prompt, generate=generate, depth=depth, batch=batch)
    with model.load(sequences=batch) as loaded:
        prefill(loaded, work)  # the first ones read the file and wake the processor
        decode(loaded, work)
        peak = peak_memory()
        with typer.progressbar(
            range(repeat), label="measuring", file=sys.stderr, hidden=not sys.stderr.isatty()
        ) as repeats:
            runs = [measure(loaded, threads, work) for _ in repeats]
        medians = {field.name: median(getattr(run, field.name) for run in runs) for field in fields(Run)}
        about = {
            "model": model.name,
            "formats": Counter(tensor.format for tensor in loaded.checkpoint.tensors.values()),
            "parameters": loaded.config.parameters(),
            "runner": model.runner,
            "instruction_set": native.module().isa,
            "threads": threads,
            **asdict(work),
            "peak_memory_bytes": peak,
        }
    if as_json:
        data(json.dumps({**about, **medians, "runs": [asdict(run) for run in runs]}))
        return
    m = Run(**medians)
    formats = ", ".join(f"{count} {name}" for name, count in about["formats"].most_common())
    sequences = f", {batch} sequences at once" if batch > 1 else ""
    say(f"{model.name}: {about['parameters'] / 1e6:.1f} M parameters, tensors {formats}")
    say(f"{model.runner} runner, {about['instruction_set']}, {threads} threads{sequences}, medians of {repeat}")
    int8, read = m.int8_operations_per_second / 1e9, m.read_bytes_per_second / 1e9
    say(
        f"prefill {prompt:>6} tokens {m.prefill_tokens_per_second:>10.1f} tokens/s {m.prefill_share_of_int8:>7.1%} "
        f"of {int8:.0f} G int8/s"
    )
    say(
        f"decode  {generate:>6} tokens {m.decode_tokens_per_second:>10.1f} tokens/s {m.decode_share_of_read:>7.1%} "
        f"of {read:.1f} GB/s"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a repeat does: tokens of each sequence, and how many sequences there are at once."""

    prompt: int  # of prefill
    generate: int  # of decode
    depth: int = 1  # of the prompt before decode
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One repeat: the model's speeds and the machine's limits, measured within the same seconds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    int8_operations_per_second: float
    read_bytes_per_second: float
    prefill_share_of_int8: float
    decode_share_of_read: float


def measure(model: Model, threads: int, work: Work) -> Run:
    """One repeat of `llama2 bench`. Raises ContextError when prompt or answer do not fit the context."""
    from llama2 import native

    machine, checkpoint = native.module(), model.checkpoint
    needed = plan.bytes_read(checkpoint.config, {name: tensor.format for name, tensor in checkpoint.tensors.items()})
    int8 = machine.int8_gemm_rate(threads, _SECONDS)
    prefilled = prefill(model, work)
    read = machine.read_bandwidth(threads, _SECONDS)
    decoded = decode(model, work)
    return Run(
        prefill_tokens_per_second=prefilled,
        decode_tokens_per_second=decoded,
        int8_operations_per_second=int8,
        read_bytes_per_second=read,
        prefill_share_of_int8=plan.prefill_flops(checkpoint.config, work.prompt) / work.prompt * prefilled / int8,
        decode_share_of_read=needed * decoded / work.batch / read,
    )


def prefill(model: Model, work: Work) -> float:
    """Tokens a second of all prompts, from their arrival until each has its first token."""
    start = time.perf_counter()
    for request in _requests(model, work.batch, work.prompt, 1):
        model.engine.add(request)
    while model.engine.busy:
        _step(model.engine)
    return work.batch * work.prompt / (time.perf_counter() - start)


def decode(model: Model, work: Work) -> float:
    """Tokens a second of all answers, over steps that each give every sequence a token.

    A long prompt's sequences begin one after the other, and the first write on while the last are read: in steps as
    long as prompts alone would make them, so that it is little. They are asked for all that the context holds, and
    cancelled at the end.
    """
    from llama2.engine.engine import Engine

    context = model.engine.context
    runner = cast(Engine, model.engine).runner
    engine = Engine(runner, model.tokenizer, context=context, max_prefill_tokens=plan.STEP)
    requests = [engine.add(request) for request in _requests(model, work.batch, work.depth, None)]
    begun: set[int] = set()
    while len(begun) < work.batch:
        begun |= {event.request for event in _step(engine)}
    tokens, start = 0, time.perf_counter()
    while tokens < work.batch * work.generate:
        events = _step(engine)
        if len(events) < work.batch:
            raise ContextError(
                f"--depth {work.depth} and --generate {work.generate} do not fit the context of {context} "
                "tokens; choose fewer, or a longer --context"
            )
        tokens += len(events)
    seconds = time.perf_counter() - start
    for request in requests:
        engine.cancel(request)
    while engine.busy:
        _step(engine)
    return tokens / seconds


def _requests(model: Model, count: int, prompt: int, answer: int | None) -> list[Request]:
    """Requests of `prompt` tokens, no two alike, whose answers nothing but their length ends."""
    vocabulary = model.config.vocab_size
    sampling = Sampling(temperature=0, logit_bias=dict.fromkeys(model.tokenizer.stop_ids, -math.inf))
    return [
        Request(
            prompt=tuple(i % vocabulary for i in range(1 + n * prompt, 1 + (n + 1) * prompt)),
            max_tokens=answer,
            sampling=sampling,
            cache_prompt=False,
        )
        for n in range(count)
    ]


def _step(engine: EngineProtocol) -> list[Event]:
    """One step of the engine. Raises EngineError when it failed."""
    events = engine.step()
    for event in events:
        if event.error is not None:
            raise EngineError(event.error)
    return events


def peak_memory() -> int | None:
    """Bytes of the largest resident set that this process has had; None on Windows, which counts otherwise."""
    try:
        with open("/proc/self/status") as status:  # Linux's getrusage also counts the process that started this one
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
