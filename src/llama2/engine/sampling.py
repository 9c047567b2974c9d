"""From one row of logits to one token. The arithmetic is native, so that it is the same for every runner."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llama2 import native
from llama2.engine.request import Logprob, Request
from llama2.engine.watermark import Marking
from llama2.errors import EngineError


class Sampler:
    """Draws the tokens of one request, in the order that Sampling states, after the request's own processors.

    A watermark comes last, over what temperature and truncation left.

    The uniform number of a draw is a function of (seed, choice, index of the drawn token in the sequence). It is the
    first output of Philox4x64-10 with key (seed, choice) and counter (index, 0, 0, 0): its upper 53 bits over 2 ** 53.
    """

    def __init__(self, request: Request) -> None:
        s = request.sampling
        self._processors = request.processors
        self._prompt_length = len(request.prompt)
        self._sample, self._sample_marked = native.module().sample, native.module().sample_marked
        self._marking = Marking(request.watermark, len(request.prompt)) if request.watermark and s.temperature else None
        self._settings = (
            *(self._prompt_length, s.temperature, s.top_k, s.top_p, s.min_p),
            *(s.repetition_penalty, s.presence_penalty, s.frequency_penalty),
            np.array(list(s.logit_bias.keys()), np.int32),
            np.array(list(s.logit_bias.values()), np.float32),
            *(s.seed, request.choice),
        )

    def draw(self, logits: NDArray[np.float32], history: NDArray[np.int32]) -> int:
        """The token that follows `history`; the processors edit `logits` (V,) in place.

        Raises EngineError when a logit is not a number, or when all are −inf and so nothing may be drawn.
        """
        for process in self._processors:
            process(logits, history, self._prompt_length)
        watermark = None if self._marking is None else self._marking.at(history)
        if watermark is None:
            token: int = self._sample(logits, history, *self._settings, len(history))
        else:
            token = self._sample_marked(watermark, logits, history, *self._settings, len(history))
        if token >= 0:
            return token
        raise EngineError(
            f"position {len(history)}: there is nothing to draw, because a logit is not a number or all are −inf; "
            "check the model file, logit_bias and processors"
        )


def logprob(logits: NDArray[np.float32], token: int, top: int) -> Logprob:
    """Log-softmax of `logits` (V,) at `token` and at the `top` likeliest. Raises EngineError when not a number."""
    tokens, values = np.empty(top, np.int32), np.empty(top, np.float32)
    value: float = native.module().logprobs(logits, token, tokens, values)
    if math.isnan(value):
        raise EngineError("a logit is not a number; check the model file")
    return Logprob(token, value, tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
