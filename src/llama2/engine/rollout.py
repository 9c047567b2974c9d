"""Rollouts: several sampled answers to each prompt, for reinforcement learning over a live network.

runner = LiveNativeRunner(model.config, model.tensors, n_blocks)  # or LiveTorchRunner(model, n_blocks)
engine = Engine(runner, tokenizer)
groups = rollout(engine, prompts, 8, Sampling(temperature=1, top_p=1), max_tokens=64)
...                                                                 # an optimizer step changes the weights in place
engine.weights_changed()                                            # before the next rollout
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama2.engine.answer import collect
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import FinishReason, Request, Sampling, whole


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled answer of T tokens; the last may be an end token.

    `logprobs` are the raw model's: natural log-softmax of the logits, before penalties, temperature and top-p. With
    `Sampling(temperature=1, top_p=1)` tokens are drawn from exactly that distribution.
    """

    tokens: NDArray[np.int32]  # (T,)
    logprobs: NDArray[np.float32]  # (T,)
    finish_reason: FinishReason
    cached_tokens: int  # of the prompt


def rollout(
    engine: EngineProtocol,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
) -> list[list[Rollout]]:
    """`n` answers to each prompt of token ids, all in one batch.

    Every answer has random numbers of its own, a function of `sampling.seed` and its place among all. So the same call
    over the same weights gives the same rollouts; choose another seed for the next call. Raises as `Engine.add` does;
    EngineError when the model fails.
    """
    whole("n", n, 1, 1 << 30)
    requests = [
        Request(
            tuple(prompt),
            max_tokens,
            sampling,
            stop_tokens=frozenset(stop_tokens),
            logprobs=0,
            choice=i * n + k,
        )
        for i, prompt in enumerate(prompts)
        for k in range(n)
    ]
    rollouts = [
        Rollout(
            np.array(answer.token_ids, np.int32),
            np.array([score.logprob for score in answer.logprobs or ()], np.float32),
            answer.finish_reason,
            answer.cached_tokens,
        )
        for answer in collect(engine.run(*requests), requests)
    ]
    return [rollouts[start : start + n] for start in range(0, len(rollouts), n)]
