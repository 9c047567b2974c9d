"""llama.cpp's own completions and infills, whole and as events, by its names and with its defaults."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import AliasChoices, Field

from llama2.engine.request import Event, Logprob, Request
from llama2.serve.errors import Refusal
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.choices import Choice
from llama2.serve.surfaces.context import models_of, warning_header
from llama2.serve.surfaces.encoding import PING, json_response, sse
from llama2.serve.surfaces.generation import check_choices, constraints_of, expand_choices, submit
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.llamacpp_sampling import LlamaCppSampling, sampling_and_processors, sampling_json
from llama2.serve.surfaces.prompts import infill_tokens, prompt_text, prompt_tokens
from llama2.serve.surfaces.sampling import stop_strings
from llama2.serve.surfaces.streaming import PING_SECONDS, CancelOnDisconnect, StreamingResponse
from llama2.serve.surfaces.wire import MAX_PROMPTS, MAX_TOKENS, Token, Values, Wire
from llama2.serve.token_text import finite

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

router = APIRouter(route_class=JsonRoute)


class PromptString(Wire):
    """A prompt as an object, which could hold images."""

    UNSUPPORTED: ClassVar[Values] = {"multimodal_data": ([],)}

    prompt_string: str


#: Texts and tokens, mixed.
Mixed = Annotated[list[str | Token], Field(min_length=1, max_length=MAX_TOKENS)]


class CompletionOptions(LlamaCppSampling):
    """The fields of completions and infills: sampling, limits, and the fields of the response."""

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
    watermark: bool | None = None  # an extra
    response_fields: list[str] | None = None


class LlamaCppCompletion(CompletionOptions):
    """`POST /completion`. A list of nothing but tokens, or of text and tokens, is one prompt; other lists are many."""

    prompt: (
        str
        | PromptString
        | Mixed
        | Annotated[list[str | PromptString | Mixed], Field(min_length=1, max_length=MAX_PROMPTS)]
    )


class LlamaCppInfill(CompletionOptions):
    """`POST /infill`: the text between two texts, behind `prompt`."""

    UNSUPPORTED: ClassVar[Values] = {**CompletionOptions.UNSUPPORTED, "input_extra": ([],)}

    input_prefix: str
    input_suffix: str
    prompt: str = ""


@router.post("/completion")
async def completion(body: LlamaCppCompletion, http: HttpRequest) -> Response:
    """Texts, or tokens, continued without a chat format."""
    service = await models_of(http).service(body.model)
    given: Any = body.prompt
    is_list = isinstance(given, list) and not any(isinstance(part, int) for part in given)
    texts = [each.prompt_string if isinstance(each, PromptString) else each for each in (given if is_list else [given])]
    prompts = await asyncio.to_thread(lambda: [prompt_tokens(service, text) for text in texts])
    return await _respond(body, prompts, is_list, service, http)


@router.post("/infill")
async def infill(body: LlamaCppInfill, http: HttpRequest) -> Response:
    """The text between a prefix and a suffix, by a model that has tokens for these."""
    service = await models_of(http).service(body.model)
    parts = (body.input_prefix, body.input_suffix, body.prompt)
    tokens = await asyncio.to_thread(infill_tokens, service, *parts)
    if tokens is None:
        raise Refusal(400, "infill: this model has no tokens for it; use /completion", code="unsupported_value")
    return await _respond(body, [tokens], False, service, http)


async def _respond(
    body: CompletionOptions, prompts: Sequence[Sequence[int]], is_list: bool, service: Service, http: HttpRequest
) -> Response:
    n = body.n_cmpl or 1
    check_choices(n * len(prompts))

    constraint = _constraint(body)
    stop = stop_strings(http, body.stop, "stop: empty texts end nothing")
    constraints = constraints_of(http, constraint)

    def build() -> list[Request]:
        sampling, processors = sampling_and_processors(body, service)
        request = Request(
            (),
            None if body.n_predict == -1 else body.n_predict,
            replace(sampling, logit_bias=_bias(body.logit_bias or {}, service)),
            stop,
            logprobs=body.n_probs or None,
            score_from=1 if body.n_predict == 0 else None,  # no token is sampled
            raw_completion=True,
            processors=processors,
            lookup=models_of(http).settings.lookup,
            cache_prompt=body.cache_prompt is not False,
        )
        min_tokens = None if body.ignore_eos else 0
        requests = (replace(request, prompt=tuple(prompt)) for prompt in prompts)
        return [choice for each in requests for choice in expand_choices(service, each, n, constraints, min_tokens)]

    requests = await asyncio.to_thread(build)
    stream = await submit(http, service, requests, watermark=body.watermark)
    writers = [_LlamaCppWriter(i, body, request, service) for i, request in enumerate(stream.requests)]
    if body.stream:
        return StreamingResponse(_events(stream, writers), stream.close, headers=warning_header(body, http))
    async with CancelOnDisconnect(http, stream.close):
        async for batch in stream.batches():
            for index, event in batch:
                writers[index].choice.add(event)
    rows = [writer.whole(stream) for writer in writers]
    return json_response(rows if is_list or n > 1 else rows[0], warning_header(body, http))


async def _events(stream: Stream, writers: Sequence[_LlamaCppWriter]) -> AsyncIterator[bytes]:
    try:
        async for batch in stream.batches(PING_SECONDS):
            parts = [] if batch else [PING]
            for index, event in batch:
                part = writers[index].part(event, stream)
                if event.token is not None or event.text:
                    parts.append(sse(part))
                if event.finish is not None:
                    parts.append(sse(writers[index].end(stream)))
            yield b"".join(parts)
    except Refusal as failure:
        yield sse(failure.body())


class _LlamaCppWriter:
    """Writes one completion, whole or as events."""

    def __init__(self, index: int, body: CompletionOptions, request: Request, service: Service) -> None:
        self.choice = Choice()
        self._index = index
        self._body = body
        self._request = request
        self._service = service

    def part(self, event: Event, stream: Stream) -> dict[str, Any]:
        """The event of one token. Raises Refusal if the answer failed."""
        self.choice.add(event)
        tokens = [] if event.token is None else [event.token]
        part = {**self._head(False), "content": event.text, "tokens": tokens}
        if self._body.timings_per_token:
            part["timings"] = self._timings(stream)
        if event.logprob is not None:
            part["completion_probabilities"] = self._probabilities([event.logprob])
        return part

    def whole(self, stream: Stream) -> dict[str, Any]:
        """The completion, or those of its fields that are requested."""
        tokens = self.choice.token_ids if self._body.return_tokens else []
        whole = self.end(stream) | {"content": self.choice.text, "tokens": tokens}
        if self._body.n_probs:
            whole["completion_probabilities"] = self._probabilities(self.choice.logprobs)
        return _selected(whole, self._body.response_fields) if self._body.response_fields else whole

    def end(self, stream: Stream) -> dict[str, Any]:
        """The last event, which has everything but the text."""
        body, request, choice = self._body, self._request, self.choice
        cut = choice.finish == "length"
        limit = body.n_predict if body.n_predict is not None else -1
        return {
            **self._head(True),
            "content": "",
            "tokens": [],
            "model": self._service.name,
            "generation_settings": {
                **sampling_json(request),
                **body.model_dump(include=set(LlamaCppSampling.model_fields) - {"seed"}, exclude_none=True),
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
            "prompt": prompt_text(self._service, request.prompt),
            "has_new_line": "\n" in choice.text,
            "truncated": cut and (request.max_tokens is None or request.max_tokens < limit),
            "stop_type": _stop_type(choice),
            **({"finish_reason": choice.finish} if choice.finish == "content_filter" else {}),
            "stopping_word": choice.stop or "",
            "tokens_cached": choice.cached_tokens,
            "timings": self._timings(stream),
        }

    def _head(self, stop: bool) -> dict[str, Any]:
        counts = {"tokens_predicted": len(self.choice.token_ids), "tokens_evaluated": len(self._request.prompt)}
        return {"index": self._index, "content": "", "tokens": [], "stop": stop, "id_slot": -1, **counts}

    def _timings(self, stream: Stream) -> dict[str, Any]:
        """Milliseconds and rates. `prompt_ms` ends with the first token of any choice of the request."""
        first = stream.first or stream.arrived
        predicted, cached = len(self.choice.token_ids), self.choice.cached_tokens
        last = stream.last[self._index] if predicted else first
        prompt = len(self._request.prompt) - cached
        return {
            "cache_n": cached,
            **_rate("prompt", prompt, prompt, first - (stream.started or first)),
            **_rate("predicted", predicted, max(0, predicted - 1), last - first),  # the first is part of prefill
        }

    def _probabilities(self, logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
        return [
            {**self._scored(each.token, each.logprob), "top_logprobs": [self._scored(*other) for other in each.top]}
            for each in logprobs
        ]

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        texts = self._service.texts
        data = texts.bytes(token)
        data = list(texts(token).encode()) if data is None else data  # a control token's name
        return {"id": token, "token": bytes(data).decode(errors="ignore"), "bytes": data, "logprob": finite(logprob)}


def _stop_type(choice: Choice) -> str:
    """Why a completion ended, in llama.cpp's words, which have none for a moderator's end."""
    if choice.finish in ("length", "content_filter"):
        return "limit" if choice.finish == "length" else "none"
    return "eos" if choice.stop is None else "word"


def _rate(name: str, count: int, steps: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": seconds * 1e3,
        f"{name}_per_token_ms": seconds * 1e3 / steps if steps else 0.0,
        f"{name}_per_second": steps / seconds if seconds > 0 else 0.0,
    }


def _bias(given: list[list[Any]] | dict[str, Any], service: Service) -> dict[int, float]:
    """Biases by token. A text means each of its tokens, and false means never. Raises Refusal."""
    biases: dict[int, float] = {}
    pairs = list(given.items()) if isinstance(given, dict) else given
    for i, pair in enumerate(pairs):
        key: Any
        key, value = pair if len(pair) == 2 else (None, None)
        if isinstance(key, str) and isinstance(given, dict) and key.isdecimal() and len(key) < 10:
            key = int(key)
        known = isinstance(key, str) or type(key) is int
        if not known or value is True or not isinstance(value, bool | int | float):
            field = f"logit_bias.{key if isinstance(given, dict) else i}"[:100]
            raise Refusal(400, f"{field}: must be a token or a text, with a number or false", param="logit_bias")
        tokens = service.model.tokenizer.encode(key) if isinstance(key, str) else [key]
        biases |= dict.fromkeys(tokens, -math.inf if value is False else float(value))
    return biases


def _constraint(body: CompletionOptions) -> Constraint | None:
    """The constraint of a completion, if one is requested. Raises Refusal, RequestError."""
    from llama2.serve.constrain import constraints

    if body.grammar:
        return constraints.grammar(body.grammar, "grammar")
    if body.json_schema is None:
        return None
    return constraints.json_schema(body.json_schema or {"type": "object"}, "json_schema", strict=False)


def _selected(whole: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Those of the fields at `paths` that exist, by their paths: names with slashes between them."""
    selected = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            selected[path] = value
    return selected
