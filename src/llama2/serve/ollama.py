"""Ollama's routes: chat and generate as lines of JSON, and what models there are. Durations are in nanoseconds."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

import llama2
from llama2.api import Model
from llama2.engine.request import Request, Sampling
from llama2.serve import answers
from llama2.serve.answers import Tools
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry
from llama2.serve.openai import plain, reply, served, warning
from llama2.serve.service import Service, Stream
from llama2.serve.streaming import Growing, Watched, dump
from llama2.serve.tools import CallReader, Text, Toolset
from llama2.serve.wire import Message, StopText, StrictRoute, Token, Values, Wire
from llama2.text.template import knows_tools

if TYPE_CHECKING:
    from llama2.serve.constrain import Constraint

log = logging.getLogger("llama2.serve")

#: An answer's text and calls as a route tells them.
Form = Callable[[str, list[dict[str, Any]]], dict[str, Any]]

router = APIRouter(route_class=StrictRoute)


class Options(Wire):
    """How tokens are drawn, with Ollama's defaults."""

    UNSUPPORTED: ClassVar[Values] = {
        "mirostat": (0,),
        "tfs_z": (1, 1.0),
        "typical_p": (1, 1.0),
        "numa": (False,),
        "low_vram": (False,),
    }

    num_ctx: int | None = Field(None, ge=1)
    num_predict: int | None = Field(None, ge=-2, lt=1 << 62)
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[StopText], Field(max_length=16)] | StopText | None = None


class Asked(Wire):
    """What Ollama's two ways to generate share."""

    model: str
    stream: bool | None = None
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None  # a JSON schema
    keep_alive: str | int | float | None = None  # the operator decides it

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to the format. Raises RequestError."""
        from llama2.serve import constrain

        if not self.format and self.format != {}:
            return None
        return (
            constrain.json_object("format") if self.format == "json" else constrain.json_schema(self.format, "format")
        )


class Turn(Message):
    """One message of a chat; a tool's may say by `tool_name` which function answers."""

    UNSUPPORTED: ClassVar[Values] = {"images": ([],), "thinking": ("",)}

    tool_name: str | None = None


class Chat(Asked):
    """`POST /api/chat`."""

    UNSUPPORTED: ClassVar[Values] = {"think": (False,), "logprobs": (False,), "top_logprobs": (0,)}

    messages: list[Turn] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None


class Generate(Asked):
    """`POST /api/generate`."""

    UNSUPPORTED: ClassVar[Values] = {
        **{"suffix": ("",), "images": ([],), "think": (False,), "template": ("",)},
        **{"logprobs": (False,), "top_logprobs": (0,)},
    }

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    context: list[Token] | None = None


class Show(Wire):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


@router.post("/api/chat")
async def chat(body: Chat, http: HttpRequest) -> Response:
    """The assistant's answer to a list of messages."""
    service = await served(http).service(body.model)
    messages = [_plain(i, message) for i, message in enumerate(body.messages)]
    return await _answer(body, service, messages, http, _message, Tools(body.tools))


@router.post("/api/generate")
async def generate(body: Generate, http: HttpRequest) -> Response:
    """The answer to a prompt, in the chat format unless it is raw."""
    if body.context:
        raise unsupported("context", "old conversations are not supported; use /api/chat")
    service = await served(http).service(body.model)
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": body.prompt}]
    return await _answer(body, service, body.prompt if body.raw else messages, http, _response)


@router.get("/api/tags")
async def tags(http: HttpRequest) -> Response:
    """The models that are served."""
    return reply({"models": [await _entry(entry) for entry in served(http).entries.values()]})


@router.post("/api/show")
async def show(body: Show, http: HttpRequest) -> Response:
    """What a model is."""
    name = body.model or body.name
    if name is None:
        raise Refusal(400, "model: is missing", param="model")
    service = await served(http).service(name)
    model, config = service.model, service.model.config
    info = {
        "general.architecture": "llama",
        "general.parameter_count": config.parameters(),
        "llama.context_length": model.engine.context,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
    }
    checkpoint = model.checkpoint
    return reply(
        {
            "license": checkpoint.licence or "",
            "modelfile": "",
            "parameters": "",
            "template": checkpoint.template or "",
            "details": _details(model),
            "model_info": info,
            "capabilities": ["completion", *(["tools"] if knows_tools(checkpoint.template or "") else [])],
            "modified_at": _time(checkpoint.path.stat().st_mtime),
        },
        warning(body),
    )


@router.get("/api/version")
async def version() -> Response:
    """The program's version."""
    return reply({"version": llama2.__version__})


async def _answer(
    body: Asked,
    service: Service,
    prompt: str | list[dict[str, Any]],
    http: HttpRequest,
    form: Form,
    tools: Tools = Tools(),  # noqa: B008  # it is frozen
) -> Response:
    """The answer to a chat, or the continuation of a text."""
    o = body.options or Options()
    context = service.model.engine.context
    if o.num_ctx is not None and o.num_ctx > context:
        raise Refusal(
            400, f"options.num_ctx: {o.num_ctx} is more than the context of {context}", param="options.num_ctx"
        )
    limit = o.num_predict if o.num_predict is not None and o.num_predict > 0 else None
    stop = (o.stop,) if isinstance(o.stop, str) else tuple(o.stop or ())
    settings, rule = served(http).settings, body.constraint
    request = Request((), limit, _sampling(o), stop, continues=isinstance(prompt, str), lookup=settings.lookup)
    if isinstance(prompt, str):
        tokens = await asyncio.to_thread(service.model.encode, prompt)
        request = replace(request, prompt=tuple(tokens))
        requests = await asyncio.to_thread(answers.several, service, request, 1, [rule])
        reader = Toolset(None, None, None, None, service.model.tokenizer).reader()
    else:
        neutralise = settings.neutralise
        requests, (reader,) = await answers.ask(
            service, prompt, request, neutralise=neutralise, tools=tools, response=rule
        )
    stream = await answers.start(http, service, requests)
    head = {"model": body.model}
    if body.stream is None or body.stream:
        lines = _lines(stream, reader, head, form)
        return Growing(lines, stream.close, headers=warning(body), media_type="application/x-ndjson")
    async with Watched(http, stream.close):
        await answers.collect(stream, [reader])
    said = form(reader.message()["content"] or "", _calls(reader))
    return reply({**head, "created_at": _now(), **said, **_end(stream)}, warning(body))


async def _lines(stream: Stream, reader: CallReader, head: dict[str, Any], form: Form) -> AsyncIterator[bytes]:
    try:
        async for batch in stream.batches():
            text = ""
            for _, event in batch:
                answers.check(event)
                text += "".join(piece.text for piece in reader.push(event) if isinstance(piece, Text))
            if text:
                yield dump({**head, "created_at": _now(), **form(text, []), "done": False}) + b"\n"
    except Refusal as failure:
        yield dump({"error": failure.message}) + b"\n"
        return
    if calls := _calls(reader):
        yield dump({**head, "created_at": _now(), **form("", calls), "done": False}) + b"\n"
    yield dump({**head, "created_at": _now(), **form("", []), **_end(stream)}) + b"\n"


def _plain(index: int, turn: Turn) -> dict[str, Any]:
    message = plain(f"messages.{index}", turn)
    return message if turn.tool_name is None else {**message, "name": turn.tool_name}


def _message(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


def _response(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": text}


def _calls(reader: CallReader) -> list[dict[str, Any]]:
    """The calls of an answer that has ended, their arguments as objects."""
    calls = []
    for call in reader.message().get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            calls.append({"function": {"name": name, "arguments": json.loads(arguments)}})
        except ValueError:  # a limit ended the answer in it, and then it is none
            log.warning("a call was cut short", extra={"facts": {"function": name}})
    return calls


def _sampling(o: Options) -> Sampling:
    seed = secrets.randbits(32) if o.seed is None or o.seed < 0 else o.seed
    chosen = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0}
    given = {
        **{"temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p, "min_p": o.min_p},
        "repetition_penalty": o.repeat_penalty,
        "presence_penalty": o.presence_penalty,
        "frequency_penalty": o.frequency_penalty,
    }
    values: dict[str, Any] = chosen | {name: value for name, value in given.items() if value is not None}
    return Sampling(seed=seed, **values)


def _end(stream: Stream) -> dict[str, Any]:
    ended = stream.ended or stream.arrived
    first = stream.first or ended
    started = stream.started or first
    return {
        "done": True,
        "done_reason": stream.finishes[0],
        "total_duration": _nanoseconds(ended - stream.arrived),
        "load_duration": _nanoseconds(started - stream.arrived),
        "prompt_eval_count": stream.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(first - started),
        "eval_count": stream.completion_tokens,
        "eval_duration": _nanoseconds(ended - first),
    }


def _nanoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


async def _entry(entry: Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {"modified_at": _time(entry.created), "size": 0, "digest": "", "details": _details(None)}
    if entry.service is not None:
        model = entry.service.model
        stat = model.checkpoint.path.stat()
        size = stat.st_size if model.checkpoint.path.is_file() else 0
        digest = hashlib.sha256(f"{model.checkpoint.path} {stat.st_mtime_ns}".encode()).hexdigest()
        facts = {"modified_at": _time(stat.st_mtime), "size": size, "digest": digest, "details": _details(model)}
    return {"name": entry.name, "model": entry.name, **facts}


def _details(model: Model | None) -> dict[str, Any]:
    """A model's facts; those of one that is not loaded are not known."""
    if model is None:
        return dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), "") | {
            "families": ["llama"]
        }
    matrices = Counter(tensor.format for tensor in model.checkpoint.tensors.values() if len(tensor.shape) > 1)
    return {
        "parent_model": "",
        "format": model.checkpoint.format,
        "family": "llama",
        "families": ["llama"],
        "parameter_size": f"{model.config.parameters() / 1e6:.1f}M"
        if model.config.parameters() < 1e9
        else f"{model.config.parameters() / 1e9:.1f}B",
        "quantization_level": matrices.most_common(1)[0][0],
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
