"""llama.cpp's routes: health, properties, metrics, tokens."""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import Any, ClassVar

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

import llama2
from llama2.engine.request import Request, Sampling
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.serve import answers, metrics
from llama2.serve.answers import Tools
from llama2.serve.openai import plain, reply, served, warning
from llama2.serve.service import Service
from llama2.serve.wire import Message, StrictRoute, Token, Values, Wire

router = APIRouter(route_class=StrictRoute)


class Tokenize(Wire):
    """`POST /tokenize`. `parse_special` recognises control tokens in the text."""

    content: str
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class Detokenize(Wire):
    """`POST /detokenize`."""

    tokens: list[Token]
    model: str | None = None


class ApplyTemplate(Wire):
    """`POST /apply-template`."""

    UNSUPPORTED: ClassVar[Values] = {"chat_template": (), "chat_template_kwargs": ({},)}

    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    model: str | None = None


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health(http: HttpRequest) -> Response:
    """Whether requests are taken: 503 while the first model is loaded, and while the server is stopping."""
    models = served(http)
    if models.draining or not models.ready:
        message = "The server is stopping" if models.draining else "Loading model"
        return reply({"error": {"code": 503, "message": message, "type": "unavailable_error"}}, status=503)
    return reply({"status": "ok"})


@router.get("/metrics")
async def read_metrics(http: HttpRequest) -> Response:
    """What Prometheus reads."""
    models = served(http)
    return Response(models.metrics.text(models), media_type=metrics.CONTENT_TYPE)


@router.get("/props")
async def props(http: HttpRequest, model: str | None = None) -> Response:
    """What a model is, and its defaults."""
    service = await _service(http, model)
    engine, checkpoint, drawn = service.model.engine, service.model.checkpoint, Sampling()
    settings = {name: getattr(drawn, name) for name in Sampling.__slots__ if name not in ("seed", "logit_bias")}
    return reply(
        {
            "default_generation_settings": {
                "n_ctx": engine.context,
                "params": settings | {"temperature": 1.0, "top_p": 1.0},
            },
            "total_slots": MAX_SEQUENCES,
            "model_alias": service.name,
            "model_path": checkpoint.path.name,
            "chat_template": checkpoint.template or "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"llama2 {llama2.__version__}",
            "is_sleeping": False,
        }
    )


@router.post("/tokenize")
async def tokenize(body: Tokenize, http: HttpRequest) -> Response:
    """The token ids of a text."""
    service = await _service(http, body.model)
    t = service.model.tokenizer
    bos = body.add_special and t.add_bos
    tokens = await asyncio.to_thread(t.encode, body.content, bos=bos, special=body.parse_special)
    shown: list[Any] = list(tokens)
    if body.with_pieces:
        shown = [{"id": token, "piece": _piece(service, token)} for token in tokens]
    return reply({"tokens": shown}, warning(body))


@router.post("/detokenize")
async def detokenize(body: Detokenize, http: HttpRequest) -> Response:
    """The text of token ids."""
    service = await _service(http, body.model)
    return reply({"content": await asyncio.to_thread(service.model.tokenizer.decode, body.tokens)}, warning(body))


@router.post("/apply-template")
async def apply_template(body: ApplyTemplate, http: HttpRequest) -> Response:
    """The prompt that a chat becomes, its control tokens by their names."""
    service = await _service(http, body.model)
    messages = [plain(f"messages.{i}", message) for i, message in enumerate(body.messages)]
    neutralise = served(http).settings.neutralise
    ((request,), _) = await answers.ask(service, messages, Request(()), neutralise=neutralise, tools=Tools(body.tools))
    tokens = request.prompt
    parts = []
    for control, group in groupby(tokens, lambda token: service.texts.bytes(token) is None):
        run = list(group)
        parts.append("".join(map(service.texts, run)) if control else service.model.tokenizer.decode(run))
    return reply({"prompt": "".join(parts)}, warning(body))


def _piece(service: Service, token: int) -> str | list[int]:
    """A token's text, or its bytes where they are a part of a character."""
    text = service.texts(token)
    return service.texts.bytes(token) or [] if text.startswith("bytes:") else text


async def _service(http: HttpRequest, name: str | None) -> Service:
    models = served(http)
    return await models.service(name or next(iter(models.entries)))
