"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from llama2.engine.request import Event, Logprob, Request
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.choices import Choice, check, gather
from llama2.serve.surfaces.context import models_of, warning_header
from llama2.serve.surfaces.encoding import DONE, PING, dump, json_response, quote, sse
from llama2.serve.surfaces.generation import (
    Tools,
    build_requests,
    check_choices,
    constraints_of,
    expand_choices,
    submit,
)
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.messages import to_message
from llama2.serve.surfaces.openai_requests import ChatRequest, CompletionRequest, ConstrainedRequest
from llama2.serve.surfaces.sampling import base_request, min_tokens_of, sampling_of
from llama2.serve.surfaces.streaming import PING_SECONDS, CancelOnDisconnect, StreamingResponse
from llama2.serve.surfaces.wire import SamplingRequest
from llama2.serve.token_text import chat_logprobs, finite

if TYPE_CHECKING:
    from llama2.serve.constrain.tools import CallReader

log = logging.getLogger("llama2.serve")

router = APIRouter(route_class=JsonRoute)  # tries its routes in order, so the most frequent ones come first


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
    """The assistant's answer to a list of messages."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value")
    service = await models_of(http).service(body.model)
    _check_end(body)
    limits = (body.max_completion_tokens, body.max_tokens, body.n_predict)
    limit = next((limit for limit in limits if limit is not None), None)
    messages = [to_message(f"messages.{i}", message) for i, message in enumerate(body.messages)]
    requests, readers = await build_requests(
        http,
        service,
        messages,
        base_request(body, service, http, limit, (body.top_logprobs or 0) if body.logprobs else None),
        body.n or 1,
        tools=Tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        response=body.constraint,
        min_tokens=min_tokens_of(body),
    )
    stream = await submit(http, service, requests, dialog=messages, watermark=body.watermark)
    return await _respond(_ChatWriter(body, service, readers, requests[0].prompt), body, stream, http)


def _check_end(body: ChatRequest) -> None:
    """Raises Refusal for a contradiction to the last message: the assistant's is continued, any other is answered."""
    continues = body.messages[-1].role == "assistant"
    for field, given in (
        ("continue_final_message", body.continue_final_message),
        ("add_generation_prompt", None if body.add_generation_prompt is None else not body.add_generation_prompt),
    ):
        if given is not None and given != continues and not (continues and field == "add_generation_prompt"):
            what = "the assistant's, which is continued" if continues else "to be answered"
            raise Refusal(400, f"{field}: the last message is {what}; leave it out", param=field, code="invalid_value")


@router.post("/v1/completions")
async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
    """Texts, or token ids, continued without a chat format."""
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise unsupported("best_of", "more than n is not supported")
    service = await models_of(http).service(body.model)
    constraint = body.constraint
    limit = body.n_predict if body.max_tokens is None else body.max_tokens
    if limit is None and not {"max_tokens", "n_predict"} & body.model_fields_set:
        limit = 16
    request = replace(
        base_request(body, service, http, limit, body.logprobs),
        score_from=1 if limit == 0 or (body.echo and body.logprobs is not None) else None,
        raw_completion=True,
    )

    constraints = constraints_of(http, constraint)

    def build() -> tuple[list[CompletionPrompt], list[Request]]:
        prompts = _prompts(body.prompt, body.n or 1, service)
        requests = []
        for prompt in prompts:  # each with a seed of its own, unless one is given
            one = replace(request, prompt=tuple(prompt.tokens), sampling=sampling_of(body, service))
            requests += expand_choices(service, one, body.n or 1, constraints, min_tokens_of(body))
        return prompts, requests

    prompts, requests = await asyncio.to_thread(build)
    stream = await submit(http, service, requests, watermark=body.watermark)
    return await _respond(_CompletionWriter(body, service, prompts), body, stream, http)


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    """The models that are served."""
    entries = models_of(http).entries.values()
    return json_response({"object": "list", "data": [_card(entry) for entry in entries]})


@router.get("/v1/models/{model:path}")
async def model(model: str, http: HttpRequest) -> Response:
    """One of the models that are served."""
    return json_response(_card(models_of(http).entry(model)))


async def _respond(writer: _ResponseWriter, body: SamplingRequest, stream: Stream, http: HttpRequest) -> Response:
    if body.stream:
        return StreamingResponse(writer.stream(stream), stream.close, headers=warning_header(body, http))
    async with CancelOnDisconnect(http, stream.close):
        choices = await gather(stream, writer.readers)
    whole = {**writer.head, "choices": writer.rows(choices), "usage": _usage(stream)}
    return json_response(whole, warning_header(body, http))


@dataclass(frozen=True, slots=True)
class CompletionPrompt:
    """The text and the tokens of a prompt."""

    text: str
    tokens: Sequence[int]


def _prompts(given: str | list[str] | list[int] | list[list[int]], n: int, service: Service) -> list[CompletionPrompt]:
    """The prompts of a completion in any of four forms, for `n` answers each.

    Raises Refusal for too many answers and for an empty prompt, ContextError for one that cannot fit.
    """
    one: Any = given
    many: list[Any] = [one] if isinstance(one, str) or (one and isinstance(one[0], int)) else one
    check_choices(n * len(many))
    prompts = []
    for prompt in many:
        if isinstance(prompt, str):
            service.limit.check(prompt)
            prompts.append(CompletionPrompt(prompt, service.model.encode(prompt)))
        else:
            service.limit.check_count(len(prompt), "tokens")
            prompts.append(CompletionPrompt(service.model.tokenizer.decode(prompt), prompt))
    if not prompts or not all(prompt.tokens for prompt in prompts):
        raise Refusal(400, "prompt: is empty", param="prompt", code="invalid_value")
    return prompts


class _ResponseWriter:
    """Writes one response, whole or as events: what is in every part of it, and its usage."""

    object: str
    prefix: str
    readers: Sequence[CallReader] = ()  # of the choices of a chat

    def __init__(self, body: ConstrainedRequest, service: Service) -> None:
        self.texts = service.texts
        self.token_ids = bool(body.return_token_ids)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.object,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint,
        }
        self._before = b"data: " + dump(self.chunk_head())[:-1] + b',"choices":['
        self._after = b"]" + (b',"usage":null' if self.include_usage else b"") + b"}\n\n"

    async def stream(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        started = False
        try:
            async for batch in stream.batches(PING_SECONDS):
                parts = [] if batch else [PING]
                if batch and not started:
                    started = True
                    parts += [self.begin(index) for index in range(len(stream.requests))]
                for index, event in batch:
                    check(event)
                    parts += self.chunks(index, event)
                yield b"".join(parts)
        except Refusal as failure:
            yield sse(failure.body())
            return
        if self.include_usage:
            yield sse({**self.chunk_head(), "choices": [], "usage": _usage(stream)})
        yield DONE

    def chunk_head(self) -> dict[str, Any]:
        """The fields at the beginning of every chunk."""
        return self.head

    def chunk(self, row: bytes) -> bytes:
        """The server-sent event of a choice's row, which is JSON."""
        return self._before + row + self._after

    def begin(self, index: int) -> bytes:
        """The events before a choice's first token."""
        return b""

    def ids(self, event: Event) -> str:
        """The token of an event as a field of its row, if it is requested."""
        return f',"token_ids":{quote([event.token])}' if self.token_ids and event.token is not None else ""

    def chunks(self, index: int, event: Event) -> list[bytes]:
        """The server-sent events of one event of the engine."""
        raise NotImplementedError

    def rows(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """The choices of a whole answer."""
        raise NotImplementedError


class _ChatWriter(_ResponseWriter):
    object = "chat.completion"
    prefix = "chatcmpl"

    def __init__(
        self, body: ChatRequest, service: Service, readers: Sequence[CallReader], prompt: Sequence[int]
    ) -> None:
        super().__init__(body, service)
        self.readers = readers
        if self.token_ids:
            self.head["prompt_token_ids"] = list(prompt)
        self.logprobs = bool(body.logprobs)

    def chunk_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    def begin(self, index: int) -> bytes:
        return self._chunk(index, '{"role":"assistant","content":"","refusal":null}')

    def chunks(self, index: int, event: Event) -> list[bytes]:
        reader = self.readers[index]
        deltas = [quote(piece.delta()) for piece in reader.push(event)]
        scores = "null"
        if self.logprobs and event.logprob is not None:
            scores = quote(chat_logprobs([event.logprob], self.texts))
            deltas = deltas or ['{"content":""}']
        ids = self.ids(event)
        if ids:
            deltas = deltas or ['{"content":""}']
        parts = [
            self._chunk(index, delta, "null" if i else scores, ids="" if i else ids) for i, delta in enumerate(deltas)
        ]
        if event.finish is not None:
            parts.append(self._chunk(index, "{}", finish=f'"{reader.finish_reason(event.finish)}"'))
        return parts

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null", ids: str = "") -> bytes:
        row = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}{ids}}}'
        return self.chunk(row.encode())

    def rows(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": {"role": "assistant", "refusal": None, **reader.message()},
                "logprobs": chat_logprobs(choice.logprobs, self.texts) if self.logprobs else None,
                "finish_reason": reader.finish_reason(choice.finish or "stop"),
                **({"token_ids": choice.token_ids} if self.token_ids else {}),
            }
            for index, (choice, reader) in enumerate(zip(choices, self.readers, strict=True))
        ]


class _CompletionWriter(_ResponseWriter):
    object = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: CompletionRequest, service: Service, prompts: Sequence[CompletionPrompt]) -> None:
        super().__init__(body, service)
        self._with_logprobs = body.logprobs is not None
        self._echo = bool(body.echo)
        self._prompts = [prompt for prompt in prompts for _ in range(body.n or 1)]
        self._unechoed = set(range(len(self._prompts))) if self._echo else set()
        self._offsets = [0 for _ in self._prompts]  # characters of each choice's tokens so far

    def chunks(self, index: int, event: Event) -> list[bytes]:
        text, logprobs = event.text, [] if event.logprob is None else [event.logprob]
        prompt = self._prompts[index] if index in self._unechoed else CompletionPrompt("", ())
        self._unechoed.discard(index)
        text = prompt.text + text
        ids = self.ids(event)
        if not (text or logprobs or event.finish or ids):
            return []
        scores = "null"
        if self._with_logprobs:
            scores = quote(self._logprobs(index, prompt.tokens, event.prompt_logprobs or (), logprobs))
        finish = "null" if event.finish is None else quote(event.finish)
        row = f'{{"text":{quote(text)},"index":{index},"logprobs":{scores},"finish_reason":{finish}{ids}}}'
        return [self.chunk(row.encode())]

    def rows(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for index, choice in enumerate(choices):
            prompt = self._prompts[index] if self._echo else CompletionPrompt("", ())
            scores = None
            if self._with_logprobs:
                scores = self._logprobs(index, prompt.tokens, choice.prompt_logprobs, choice.logprobs)
            text = prompt.text + choice.text
            rows.append({"text": text, "index": index, "logprobs": scores, "finish_reason": choice.finish})
            if self.token_ids:
                prompt_ids = list(self._prompts[index].tokens)
                rows[-1] |= {"prompt_token_ids": prompt_ids, "token_ids": choice.token_ids}
        return rows

    def _logprobs(
        self, index: int, prompt: Sequence[int], prompt_logprobs: Sequence[Logprob], logprobs: Sequence[Logprob]
    ) -> dict[str, Any]:
        """Log-probabilities as completions have them, those of the prompt included, whose first token has none."""
        places: list[Logprob | None] = [None] if prompt else []
        places += [*prompt_logprobs, *logprobs]
        tokens = [*prompt[:1], *(place.token for place in places if place is not None)]
        names = [self.texts(token) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [None if place is None else finite(place.logprob) for place in places],
            "top_logprobs": [None if place is None else self._top(place) for place in places],
            "text_offset": offsets,
        }

    def _top(self, place: Logprob) -> dict[str, float]:
        """The most probable tokens, and the sampled one."""
        tops = {self.texts(token): finite(value) for token, value in place.top}
        return {**tops, self.texts(place.token): finite(place.logprob)}


def _usage(stream: Stream) -> dict[str, Any]:
    """Tokens of prompts and answers."""
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": stream.completion_tokens,
        "total_tokens": stream.prompt_tokens + stream.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stream.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _card(entry: Entry) -> dict[str, Any]:
    card = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "llama2"}
    loaded = entry.service
    return card if loaded is None else {**card, "max_model_len": loaded.model.engine.context}
