"""Two models' answers to one prompt: logits and greedy tokens through the engine, one model in memory at a time.

T tokens of the answer  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.checkpoint import Checkpoint, Tensor
from llama2.convert.bounds import DIVERGENCE
from llama2.convert.samples import PROMPT
from llama2.engine import divergence
from llama2.engine.answer import collect
from llama2.engine.engine import Engine
from llama2.engine.request import Request, Sampling
from llama2.engine.runner_native import NativeRunner
from llama2.engine.scheduler import blocks_for
from llama2.errors import EngineError, ParityError
from llama2.formats import FORMATS
from llama2.hub.progress import Progress

Row = NDArray[np.float32]  # (V,)

#: Greedy tokens, and how many at most come before them.
TOKENS, PROMPT_TOKENS = 200, 32

#: Where a configuration's numbers are rounded, as rotary divisors are in GGUF, logits differ in their last bits.
_ROUNDED = 1e-6


def compare(source: Checkpoint, output: Checkpoint, lossy: Collection[str], report: Progress) -> dict[str, Any]:
    """Let the source continue a text greedily, and the output along the same tokens, and compare all logits.

    `lossy` are the formats to which tensors were rounded. Without any, every logit must have the same bits. Quantized
    weights that became float32 run as float32 on both sides, as the engine multiplies others as integers. With
    some, only bounds are possible, and the next token's distribution must not diverge further than they allow. Raises
    ParityError, and EngineError when a model cannot run.
    """
    tokenizer, context = source.tokenizer, min(source.config.context_length, output.config.context_length)
    prompt = tokenizer.encode(PROMPT, bos=tokenizer.add_bos)[: min(PROMPT_TOKENS, context - 1)] or [0]
    count = min(TOKENS, context - len(prompt))
    as_run = replace(source, tensors={name: _as_run(t, output.tensors[name]) for name, t in source.tensors.items()})
    first = GreedyAnswer(as_run, prompt, count, partial(report, "running the source"))
    second = GreedyAnswer(output, prompt, count, partial(report, "running the output"), first.tokens)

    pairs = list(zip(first.logits, second.logits, strict=True))
    same = [np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in pairs]
    largest = max(float(np.abs(a - b).max()) for a, b in pairs)
    divergences = [_divergence(a, b) for a, b in pairs]
    mean = math.fsum(divergences) / count
    limit = max(DIVERGENCE[format] for format in lossy) if lossy else 0.0
    rotations = [(c.inverse_frequencies(), c.attention_factor()) for c in (source.config, output.config)]
    if rotations[0] != rotations[1]:
        limit = max(limit, _ROUNDED)
    if limit == 0 and not all(same):
        raise ParityError(f"logits differ by up to {largest:.3g}, from token {same.index(False)} of an answer on")
    if not mean <= limit:
        raise ParityError(f"next-token distributions diverge by {mean:.3g} nats on average; the limit is {limit:g}")
    return {
        "prompt": prompt,
        "tokens": first.tokens,
        "same_tokens": sum(a == b for a, b in zip(first.tokens, second.preferred, strict=True)),
        "bitwise_equal": all(same),
        "largest_logit_difference": largest,
        "mean_divergence": mean,
        "largest_divergence": max(divergences),
        "divergence_limit": limit,
    }


def _as_run(tensor: Tensor, output: Tensor) -> Tensor:
    return tensor.in_float32() if FORMATS[tensor.format].block > 1 and output.format == "F32" else tensor


class GreedyAnswer:
    """`count` greedy tokens of a model, none of which ends the answer, or the given `tokens` instead.

    `logits` are those that each token was drawn from, and `preferred` the likeliest tokens by them.
    """

    def __init__(
        self,
        model: Checkpoint,
        prompt: list[int],
        count: int,
        report: Callable[[int, int], None],
        tokens: list[int] | None = None,
    ) -> None:
        self._report, self._count = report, count
        self._size = sum(tensor.nbytes for tensor in model.tensors.values())  # about what each token reads
        self.logits: list[Row] = []
        self.preferred: list[int] = []
        self._follow, self._stops = tokens, sorted(model.tokenizer.stop_ids)
        context = len(prompt) + count
        engine = Engine(NativeRunner(model, blocks_for(context)), model.tokenizer, context=context)
        request = Request(tuple(prompt), count, Sampling(temperature=0), processors=(self._process,))
        try:
            collect(engine.run(request), [request])
        except EngineError as error:
            raise EngineError(f"{model.path}: {error}") from None
        self.tokens = tokens or self.preferred

    def _process(self, logits: Row, history: NDArray[np.int32], prompt_length: int) -> None:
        self.logits.append(logits.copy())
        self._report(self._size * len(self.logits), self._size * self._count)
        logits[self._stops] = -np.inf
        self.preferred.append(int(logits.argmax()))
        if self._follow is not None:
            logits[:] = -np.inf
            logits[self._follow[len(history) - prompt_length]] = 0


def _divergence(p: Row, q: Row) -> float:
    log_p, log_q = (divergence.log_softmax(x[None].astype(np.float64)) for x in (p, q))
    return float(divergence.kl_divergence(log_p, log_q)[0])
