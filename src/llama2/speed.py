"""Speed of an engine, prefill and decode, and how near it is to the machine's limits."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama2 import plan
from llama2.engine.request import Event, Request, Sampling
from llama2.errors import ContextError, EngineError

if TYPE_CHECKING:
    from llama2.checkpoint import Checkpoint
    from llama2.engine.engine import Engine
    from llama2.engine.protocol import EngineProtocol

#: For each of the machine's limits.
LIMIT_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Tokens of each sequence, and how many sequences run at once."""

    prompt: int  # of prefill
    generate: int  # of decode
    depth: int = 1  # of the prompt before decode
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """The model's speeds and the machine's limits, measured within the same seconds."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    int8_operations_per_second: float
    read_bytes_per_second: float
    prefill_share_of_int8: float
    decode_share_of_read: float


def measure(checkpoint: Checkpoint, engine: Engine, threads: int, work: Workload) -> Speed:
    """All speeds once. Raises ContextError when prompt or answer do not fit the context."""
    from llama2 import native

    machine, config = native.module(), checkpoint.config
    needed = plan.bytes_read(config, {name: tensor.format for name, tensor in checkpoint.tensors.items()})
    int8 = machine.int8_gemm_rate(threads, LIMIT_SECONDS)
    prefilled = prefill(checkpoint, engine, work)
    read = machine.read_bandwidth(threads, LIMIT_SECONDS)
    decoded = decode(checkpoint, engine, work)
    return Speed(
        prefill_tokens_per_second=prefilled,
        decode_tokens_per_second=decoded,
        int8_operations_per_second=int8,
        read_bytes_per_second=read,
        prefill_share_of_int8=plan.prefill_flops(config, work.prompt) / work.prompt * prefilled / int8,
        decode_share_of_read=needed * decoded / work.batch / read,
    )


def prefill(checkpoint: Checkpoint, engine: EngineProtocol, work: Workload) -> float:
    """Tokens a second of all prompts, from their arrival until each has its first token."""
    start = time.perf_counter()
    for request in _requests(checkpoint, work.batch, work.prompt, 1):
        engine.add(request)
    while engine.busy:
        _step(engine)
    return work.batch * work.prompt / (time.perf_counter() - start)


def decode(checkpoint: Checkpoint, engine: Engine, work: Workload) -> float:
    """Tokens a second of all answers, over steps that each give every sequence a token.

    Long prompts are read one after the other, while the first sequences decode already. Steps are then as long as
    prompts alone would make them, so that these tokens are few. Requests may fill the context; at the end they are
    cancelled.
    """
    from llama2.engine.engine import Engine

    context = engine.context
    engine = Engine(engine.runner, checkpoint.tokenizer, context=context, max_prefill_tokens=plan.STEP)
    requests = [engine.add(request) for request in _requests(checkpoint, work.batch, work.depth, None)]
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


def _requests(checkpoint: Checkpoint, count: int, prompt: int, answer: int | None) -> list[Request]:
    """Requests of `prompt` tokens, no two alike, whose answers only their length ends."""
    vocabulary = checkpoint.config.vocab_size
    sampling = Sampling(temperature=0, logit_bias=dict.fromkeys(checkpoint.tokenizer.stop_ids, -math.inf))
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
