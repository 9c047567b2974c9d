"""What a caller asks of the engine, and what it answers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from llama2.engine.watermark import Watermark
from llama2.errors import ContextError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Why an answer ended. `content_filter` is a moderator's, and never the engine's own.
FinishReason = Literal["stop", "length", "cancelled", "error", "content_filter"]

#: Which hidden states make an embedding: the last token's, or the mean of all.
Pooling = Literal["last", "mean"]

#: Edits a row of logits (V,) in place before penalties, given the tokens so far and how many of them are the prompt's.
Processor = Callable[["NDArray[np.float32]", "NDArray[np.int32]", int], None]


def shown(value: object) -> str:
    """A value that somebody gave, short enough for a message."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:100]} ..."


def index(value: Any) -> int | None:
    """A whole number of Python, NumPy or PyTorch as Python's; None for anything else, also for a bool."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or not _is_scalar(value):
        return None
    try:
        return operator.index(value)
    except Exception:  # whatever a stranger's class raises, it is not a number
        return None


def number(value: Any) -> float | None:
    """A number of Python, NumPy or PyTorch as Python's; None for anything else, also for a bool."""
    if type(value) is int or type(value) is float:
        return value
    if isinstance(value, bool) or not hasattr(value, "__float__") or not _is_scalar(value):
        return None
    try:
        found = index(value)
        return float(value) if found is None else found
    except Exception:
        return None


def _is_scalar(value: Any) -> bool:
    """Whether something that may be an array is a single number, and no bool."""
    return getattr(value, "ndim", 0) == 0 and not str(getattr(value, "dtype", "")).endswith("bool")


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as a whole number. Raises RequestError, with its name, when it is none or out of range."""
    found = index(value)
    if found is None or not low <= found <= high:
        raise RequestError(f"{name}={shown(value)} must be a whole number between {low} and {high}")
    return found


def flag(name: str, value: Any) -> bool:
    """`value`, a bool. Raises RequestError, with its name, when it is none."""
    if not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be True or False")
    return value


def token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Token ids in a list, or in a row of a NumPy array or a tensor. Raises RequestError, with its name, for others."""
    if hasattr(values, "dtype") and hasattr(values, "tolist"):
        if getattr(values, "ndim", 0) != 1:
            shape = tuple(getattr(values, "shape", ()))
            raise RequestError(f"{name}: an array of shape {shape}; token ids are one row, as in array[0]")
        values = values.tolist()
    if isinstance(values, (str, bytes, bytearray, memoryview)) or not isinstance(values, Sequence):
        raise RequestError(f"{name}={shown(values)} must be a list of token ids, not {type(values).__name__}")
    ids = tuple(values)
    if set(map(type, ids)) <= {int}:
        return ids
    found = tuple(map(index, ids))
    for value, id in zip(ids, found, strict=True):
        if id is None:
            raise RequestError(f"{name}: {shown(value)} is not a token id, which is a whole number")
    return found  # type: ignore[return-value]  # None was refused


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
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "presence_penalty": (-100.0, 100.0),
            "frequency_penalty": (-100.0, 100.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            plain = number(value)
            if plain is None or not low <= plain <= high:
                raise RequestError(f"{name}={shown(value)} must be between {low} and {high}")
            object.__setattr__(self, name, plain)
        for name, highest in (("top_k", 1 << 30), ("seed", (1 << 64) - 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), 0, highest))
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias={shown(self.logit_bias)} must be a mapping of token ids to numbers")
        biases: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            id, plain = index(token), number(bias)
            if id is None or id < 0:
                raise RequestError(f"logit_bias: {shown(token)} is not a token id")
            if plain is None or math.isnan(plain) or plain == math.inf:
                raise RequestError(f"logit_bias: token {id} has bias {shown(bias)}, which must be a number or -inf")
            biases[id] = plain
        object.__setattr__(self, "logit_bias", biases)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the limits of its answer.

    `stop` strings end the answer and are left out of its text; `stop_tokens` likewise by id. `logprobs` asks, for each
    token of the answer, for its log-probability (of the raw logits) and that of so many likeliest alternatives.
    `score_from` asks the same of the prompt's tokens from that position on; then `max_tokens` may be 0. `lookup` is how
    many tokens a step may draft by prompt lookup. The answer stays the same; one that repeats itself or its prompt
    comes faster. What the cache holds of the prompt's beginning, as far as `score_from`, is not computed again, unless
    `cache_prompt` forbids it. `pooling` asks for the prompt's embedding in place of an answer; then `max_tokens` is 0.
    Likewise with `continuations`, each of which is scored as what follows the prompt.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None  # None: as many as the context holds
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None  # None: none; 0: the drawn token's alone
    score_from: int | None = None  # None: no token of the prompt; 1: all that have one before them
    choice: int = 0  # which of several answers to one prompt; part of the random numbers' key
    raw_completion: bool = False  # the text continues the prompt, and keeps its first space
    processors: tuple[Processor, ...] = ()
    lookup: int = 0  # 0: off
    cache_prompt: bool = True
    pooling: Pooling | None = None
    continuations: tuple[tuple[int, ...], ...] = ()
    watermark: Watermark | None = None  # at temperature 0 nothing is drawn, and nothing is marked

    def __post_init__(self) -> None:
        if self.pooling not in (None, *get_args(Pooling)):
            raise RequestError(f"pooling={shown(self.pooling)} must be {' or '.join(get_args(Pooling))}")
        self._check_continuations()
        if self.pooling and (self.max_tokens != 0 or self.score_from is not None):
            raise RequestError("pooling: an embedding has no answer; set max_tokens=0, and no score_from")
        least = 1 if self.score_from is None and not self.pooling and not self.continuations else 0
        limits = {
            "max_tokens": (least, 1 << 62),
            "logprobs": (0, 1 << 30),
            "score_from": (1, 1 << 62),
            "choice": (0, (1 << 64) - 1),
            "lookup": (0, 1024),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None or name not in ("max_tokens", "logprobs", "score_from"):
                object.__setattr__(self, name, whole(name, value, low, high))
        object.__setattr__(self, "prompt", token_ids("prompt", self.prompt))
        if self.stop_tokens:
            stops = self.stop_tokens
            listed = list(stops) if isinstance(stops, AbstractSet) else stops
            object.__setattr__(self, "stop_tokens", frozenset(token_ids("stop_tokens", listed)))
        if not isinstance(self.stop, (tuple, list)):
            raise RequestError(f"stop={shown(self.stop)} must be a list of texts")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop: {shown(text)} must be a text of at least one character")
        for name in ("raw_completion", "cache_prompt"):
            flag(name, getattr(self, name))
        if not isinstance(self.processors, (tuple, list)) or not all(map(callable, self.processors)):
            raise RequestError(f"processors={shown(self.processors)} must be a list of functions")
        if self.watermark is not None and not isinstance(self.watermark, Watermark):
            raise RequestError(f"watermark={shown(self.watermark)} must be a SynthId or a Kgw")
        if not isinstance(self.sampling, Sampling):
            raise RequestError(f"sampling={shown(self.sampling)} must be a Sampling")

    def _check_continuations(self) -> None:
        if not isinstance(self.continuations, (tuple, list)):
            raise RequestError(f"continuations={shown(self.continuations)} must be a list of lists of token ids")
        rows = tuple(token_ids(f"continuations[{i}]", row) for i, row in enumerate(self.continuations))
        object.__setattr__(self, "continuations", rows)
        if not all(rows):
            raise RequestError(f"continuations[{rows.index(())}] is empty; give it at least one token")
        if rows and (self.max_tokens != 0 or self.score_from is not None or self.pooling):
            raise RequestError("continuations: they have no answer; set max_tokens=0, no score_from and no pooling")


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token under the raw logits, and the likeliest alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):  # which is quicker to make than a dataclass: every token has one
    """One token of one request's answer.

    `text` is what became certain with this token: whole characters, held back while a stop string may be forming.
    The last event of a request has `finish`. It says how many tokens of the prompt were found in the cache, how many
    were drafted, and how many of those were drawn. With `finish="error"`, `error` says why; with "stop", `stop`
    is the stop string that ended the answer, or None where a token did. The one event of a request with `pooling` has
    its `embedding`, not normalised; that of one with `continuations` has their log-probabilities.
    """

    request: int  # the id that Engine.add returned
    token: int | None
    text: str
    finish: FinishReason | None = None
    logprob: Logprob | None = None
    error: str | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None  # in the first event, if asked: the prompt's from score_from on
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    stop: str | None = None
    embedding: NDArray[np.float32] | None = None  # (D,)
    continuation_logprobs: tuple[tuple[Logprob, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has to do, and how full its key/value cache is."""

    running: int  # requests
    waiting: int
    prefill_tokens: int  # at most, of all requests, that have yet to run before each can grow; fewer with prefix hits
    blocks: int  # of the cache
    held_blocks: int  # by requests
    evictable_blocks: int  # of prefixes that may come again; free otherwise
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
    answer = max((answer, *map(len, request.continuations)))
    if length + answer > context:
        raise ContextError(
            f"prompt of {length} tokens and answer of {answer} do not fit the context of {context}; "
            "shorten the prompt, or ask for fewer tokens"
        )
    if request.score_from is not None and request.score_from > length:
        raise RequestError(f"score_from={request.score_from} is after the prompt, which has {length} tokens")
    for name in ("prompt", "stop_tokens"):
        _check_tokens(name, getattr(request, name), vocabulary)
    for i, continuation in enumerate(request.continuations):
        _check_tokens(f"continuations[{i}]", continuation, vocabulary)
    _check_tokens("logit_bias", request.sampling.logit_bias, vocabulary)
    if request.logprobs is not None and request.logprobs > vocabulary:
        raise RequestError(f"logprobs={request.logprobs} is more than the {vocabulary} tokens of the vocabulary")
    return answer


def _check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise RequestError(
                f"{name}: {shown(token)} is not a token of this model, whose ids are 0 to {vocabulary - 1}"
            )
