"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from llama2.engine.request import Event, Logprob, Request, Sampling
from llama2.serve import answers
from llama2.serve.answers import Choice, Tools
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry, Models
from llama2.serve.service import Service, Stream
from llama2.serve.streaming import DONE, PING, PING_SECONDS, Growing, Watched, dump, event, quote
from llama2.serve.tokens import Texts, finite
from llama2.serve.wire import ChatRequest, CompletionRequest, Message, Sampled, StrictRoute, Wire

if TYPE_CHECKING:
    from llama2.serve.tools import CallReader

log = logging.getLogger("llama2.serve")

router = APIRouter(route_class=StrictRoute)  # which tries the routes in turn, so those come first that are asked most


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
    """The assistant's answer to a list of messages."""
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs: needs logprobs: true", param="top_logprobs", code="invalid_value")
    service = await served(http).service(body.model)
    request = Request(
        (),
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        sampling(body),
        stops(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        lookup=drafts(body, http),
    )
    requests, readers = await answers.ask(
        service,
        [plain(f"messages.{i}", message) for i, message in enumerate(body.messages)],
        request,
        body.n or 1,
        neutralise=served(http).settings.neutralise,
        tools=Tools(body.tools, body.tool_choice, body.parallel_tool_calls),
        response=body.response_format.constraint if body.response_format else None,
    )
    stream = await answers.start(http, service, requests)
    return await _respond(_Chat(body, service, readers), body, stream, http)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
    """Texts, or token ids, continued without a chat format."""
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise unsupported("best_of", "more than n is not supported")
    if body.max_tokens == 0 and not body.echo:
        raise Refusal(400, "max_tokens: 0 needs echo: true", param="max_tokens", code="invalid_value")
    service = await served(http).service(body.model)
    rule = body.response_format.constraint if body.response_format else None
    request = Request(
        (),
        16 if body.max_tokens is None else body.max_tokens,
        stop=stops(body),
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and (body.logprobs is not None or body.max_tokens == 0),
        continues=True,
        lookup=drafts(body, http),
    )

    def make() -> tuple[list[Prompt], list[Request]]:
        prompts = _prompts(body.prompt, service)
        requests = []
        for prompt in prompts:  # each with a seed of its own, unless one is given
            asked = replace(request, prompt=tuple(prompt.tokens), sampling=sampling(body))
            requests += answers.several(service, asked, body.n or 1, [rule])
        return prompts, requests

    prompts, requests = await asyncio.to_thread(make)
    stream = await answers.start(http, service, requests)
    return await _respond(_Completion(body, service, prompts), body, stream, http)


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    """The models that are served."""
    entries = served(http).entries.values()
    return reply({"object": "list", "data": [_card(entry) for entry in entries]})


@router.get("/v1/models/{model:path}")
async def model(model: str, http: HttpRequest) -> Response:
    """One of the models that are served."""
    return reply(_card(served(http).entry(model)))


async def _respond(answer: _Answer, body: Sampled, stream: Stream, http: HttpRequest) -> Response:
    headers = warning(body)
    if body.stream:
        return Growing(answer.stream(stream), stream.close, headers=headers)
    async with Watched(http, stream.close):
        choices = await answers.collect(stream, answer.readers)
    return reply({**answer.head, "choices": answer.rows(choices), "usage": usage(stream)}, headers)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued: its text and its tokens."""

    text: str
    tokens: Sequence[int]


def _prompts(given: str | list[str] | list[int] | list[list[int]], service: Service) -> list[Prompt]:
    """The prompts of a completion, in whichever of four forms they came. Raises Refusal for an empty one."""
    one: Any = given
    several: list[Any] = [one] if isinstance(one, str) or (one and isinstance(one[0], int)) else one
    prompts = []
    for prompt in several:
        if isinstance(prompt, str):
            prompts.append(Prompt(prompt, service.model.encode(prompt)))
        else:
            prompts.append(Prompt(service.model.tokenizer.decode(prompt), prompt))
    if not prompts or not all(prompt.tokens for prompt in prompts):
        raise Refusal(400, "prompt: is empty", param="prompt", code="invalid_value")
    return prompts


class _Answer:
    """One response in wire form: what stands in every part of it, and its usage."""

    object: str
    prefix: str
    readers: Sequence[CallReader] = ()  # of the choices of a chat

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
                for index, news in batch:
                    answers.check(news)
                    parts += self.chunks(index, news)
                yield b"".join(parts)
        except Refusal as failure:
            yield event(failure.body())
            return
        if self.include_usage:
            yield event({**self.chunk_head(), "choices": [], "usage": usage(stream)})
        yield DONE

    def chunk_head(self) -> dict[str, Any]:
        """What every chunk begins with."""
        return self.head

    def chunk(self, row: bytes) -> bytes:
        """The event of a choice's part, in JSON."""
        return self._before + row + self._after

    def begin(self, index: int) -> bytes:
        """The events before a choice's first token."""
        return b""

    def chunks(self, index: int, news: Event) -> list[bytes]:
        """The events that tell of one token."""
        raise NotImplementedError

    def rows(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """The choices of a whole answer."""
        raise NotImplementedError


class _Chat(_Answer):
    object = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, service: Service, readers: Sequence[CallReader]) -> None:
        super().__init__(body, service)
        self.readers = readers
        self.logprobs = bool(body.logprobs)

    def chunk_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    def begin(self, index: int) -> bytes:
        return self._chunk(index, '{"role":"assistant","content":"","refusal":null}')

    def chunks(self, index: int, news: Event) -> list[bytes]:
        reader = self.readers[index]
        deltas = [quote(piece.delta()) for piece in reader.push(news)]
        scores = "null"
        if self.logprobs and news.logprob is not None:
            scores = quote(chat_logprobs([news.logprob], self.texts))
            deltas = deltas or ['{"content":""}']
        parts = [self._chunk(index, delta, "null" if i else scores) for i, delta in enumerate(deltas)]
        if news.finish is not None:
            parts.append(self._chunk(index, "{}", finish=f'"{reader.finish_reason(news.finish)}"'))
        return parts

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish: str = "null") -> bytes:
        row = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}}}'
        return self.chunk(row.encode())

    def rows(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": {"role": "assistant", "refusal": None, **reader.message()},
                "logprobs": chat_logprobs(choice.logprobs, self.texts) if self.logprobs else None,
                "finish_reason": reader.finish_reason(choice.finish or "stop"),
            }
            for index, (choice, reader) in enumerate(zip(choices, self.readers, strict=True))
        ]


class _Completion(_Answer):
    object = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: CompletionRequest, service: Service, prompts: Sequence[Prompt]) -> None:
        super().__init__(body, service)
        self._asked = body.logprobs is not None
        self._echo = bool(body.echo)
        self._prompts = [prompt for prompt in prompts for _ in range(body.n or 1)]
        self._unechoed = set(range(len(self._prompts))) if self._echo else set()
        self._offsets = [0 for _ in self._prompts]  # characters of each choice's tokens so far

    def chunks(self, index: int, news: Event) -> list[bytes]:
        text, logprobs = news.text, [] if news.logprob is None else [news.logprob]
        prompt = self._prompts[index] if index in self._unechoed else Prompt("", ())
        self._unechoed.discard(index)
        text = prompt.text + text
        if not (text or logprobs or news.finish):
            return []
        scores = "null"
        if self._asked:
            scores = quote(self._logprobs(index, prompt.tokens, news.prompt_logprobs or (), logprobs))
        finish = "null" if news.finish is None else quote(news.finish)
        row = f'{{"text":{quote(text)},"index":{index},"logprobs":{scores},"finish_reason":{finish}}}'
        return [self.chunk(row.encode())]

    def rows(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        rows = []
        for index, choice in enumerate(choices):
            prompt = self._prompts[index] if self._echo else Prompt("", ())
            scores = None
            if self._asked:
                scores = self._logprobs(index, prompt.tokens, choice.prompt_logprobs, choice.logprobs)
            text = prompt.text + choice.text
            rows.append({"text": text, "index": index, "logprobs": scores, "finish_reason": choice.finish})
        return rows

    def _logprobs(
        self, index: int, prompt: Sequence[int], prompt_logprobs: Sequence[Logprob], logprobs: Sequence[Logprob]
    ) -> dict[str, Any]:
        """Log-probabilities as completions show them: of the prompt's tokens, where the first has none, too."""
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
        """The likeliest tokens, and the drawn one if it is not among them."""
        tops = {self.texts(token): finite(value) for token, value in place.top}
        return {**tops, self.texts(place.token): finite(place.logprob)}


def plain(where: str, message: Message, content: str = "content") -> dict[str, Any]:
    """A message with one text as its content, as Dialog takes it. Raises Refusal for parts that are no text.

    `where` is the message's place in the request, and `content` the name of that field there.
    """
    role = "system" if message.role == "developer" else message.role
    if role == "function":
        raise unsupported(f"{where}.role", f"{role!r} is not supported, 'tool' is")
    plain: dict[str, Any] = {"role": role, "content": _text(f"{where}.{content}", message)}
    if message.tool_calls:
        plain["tool_calls"] = message.tool_calls
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _text(field: str, message: Message) -> str:
    if message.content is None:
        if message.tool_calls:
            return ""
        raise Refusal(400, f"{field}: is missing", param=field)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for at, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise unsupported(f"{field}.{at}", f"{part.type[:40]!r} is not supported, only text is")
        texts.append(part.text)
    return "\n".join(texts)


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


def drafts(body: Sampled, http: HttpRequest) -> int:
    """How many tokens a step may draft."""
    return served(http).settings.lookup if body.lookup is None else body.lookup


def usage(stream: Stream) -> dict[str, Any]:
    """Tokens of prompts and answers."""
    return {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": stream.completion_tokens,
        "total_tokens": stream.prompt_tokens + stream.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stream.cached_tokens},
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


def warning(body: Wire) -> dict[str, str]:
    """A header that names the fields which nobody knows, which are also logged."""
    names = sorted(
        {
            "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "?" for c in n[:60])
            for n in body.unknown()
        }
    )
    if not names:
        return {}
    shown = ", ".join(names[:20])
    log.warning("unknown fields", extra={"facts": {"fields": shown}})
    return {"Warning": f'299 llama2 "unknown fields are ignored: {shown}"'}


def reply(value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    """A JSON object."""
    return Response(dump(value), status, headers, "application/json")


def served(http: HttpRequest) -> Models:
    """The models that this application serves."""
    models: Models = http.app.state.models
    return models


def _card(entry: Entry) -> dict[str, Any]:
    card = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "llama2"}
    loaded = entry.service
    return card if loaded is None else {**card, "max_model_len": loaded.model.engine.context}
