"""What a caller asks of the engine, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama2.errors import ContextError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "cancelled", "error"]

#: Edits a row of logits (V,) in place before penalties, given the tokens so far and how many of them are the prompt's.
Processor = Callable[["NDArray[np.float32]", "NDArray[np.int32]", int], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Order: penalties, logit bias, temperature, top-k, top-p, min-p, draw.

    `temperature` 0 is greedy. `top_p` follows Meta: a token stays while the probability mass before it is ≤ top_p.
    `repetition_penalty` looks at prompt and answer, `presence_penalty` and `frequency_penalty` at the answer alone.
    Equal logits are ordered by token id. Random numbers depend on (seed, choice, position) and nothing else.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 100.0),
            "top_p": (0.0, 1.0),
            "top_k": (0, 1 << 30),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "presence_penalty": (-100.0, 100.0),
            "frequency_penalty": (-100.0, 100.0),
            "seed": (0, (1 << 64) - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise RequestError(f"{name}={value!r} must be between {low} and {high}")
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), int):
                raise RequestError(f"{name}={getattr(self, name)!r} must be a whole number")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0:
                raise RequestError(f"logit_bias: {token!r} is not a token id")
            if not isinstance(bias, (int, float)) or math.isnan(bias) or bias == math.inf:
                raise RequestError(f"logit_bias: token {token} has bias {bias!r}, which must be a number or -inf")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the limits of its answer.

    `stop` strings end the answer and are left out of its text; `stop_tokens` likewise by id. `logprobs` asks, for each
    token of the answer, for its log-probability (of the raw logits) and that of so many likeliest alternatives.
    `prompt_logprobs` asks the same of the prompt's tokens after the first; then `max_tokens` may be 0. `lookup` is how
    many tokens a step may draft by prompt lookup: the answer stays the same, and one that repeats itself or its prompt
    comes faster. What the cache holds of the prompt's beginning is not computed again, but with `prompt_logprobs`, or
    where `cache_prompt` forbids it.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None  # None: as many as the context holds
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None  # None: none; 0: the drawn token's alone
    prompt_logprobs: bool = False
    choice: int = 0  # which of several answers to one prompt; part of the random numbers' key
    continues: bool = False  # whether the answer's text goes on where the prompt's ends, and keeps its first space
    processors: tuple[Processor, ...] = ()
    lookup: int = 0  # 0: off
    cache_prompt: bool = True

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        limits = {
            "max_tokens": (least, 1 << 62),
            "logprobs": (0, 1 << 30),
            "choice": (0, (1 << 64) - 1),
            "lookup": (0, 1024),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RequestError(f"{name}={value!r} must be a whole number between {low} and {high}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop: {text!r} must be a text of at least one character")


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token under the raw logits, and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):  # which is quicker to make than a dataclass: every token has one
    """One token of one request's answer.

    `text` is what became certain with this token: whole characters, held back while a stop string may be forming.
    The last event of a request has `finish`, and tells how many tokens of the prompt were found in the cache, how many
    tokens were drafted, and how many of those were drawn. With `finish="error"`, `error` says why.
    """

    request: int  # the id that Engine.add returned
    token: int | None
    text: str
    finish: FinishReason | None = None
    logprob: Logprob | None = None
    error: str | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None  # in the first event, if asked: the prompt after its first token
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine has to do, and how full its key/value cache is."""

    running: int  # requests
    waiting: int
    prefill_tokens: int  # at most, of all requests, that have yet to run before each can grow; fewer with prefix hits
    blocks: int  # of the cache
    held_blocks: int  # by requests
    kept_blocks: int  # in case that their tokens come again; free otherwise
    preemptions: int  # since the engine was made


def answer_limit(request: Request, context: int, vocabulary: int) -> int:
    """How many tokens the answer may have, in an engine of that context and a model of so many tokens.

    Raises ContextError when prompt and answer do not fit the context, RequestError when the prompt is empty or
    something is not in the vocabulary.
    """
    length = len(request.prompt)
    if length == 0:
        raise RequestError("the prompt is empty; start with at least one token, such as BOS")
    answer = max(1, context - length) if request.max_tokens is None else request.max_tokens
    if length + answer > context:
        raise ContextError(
            f"prompt of {length} tokens and answer of {answer} do not fit the context of {context}; "
            "shorten the prompt, or ask for fewer tokens"
        )
    for name in ("prompt", "stop_tokens"):
        _check_tokens(name, getattr(request, name), vocabulary)
    _check_tokens("logit_bias", request.sampling.logit_bias, vocabulary)
    if request.logprobs is not None and request.logprobs > vocabulary:
        raise RequestError(f"logprobs={request.logprobs} is more than the {vocabulary} tokens of the vocabulary")
    return answer


def _check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not isinstance(token, (int, Integral)) or not 0 <= token < vocabulary:
            raise RequestError(f"{name}: {token!r} is not a token of this model, whose ids are 0 to {vocabulary - 1}")
