"""Routes of llama.cpp's and vLLM's servers about themselves: health, properties, slots, metrics, tokens."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

from llama2.engine.request import Request
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.serve import metrics
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.service import Service
from llama2.serve.surfaces.context import models_of, warning_header
from llama2.serve.surfaces.encoding import json_response
from llama2.serve.surfaces.generation import Tools, build_requests, check_size
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.llamacpp_sampling import sampling_json
from llama2.serve.surfaces.messages import to_message
from llama2.serve.surfaces.prompts import prompt_text
from llama2.serve.surfaces.wire import ChatMessage, Tokens, Values, Wire
from llama2.text.dialog import Dialog
from llama2.version import package_version

router = APIRouter(route_class=JsonRoute)


class TokenizeRequest(Wire):
    """`POST /tokenize`: a text as llama.cpp's `content` or vLLM's `prompt`, or the messages of a chat.

    `parse_special` recognises control tokens in a text.
    """

    UNSUPPORTED: ClassVar[Values] = {"chat_template": (), "chat_template_kwargs": ({},)}

    content: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special: bool = False  # to `content`
    add_special_tokens: bool | None = None  # to a prompt by default; a chat has them already
    parse_special: bool = True
    with_pieces: bool = False
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(Wire):
    """`POST /detokenize`."""

    tokens: Tokens
    model: str | None = None


class ApplyTemplateRequest(Wire):
    """`POST /apply-template`."""

    UNSUPPORTED: ClassVar[Values] = {"chat_template": (), "chat_template_kwargs": ({},)}

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    model: str | None = None


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def health(http: HttpRequest) -> Response:
    """Whether requests are accepted: 503 while the first model is loaded, and while the server is stopping."""
    models = models_of(http)
    if models.draining or not models.ready:
        message = "The server is stopping" if models.draining else "Loading model"
        return json_response({"error": {"code": 503, "message": message, "type": "unavailable_error"}}, status=503)
    return json_response({"status": "ok"})


@router.get("/metrics")
async def read_metrics(http: HttpRequest) -> Response:
    """Metrics for Prometheus."""
    models = models_of(http)
    return Response(models.metrics.text(models.loads), media_type=metrics.CONTENT_TYPE)


@router.get("/props")
async def props(http: HttpRequest, model: str | None = None) -> Response:
    """A model's properties and defaults."""
    service = await _service(http, model)
    checkpoint, default = service.model.checkpoint, Request((), sampling=service.sampling)
    return json_response(
        {
            "default_generation_settings": {"n_ctx": service.model.engine.context, "params": sampling_json(default)},
            "total_slots": MAX_SEQUENCES,
            "model_alias": service.name,
            "model_path": checkpoint.path.name,
            "chat_template": checkpoint.template or "",
            "modalities": {"vision": False, "audio": False},
            "build_info": f"llama2 {package_version()}",
            "is_sleeping": False,
        }
    )


@router.get("/slots")
async def slots(http: HttpRequest, model: str | None = None, fail_on_no_slot: str = "") -> Response:
    """The progress of running answers, without their texts. Choices of one request have their mean."""
    service = await _service(http, model)
    context = service.model.engine.context
    rows: list[dict[str, Any]] = []
    for stream in service.streams:
        first, n = stream.requests[0], len(stream.requests)
        decoded = stream.completion_tokens // n
        limit = context - len(first.prompt) if first.max_tokens is None else first.max_tokens
        row = {
            "is_processing": True,
            "n_prompt_tokens": len(first.prompt),
            "params": sampling_json(first),
            "next_token": [{"has_next_token": True, "n_remain": limit - decoded, "n_decoded": decoded}],
        }
        rows += [{**row, "speculative": first.lookup > 0}] * stream.open
    if fail_on_no_slot and len(rows) >= MAX_SEQUENCES:
        raise Refusal(503, "no slot is free", type="unavailable_error")
    rows = rows[:MAX_SEQUENCES]  # others wait
    rows += [{"is_processing": False, "speculative": False}] * (MAX_SEQUENCES - len(rows))
    return json_response([{"id": i, "n_ctx": context, **row} for i, row in enumerate(rows)])


@router.get("/version")
async def version() -> Response:
    """The program's version."""
    return json_response({"version": package_version()})


@router.get("/tokenizer_info")
async def tokenizer_info(http: HttpRequest, model: str | None = None) -> Response:
    """A tokenizer's properties, by the names of a `tokenizer_config.json`."""
    service = await _service(http, model)
    t, texts = service.model.tokenizer, service.texts
    ends = {"bos_token": t.bos_id, "eos_token": t.eos_id}
    return json_response(
        {
            "tokenizer_class": "LlamaTokenizer" if t.kind == "sentencepiece" else "PreTrainedTokenizerFast",
            **{name: None if token is None else texts(token) for name, token in ends.items()},
            "add_bos_token": t.add_bos,
            "vocab_size": t.vocab_size,
            "model_max_length": service.model.engine.context,
            "added_tokens_decoder": {
                str(token): {"content": text, "special": True} for text, token in sorted(t.control.items())
            },
            "chat_template": service.model.checkpoint.template,
        }
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, http: HttpRequest) -> Response:
    """The token ids of a text, or of a chat's prompt."""
    service = await _service(http, body.model)
    t = service.model.tokenizer
    given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise Refusal(400, "content: one of content, prompt and messages must be given", param="content")
    if body.messages is not None:
        tokens = await _chat_tokens(body, body.messages, service, http)
        special = bool(body.add_special_tokens)
    else:
        text = body.prompt if body.content is None else body.content
        special = body.add_special if body.prompt is None else body.add_special_tokens is not False

        def encode() -> list[int]:
            service.limit.check(text or "")
            return t.encode(text or "", special=body.parse_special)

        tokens = await asyncio.to_thread(encode)
    if special and t.add_bos and t.bos_id is not None:
        tokens = [t.bos_id, *tokens]
    listed = [{"id": token, "piece": _piece(service, token)} for token in tokens] if body.with_pieces else tokens
    answer: dict[str, Any] = {
        "tokens": listed,
        "count": len(tokens),
        "max_model_len": service.model.engine.context,
    }
    if body.return_token_strs:
        answer["token_strs"] = [service.texts(token) for token in tokens]
    return json_response(answer, warning_header(body, http))


async def _chat_tokens(
    body: TokenizeRequest, chat: list[ChatMessage], service: Service, http: HttpRequest
) -> list[int]:
    """The tokens of a chat: a prompt for an answer, or the whole chat, as training has it."""
    messages = [to_message(f"messages.{i}", message) for i, message in enumerate(chat)]
    ends = messages[-1]["role"] == "assistant"
    if body.continue_final_message and not ends:
        raise unsupported("continue_final_message", "the last message is not the assistant's")
    if body.add_generation_prompt is False and not ends:
        raise unsupported("add_generation_prompt", "false needs an assistant's message at the end")
    if body.add_generation_prompt is False and not body.continue_final_message:

        def whole() -> list[int]:
            check_size(service, messages, Tools(body.tools))
            template = service.model.checkpoint.template_for(tools=bool(body.tools))
            neutralise = models_of(http).settings.neutralise
            dialog = Dialog(messages)
            return dialog.render(service.model.tokenizer, template, neutralise=neutralise, tools=body.tools)[0]

        return await asyncio.to_thread(whole)
    ((request,), _) = await build_requests(http, service, messages, Request(()), tools=Tools(body.tools))
    return list(request.prompt)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, http: HttpRequest) -> Response:
    """The text of token ids, in llama.cpp's field and in vLLM's."""
    service = await _service(http, body.model)
    text = await asyncio.to_thread(service.model.tokenizer.decode, body.tokens)
    return json_response({"content": text, "prompt": text}, warning_header(body, http))


@router.post("/apply-template")
async def apply_template(body: ApplyTemplateRequest, http: HttpRequest) -> Response:
    """The prompt of a chat, control tokens by their names."""
    service = await _service(http, body.model)
    messages = [to_message(f"messages.{i}", message) for i, message in enumerate(body.messages)]
    ((request,), _) = await build_requests(http, service, messages, Request(()), tools=Tools(body.tools))
    return json_response({"prompt": prompt_text(service, request.prompt)}, warning_header(body, http))


def _piece(service: Service, token: int) -> str | list[int]:
    """A token's text, or its bytes if they are a part of a character."""
    text = service.texts(token)
    return service.texts.bytes(token) or [] if text.startswith("bytes:") else text


async def _service(http: HttpRequest, name: str | None) -> Service:
    models = models_of(http)
    return await models.service(name or next(iter(models.entries)))
