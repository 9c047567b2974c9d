"""llama.cpp's own completions and infills, whole and as events, by its names and with its defaults."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import AliasChoices, Field

from llama2.engine.processors import keep_typical, penalise_recent
from llama2.engine.request import Event, Logprob, Processor, Request, Sampling
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces import common
from llama2.serve.surfaces.common import json_response, served, stops, warn, warning_header
from llama2.serve.surfaces.streaming import PING, PING_SECONDS, CancelOnDisconnect, StreamingResponse, sse
from llama2.serve.surfaces.wire import MAX_PROMPTS, MAX_TOKENS, JsonRoute, Token, Values, Wire
from llama2.serve.token_text import finite
from llama2.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

router = APIRouter(route_class=JsonRoute)

#: Tokens before a text's beginning, before its end, and before what is to stand between: of families of models.
INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class PromptString(Wire):
    """A prompt as an object, which could hold images."""

    UNSUPPORTED: ClassVar[Values] = {"multimodal_data": ([],)}

    prompt_string: str


#: Text and tokens in turn.
Mixed = Annotated[list[str | Token], Field(min_length=1, max_length=MAX_TOKENS)]


class Drawn(Wire):
    """How tokens are drawn, by the names of llama.cpp and Ollama; where nothing is said, as the server does by default.

    Penalties look at every token, unless `repeat_last_n` is given.
    """

    temperature: float | None = Field(None, ge=-100, le=100)  # below 0, the likeliest token is taken
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repeat_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    repeat_last_n: int | None = Field(None, ge=-1, lt=1 << 62)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)  # below 0, a random one


class CompletionOptions(Drawn):
    """What completions and infills share: how tokens are drawn, when they end, and what is said of them."""

    UNSUPPORTED: ClassVar[Values] = {
        "adaptive_target": (-1, -1.0),
        "dry_multiplier": (0, 0.0),
        "dynatemp_range": (0, 0.0),
        "grammar_lazy": (False,),
        "grammar_triggers": ([],),
        "lora": ([],),
        "mirostat": (0,),
        "n_indent": (0,),
        "post_sampling_probs": (False,),
        "samplers": (),
        "t_max_predict_ms": (0, -1),
        "top_n_sigma": (-1, -1.0),
        "xtc_probability": (0, 0.0),
    }
    HARMLESS: ClassVar[Values] = {"id_slot": (-1,), "n_keep": (0, -1), "min_keep": (0,)}

    model: str
    n_predict: int | None = Field(
        None, ge=-1, lt=1 << 62, validation_alias=AliasChoices("n_predict", "max_tokens", "max_completion_tokens")
    )
    n_cmpl: int | None = Field(None, ge=1, le=128, validation_alias=AliasChoices("n_cmpl", "n"))
    n_probs: int | None = Field(None, ge=0, le=100, validation_alias=AliasChoices("n_probs", "logprobs"))
    stop: str | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=64)] | None = None
    logit_bias: list[list[str | bool | int | float]] | dict[str, bool | int | float] | None = None
    ignore_eos: bool | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    stream: bool | None = None
    cache_prompt: bool | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    response_fields: list[str] | None = None


class Completion(CompletionOptions):
    """`POST /completion`. A list of nothing but tokens, or of text and tokens, is one prompt; other lists are many."""

    prompt: (
        str
        | PromptString
        | Mixed
        | Annotated[list[str | PromptString | Mixed], Field(min_length=1, max_length=MAX_PROMPTS)]
    )


class Infill(CompletionOptions):
    """`POST /infill`: what stands between two texts, behind `prompt`."""

    UNSUPPORTED: ClassVar[Values] = {**CompletionOptions.UNSUPPORTED, "input_extra": ([],)}

    input_prefix: str
    input_suffix: str
    prompt: str = ""


@router.post("/completion")
async def completion(body: Completion, http: HttpRequest) -> Response:
    """Texts, or tokens, continued without a chat format."""
    service = await served(http).service(body.model)
    given: Any = body.prompt
    several = isinstance(given, list) and not any(isinstance(part, int) for part in given)
    prompts = await asyncio.to_thread(
        lambda: [prompt_tokens(service, each) for each in (given if several else [given])]
    )
    return await _respond(body, prompts, several, service, http)


@router.post("/infill")
async def infill(body: Infill, http: HttpRequest) -> Response:
    """What stands between a text's beginning and its end, by a model that has tokens for these."""
    service = await served(http).service(body.model)
    parts = (body.input_prefix, body.input_suffix, body.prompt)
    tokens = await asyncio.to_thread(infill_tokens, service, *parts)
    if tokens is None:
        raise Refusal(400, "infill: this model has no tokens for it; use /completion", code="unsupported_value")
    return await _respond(body, [tokens], False, service, http)


def infill_tokens(service: Service, prefix: str, suffix: str, middle: str = "") -> list[int] | None:
    """Token ids that ask for what stands between two texts, behind `middle`; None if the model has no tokens for it.

    Raises ContextError for texts that cannot fit.
    """
    t = service.model.tokenizer
    marks = infill_marks(t)
    if marks is None:
        return None
    service.limit.check(prefix, suffix, middle)
    ids = [t.bos_id] if t.add_bos and t.bos_id is not None else []
    for mark, text in zip(marks, (prefix, suffix, middle), strict=True):
        ids += [mark, *t.encode(text)]
    return ids


def infill_marks(tokenizer: Tokenizer) -> list[int] | None:
    """The ids of the three tokens around the texts of an infill; None if a vocabulary has none."""
    names = tokenizer.control
    return next(([names[name] for name in trio] for trio in INFILL if all(name in names for name in trio)), None)


async def _respond(
    body: CompletionOptions, prompts: Sequence[Sequence[int]], several: bool, service: Service, http: HttpRequest
) -> Response:
    n = body.n_cmpl or 1
    common.check_choices(n * len(prompts))

    rule = _constraint(body)
    stop = stops(http, body.stop, "stop: empty texts end nothing")

    def make() -> list[Request]:
        sampling, processors = drawn(body, service)
        request = Request(
            (),
            None if body.n_predict == -1 else body.n_predict,
            replace(sampling, logit_bias=_bias(body.logit_bias or {}, service)),
            stop,
            logprobs=body.n_probs or None,
            prompt_logprobs=body.n_predict == 0,  # nothing is drawn
            continues=True,
            processors=processors,
            lookup=served(http).settings.lookup,
            cache_prompt=body.cache_prompt is not False,
        )
        least = None if body.ignore_eos else 0
        asked = (replace(request, prompt=tuple(prompt)) for prompt in prompts)
        return [choice for each in asked for choice in common.expand_choices(service, each, n, [rule], least)]

    requests = await asyncio.to_thread(make)
    if rule:
        warn(http, *rule.warnings)
    stream = await common.submit(http, service, requests)
    results = [_Result(i, body, request, service) for i, request in enumerate(stream.requests)]
    headers = warning_header(body, http)
    if body.stream:
        return StreamingResponse(_events(stream, results), stream.close, headers=headers)
    async with CancelOnDisconnect(http, stream.close):
        async for batch in stream.batches():
            for index, event in batch:
                results[index].add(event)
    rows = [result.whole(stream) for result in results]
    return json_response(rows if several or n > 1 else rows[0], headers)


async def _events(stream: Stream, results: Sequence[_Result]) -> AsyncIterator[bytes]:
    try:
        async for batch in stream.batches(PING_SECONDS):
            parts = [] if batch else [PING]
            for index, event in batch:
                part = results[index].part(event, stream)
                if event.token is not None:
                    parts.append(sse(part))
                if event.finish is not None:
                    parts.append(sse(results[index].end(stream)))
            yield b"".join(parts)
    except Refusal as failure:
        yield sse(failure.body())


class _Result:
    """One completion in wire form."""

    def __init__(self, index: int, body: CompletionOptions, request: Request, service: Service) -> None:
        self._index = index
        self._body = body
        self._request = request
        self._service = service
        self._text = ""
        self._tokens: list[int] = []
        self._scores: list[Logprob] = []
        self._last: Event | None = None

    def add(self, event: Event) -> None:
        """What an event says. Raises Refusal when the answer failed."""
        common.check(event)
        self._text += event.text
        self._tokens += [] if event.token is None else [event.token]
        self._scores += [] if event.logprob is None else [event.logprob]
        self._last = event

    def part(self, event: Event, stream: Stream) -> dict[str, Any]:
        """One event of several: what came with a token. Raises Refusal when the answer failed."""
        self.add(event)
        tokens = [] if event.token is None else [event.token]
        part = {**self._head(False), "content": event.text, "tokens": tokens}
        if self._body.timings_per_token:
            part["timings"] = self._timings(stream)
        if event.logprob is not None:
            part["completion_probabilities"] = self._probabilities([event.logprob])
        return part

    def whole(self, stream: Stream) -> dict[str, Any]:
        """The completion, or the fields of it that are wanted."""
        whole = self.end(stream) | {"content": self._text, "tokens": self._tokens if self._body.return_tokens else []}
        if self._body.n_probs:
            whole["completion_probabilities"] = self._probabilities(self._scores)
        return _chosen(whole, self._body.response_fields) if self._body.response_fields else whole

    def end(self, stream: Stream) -> dict[str, Any]:
        """The last of several events, which says everything but the text."""
        body, request, last = self._body, self._request, self._last
        cut = last is not None and last.finish == "length"
        word = last.stop if last is not None else None
        limit = body.n_predict if body.n_predict is not None else -1
        return {
            **self._head(True),
            "content": "",
            "tokens": [],
            "model": self._service.name,
            "generation_settings": {
                **parameters(request),
                **body.model_dump(include=set(Drawn.model_fields) - {"seed"}, exclude_none=True),
                "n_predict": limit,
                "max_tokens": limit,
                "stop": list(request.stop),
                "logit_bias": [
                    {"token": token, "bias": bias if math.isfinite(bias) else None}
                    for token, bias in request.sampling.logit_bias.items()
                ],
                "ignore_eos": bool(body.ignore_eos),
                "grammar": body.grammar or "",
                "stream": bool(body.stream),
                "timings_per_token": bool(body.timings_per_token),
            },
            "prompt": spelled(self._service, request.prompt),
            "has_new_line": "\n" in self._text,
            "truncated": cut and (request.max_tokens is None or request.max_tokens < limit),
            "stop_type": "limit" if cut else "eos" if word is None else "word",
            "stopping_word": word or "",
            "tokens_cached": self._cached,
            "timings": self._timings(stream),
        }

    @property
    def _cached(self) -> int:
        """Tokens of the prompt that were found in the cache, which is known at the end."""
        return 0 if self._last is None else self._last.cached_tokens

    def _head(self, stop: bool) -> dict[str, Any]:
        counts = {"tokens_predicted": len(self._tokens), "tokens_evaluated": len(self._request.prompt)}
        return {"index": self._index, "content": "", "tokens": [], "stop": stop, "id_slot": -1, **counts}

    def _timings(self, stream: Stream) -> dict[str, Any]:
        """Milliseconds and rates. Of a request with several answers, `prompt_ms` ends with the first token of all."""
        first = stream.first or stream.arrived
        last = stream.last[self._index] if self._tokens else first
        prompt, predicted = len(self._request.prompt) - self._cached, len(self._tokens)
        return {
            "cache_n": self._cached,
            **_rate("prompt", prompt, prompt, first - (stream.started or first)),
            **_rate("predicted", predicted, max(0, predicted - 1), last - first),  # the first came with the prompt
        }

    def _probabilities(self, scores: Sequence[Logprob]) -> list[dict[str, Any]]:
        return [
            {**self._scored(each.token, each.logprob), "top_logprobs": [self._scored(*other) for other in each.top]}
            for each in scores
        ]

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        texts = self._service.texts
        data = texts.bytes(token)
        data = list(texts(token).encode()) if data is None else data  # a control token's name
        return {"id": token, "token": bytes(data).decode(errors="ignore"), "bytes": data, "logprob": finite(logprob)}


def _rate(name: str, count: int, steps: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": seconds * 1e3,
        f"{name}_per_token_ms": seconds * 1e3 / steps if steps else 0.0,
        f"{name}_per_second": steps / seconds if seconds > 0 else 0.0,
    }


def parameters(request: Request) -> dict[str, Any]:
    """How a request's tokens are drawn, by llama.cpp's names; nothing of its texts."""
    s = request.sampling
    return {
        "n_predict": -1 if request.max_tokens is None else request.max_tokens,
        "seed": s.seed,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
        "repeat_last_n": -1,
        "repeat_penalty": s.repetition_penalty,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "n_probs": request.logprobs or 0,
    }


def drawn(given: Drawn, service: Service, within: str = "") -> tuple[Sampling, tuple[Processor, ...]]:
    """How tokens are drawn, and what changes logits before. Raises Refusal that names a field after `within`."""
    default = service.sampling
    penalties = {
        "repetition": default.repetition_penalty if given.repeat_penalty is None else given.repeat_penalty,
        "presence": default.presence_penalty if given.presence_penalty is None else given.presence_penalty,
        "frequency": default.frequency_penalty if given.frequency_penalty is None else given.frequency_penalty,
    }
    none = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    processors = []
    if given.repeat_last_n is not None and given.repeat_last_n >= 0:
        if given.repeat_last_n and penalties != none:
            processors.append(penalise_recent(given.repeat_last_n, **penalties))
        penalties = none
    if given.typical_p is not None and given.typical_p < 1:
        processors.append(keep_typical(given.typical_p))
    if processors and not service.model.engine.runs_processors:
        names = f"{within}typical_p, {within}repeat_last_n"
        raise unsupported(names, "the engine that answers here has neither")
    values = {
        "temperature": None if given.temperature is None else max(0.0, given.temperature),
        "top_k": None if given.top_k is None else max(0, given.top_k),
        "top_p": given.top_p,
        "min_p": given.min_p,
        "seed": secrets.randbits(32) if given.seed is None or given.seed < 0 else given.seed,
        **{f"{name}_penalty": value for name, value in penalties.items()},
    }
    chosen: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return replace(default, **chosen), tuple(processors)


def _bias(given: list[list[Any]] | dict[str, Any], service: Service) -> dict[int, float]:
    """Biases by token. A text stands for each of its tokens, and false for never. Raises Refusal."""
    biases: dict[int, float] = {}
    pairs = list(given.items()) if isinstance(given, dict) else given
    for i, pair in enumerate(pairs):
        what: Any
        what, value = pair if len(pair) == 2 else (None, None)
        if isinstance(what, str) and isinstance(given, dict) and what.isdecimal() and len(what) < 10:
            what = int(what)
        known = isinstance(what, str) or type(what) is int
        if not known or value is True or not isinstance(value, bool | int | float):
            field = f"logit_bias.{what if isinstance(given, dict) else i}"[:100]
            raise Refusal(400, f"{field}: must be a token or a text, with a number or false", param="logit_bias")
        tokens = service.model.tokenizer.encode(what) if isinstance(what, str) else [what]
        biases |= dict.fromkeys(tokens, -math.inf if value is False else float(value))
    return biases


def _constraint(body: CompletionOptions) -> Constraint | None:
    """What holds a completion to a schema. Raises Refusal, RequestError."""
    from llama2.serve.constrain import constraints

    if body.grammar:
        return constraints.grammar(body.grammar, "grammar")
    if body.json_schema is None:
        return None
    return constraints.json_schema(body.json_schema or {"type": "object"}, "json_schema", strict=False)


def prompt_tokens(service: Service, prompt: str | PromptString | list[str | int]) -> list[int]:
    """A prompt's tokens. Control tokens are recognised in text, and BOS comes before it as the model wants it."""
    t = service.model.tokenizer
    if isinstance(prompt, list):
        service.limit.check_count(len(prompt), "tokens and texts")
    parts = (
        prompt if isinstance(prompt, list) else [prompt.prompt_string if isinstance(prompt, PromptString) else prompt]
    )
    service.limit.check(*(part for part in parts if isinstance(part, str)))
    tokens: list[int] = []
    for part in parts:
        tokens += t.encode(part, special=True) if isinstance(part, str) else [part]
    if t.add_bos and t.bos_id is not None and isinstance(parts[0], str) and tokens[:1] != [t.bos_id]:
        tokens.insert(0, t.bos_id)
    return tokens or service.model.encode("")


def spelled(service: Service, tokens: Sequence[int]) -> str:
    """The text of tokens, control tokens by their names."""
    parts = []
    for control, group in groupby(tokens, lambda token: service.texts.bytes(token) is None):
        run = list(group)
        parts.append("".join(map(service.texts, run)) if control else service.model.tokenizer.decode(run))
    return "".join(parts)


def _chosen(whole: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The fields at `paths`, with slashes between names, under these paths; those that there are."""
    chosen = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen
