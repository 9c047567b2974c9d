"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from llama2.engine.request import Event, Logprob, Request, Sampling
from llama2.serve import answers
from llama2.serve.answers import Choice
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry, Models
from llama2.serve.service import Service, Stream
from llama2.serve.streaming import DONE, PING, PING_SECONDS, Growing, Watched, dump, event, quote
from llama2.serve.tokens import Texts, finite
from llama2.serve.wire import ChatRequest, Message, Sampled, StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    """The models that are served."""
    entries = _models(http).entries.values()
    return reply({"object": "list", "data": [_card(entry) for entry in entries]})


@router.get("/v1/models/{model:path}")
async def model(model: str, http: HttpRequest) -> Response:
    """One of the models that are served."""
    return reply(_card(_models(http).entry(model)))


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
    """The assistant's answer to a list of messages."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value")
    service = await _models(http).service(body.model)
    messages = [plain(i, message) for i, message in enumerate(body.messages)]
    prompt = await asyncio.to_thread(service.model.render, messages)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    request = Request(
        tuple(prompt),
        limit,
        sampling(body),
        stops(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        lookup=body.lookup or 0,
    )
    stream = await service.submit(answers.several(request, body.n or 1))
    answer = _Chat(body, service)
    headers = warning(body)
    if body.stream:
        return Growing(answer.stream(stream), stream.close, headers=headers)
    async with Watched(http, stream.close):
        return reply(answer.whole(await answers.collect(stream), len(prompt)), headers)


class _Answer:
    """One response in wire form: what stands in every part of it, and its usage."""

    object: str
    prefix: str

    def __init__(self, body: Sampled, service: Service) -> None:
        self.texts = service.texts
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.object,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": service.fingerprint,
        }

    async def stream(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        completed = 0
        started = False
        try:
            async for batch in stream.batches(PING_SECONDS):
                parts = [] if batch else [PING]
                if batch and not started:
                    started = True
                    parts += [self.begin(index) for index in range(len(stream.requests))]
                for index, news in batch:
                    answers.check(news)
                    completed += news.token is not None
                    parts += self.chunks(index, news)
                yield b"".join(parts)
        except Refusal as failure:
            yield event(failure.body())
            return
        if self.include_usage:
            prompt = sum(len(request.prompt) for request in stream.requests if request.choice == 0)
            yield event({**self.chunk_head(), "choices": [], "usage": usage(prompt, completed)})
        yield DONE

    def chunk_head(self) -> dict[str, Any]:
        """What every chunk begins with."""
        return self.head

    def begin(self, index: int) -> bytes:
        """The events before a choice's first token."""
        return b""

    def chunks(self, index: int, news: Event) -> list[bytes]:
        """The events that tell of one token."""
        raise NotImplementedError


class _Chat(_Answer):
    object = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, service: Service) -> None:
        super().__init__(body, service)
        self.logprobs = bool(body.logprobs)
        opened = dump(self.chunk_head())[:-1].decode()
        self._before = f'data: {opened},"choices":[{{"index":'
        self._after = "}]" + (',"usage":null' if self.include_usage else "") + "}\n\n"

    def chunk_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    def begin(self, index: int) -> bytes:
        return self._chunk(index, '{"role":"assistant","content":"","refusal":null}')

    def chunks(self, index: int, news: Event) -> list[bytes]:
        parts = []
        if news.text or news.logprob is not None:
            scores = "null"
            if self.logprobs and news.logprob is not None:
                scores = dump(chat_logprobs([news.logprob], self.texts)).decode()
            parts.append(self._chunk(index, f'{{"content":{quote(news.text)}}}', scores))
        if news.finish is not None:
            parts.append(self._chunk(index, "{}", finish=f'"{news.finish}"'))
        return parts

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> bytes:
        inner = f'{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}'
        return (self._before + inner + self._after).encode()

    def whole(self, choices: Sequence[Choice], prompt: int) -> dict[str, Any]:
        """The answer in one object."""
        rows = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs, self.texts) if self.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self.head, "choices": rows, "usage": usage(prompt, sum(choice.tokens for choice in choices))}


def plain(index: int, message: Message) -> dict[str, str]:
    """A message with one text as its content. Raises Refusal for parts that are no text."""
    role = "system" if message.role == "developer" else message.role
    if role in ("tool", "function"):
        raise unsupported(f"messages.{index}.role", f"{role!r} is not supported")
    if message.content is None:
        raise Refusal(400, f"messages.{index}.content: is missing", param=f"messages.{index}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = []
    for at, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise unsupported(f"messages.{index}.content.{at}", f"{part.type[:40]!r} is not supported, only text is")
        texts.append(part.text)
    return {"role": role, "content": "\n".join(texts)}


def sampling(body: Sampled) -> Sampling:
    """How tokens are drawn; OpenAI's defaults where nothing is said."""
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise Refusal(400, "logit_bias: names must be token ids", param="logit_bias", code="invalid_value") from None
    chosen: dict[str, Any] = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "seed": secrets.randbits(32) if body.seed is None else body.seed % (1 << 64),
        "logit_bias": bias,
    }
    for name in ("top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        if (value := getattr(body, name)) is not None:
            chosen[name] = value
    return Sampling(**chosen)


def stops(body: Sampled) -> tuple[str, ...]:
    """Texts that end an answer."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """Tokens of prompts and answers."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def chat_logprobs(logprobs: Sequence[Logprob], texts: Texts) -> dict[str, Any]:
    """Log-probabilities as chat completions show them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": texts(token), "logprob": finite(value), "bytes": texts.bytes(token)}

    rows = [
        {**entry(place.token, place.logprob), "top_logprobs": [entry(*other) for other in place.top]}
        for place in logprobs
    ]
    return {"content": rows, "refusal": None}


def warning(body: Sampled) -> dict[str, str]:
    """A header that names the fields which nobody knows."""
    names = sorted(set(body.unknown()))
    if not names:
        return {}
    shown = ", ".join(name[:60] for name in names[:20])
    return {"Warning": f'299 llama2 "unknown fields are ignored: {shown.encode("ascii", "replace").decode()}"'}


def reply(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A JSON object."""
    return Response(dump(value), status, headers, "application/json")


def _models(http: HttpRequest) -> Models:
    models: Models = http.app.state.models
    return models


def _card(entry: Entry) -> dict[str, Any]:
    card = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "llama2"}
    loaded = entry.service
    return card if loaded is None else {**card, "max_model_len": loaded.model.engine.context}
