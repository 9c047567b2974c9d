"""Ollama's routes: chat and generate as lines of JSON, and which models there are and are loaded.

Durations are in nanoseconds. A model is chosen by the operator: it is loaded and unloaded here, and never made, fetched
or removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BeforeValidator, Field, WithJsonSchema

import llama2
from llama2.checkpoint import Checkpoint
from llama2.engine.request import Logprob, Request
from llama2.engine.runner import BLOCK
from llama2.serve.constrain.tools import CallReader, Text, Toolset
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces import common
from llama2.serve.surfaces.common import (
    Tools,
    chat_logprobs,
    json_response,
    served,
    stops,
    to_message,
    warn,
    warning_header,
)
from llama2.serve.surfaces.completion import Drawn, drawn, infill_marks, infill_tokens, prompt_tokens
from llama2.serve.surfaces.streaming import CancelOnDisconnect, StreamingResponse, dump
from llama2.serve.surfaces.wire import JsonRoute, Message, Token, Values, Wire
from llama2.text.template import knows_tools

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

log = logging.getLogger("llama2.serve")

router = APIRouter(route_class=JsonRoute)

#: Seconds after which a model counts as loaded forever: a hundred years, which dates can still say.
_FOREVER = 100 * 365 * 86400.0

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"([+-]?)((?:{_AMOUNT.pattern})+|\d+\.?\d*|\.\d+)")


def seconds(value: Any) -> Any:
    """Seconds of a `keep_alive`: a number of them, or a duration of Go's such as "1h30m". Negative ones are forever.

    Raises ValueError for anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if len(value) > 64 or (found := _DURATION.fullmatch(value)) is None:
            raise ValueError(f'{value[:40]!r} is not a duration; give seconds, or a text such as "5m" or "-1"')
        parts = _AMOUNT.findall(found[2]) or [(found[2], "")]
        amount = sum(float(number) * _UNITS[unit] for number, unit in parts)
        value = -amount if found[1] == "-" else amount
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError('must be seconds, or a text such as "5m" or "-1"')
    return float(value) if 0 <= value < _FOREVER else math.inf


KeepAlive = Annotated[
    float | None, BeforeValidator(seconds), WithJsonSchema({"type": ["number", "string", "null"], "default": None})
]


class Options(Drawn):
    """How tokens are drawn, and how many. The engine is the operator's: what would set its threads, memory or batches
    is ignored, and so is what nobody knows.
    """

    UNSUPPORTED: ClassVar[Values] = {
        "mirostat": (0,),
        "tfs_z": (1, 1.0),
        "vocab_only": (False,),
        "embedding_only": (False,),
    }

    num_ctx: int | None = Field(None, ge=0, lt=1 << 62)
    num_predict: int | None = Field(None, ge=-2, lt=1 << 62)
    stop: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=64)] | str | None = None


class Prompted(Wire):
    """What Ollama's two ways to generate share."""

    model: str
    stream: bool | None = None
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None  # a JSON schema
    keep_alive: KeepAlive = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to the format. Raises RequestError."""
        from llama2.serve.constrain import constraints

        if not self.format and self.format != {}:
            return None
        return (
            constraints.json_object("format")
            if self.format == "json"
            else constraints.json_schema(self.format, "format", strict=False)
        )

    def content(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """A part of an answer as the route's responses have it."""
        raise NotImplementedError


class Turn(Message):
    """One message of a chat; a tool's may say by `tool_name` which function answers."""

    UNSUPPORTED: ClassVar[Values] = {"images": ([],)}

    tool_name: str | None = None


class Chat(Prompted):
    """`POST /api/chat`."""

    messages: list[Turn] = Field([])
    tools: list[dict[str, Any]] | None = None

    def content(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """A message, with the calls of functions."""
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


class Generate(Prompted):
    """`POST /api/generate`."""

    UNSUPPORTED: ClassVar[Values] = {"images": ([],), "template": ("",)}

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None
    context: list[Token] | None = None

    def content(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """A text; without tools there are no calls."""
        return {"response": text}


class Named(Wire):
    """A request about one model; `name` is its older field."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None  # of a connection that is never made

    def entry(self, http: HttpRequest) -> Entry:
        """The model that is meant. Raises Refusal 400 or 404."""
        name = self.model or self.name
        if not name:
            raise Refusal(400, "model: is missing", param="model", code="invalid_value")
        return served(http).entry(name)


@router.post("/api/chat")
async def chat(body: Chat, http: HttpRequest) -> Response:
    """The assistant's answer to a list of messages. Without messages, the model is loaded, or unloaded."""
    begun = time.perf_counter()
    if not body.messages:
        return await _load(body, http)
    service = await served(http).service(body.model, body.keep_alive)
    loaded = time.perf_counter()
    messages = [_plain(i, message) for i, message in enumerate(body.messages)]
    tools = body.tools and [{"type": "function", **tool} for tool in body.tools]
    request = _request(body, service, http)
    requests, (reader,) = await common.build_requests(
        http, service, messages, request, tools=Tools(tools), response=body.constraint
    )
    return await _answer(_Answer(body, service, reader, begun, loaded), requests, http)


@router.post("/api/generate")
async def generate(body: Generate, http: HttpRequest) -> Response:
    """The answer to a prompt, in the chat format unless it is raw. Without a prompt, the model is loaded, or unloaded.

    A raw prompt is one that was written by a template, so control tokens in it are recognised. With a `suffix`, the
    answer is what stands before that. `context` are tokens of an earlier answer; the new prompt follows them.
    """
    begun = time.perf_counter()
    if not body.prompt:
        return await _load(body, http)
    _refuse_beside(body)
    service = await served(http).service(body.model, body.keep_alive)
    loaded = time.perf_counter()
    request = _request(body, service, http)
    tokenizer = service.model.tokenizer
    if body.raw or body.suffix:
        tokens = await asyncio.to_thread(_written, service, body)
        request = replace(request, prompt=tuple(tokens), continues=True)
        rule = body.constraint
        requests = await asyncio.to_thread(common.expand_choices, service, request, 1, [rule])
        if rule:
            common.warn(http, *rule.warnings)
        reader = Toolset(None, None, None, None, tokenizer).reader()
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        requests, (reader,) = await common.build_requests(http, service, messages, request, response=body.constraint)
    if body.context:
        # Llama 2's own format, which is no template, begins every turn with BOS; others begin a text with it.
        begins = service.model.checkpoint.template is not None and requests[0].prompt[:1] == (tokenizer.bos_id,)
        requests = [replace(r, prompt=(*body.context, *r.prompt[int(begins) :])) for r in requests]
    return await _answer(_Answer(body, service, reader, begun, loaded), requests, http)


@router.get("/api/tags")
async def tags(http: HttpRequest) -> Response:
    """The models that are served. Details of one that has to be fetched before its first use are not known."""
    entries = served(http).entries.values()
    return json_response({"models": await asyncio.to_thread(lambda: list(map(_card, entries)))})


@router.get("/api/ps")
async def ps(http: HttpRequest) -> Response:
    """The models that are loaded, those that stay longest first. `size` is that of weights and cache in memory."""
    rows = []
    for entry in served(http).entries.values():
        if entry.service is None:
            continue
        model = entry.service.model
        cache = model.config.cache_bytes(model.engine.load.blocks * BLOCK)
        left = min(entry.keep_alive, _FOREVER) - entry.idle
        rows.append(
            {
                **_named(entry),
                **_facts(model.checkpoint),
                "size": _size(model.checkpoint) + cache,
                "size_vram": 0,
                "context_length": model.engine.context,
                "expires_at": _time(time.time() + left),
            }
        )
    return json_response({"models": sorted(rows, key=lambda row: str(row["expires_at"]), reverse=True)})


@router.post("/api/show")
async def show(body: Named, http: HttpRequest) -> Response:
    """What a model is. One that has to be fetched first is loaded for that."""
    entry = body.entry(http)
    checkpoint = await asyncio.to_thread(entry.source.open)
    if checkpoint is None:
        checkpoint = (await served(http).service(entry.name)).model.checkpoint
    context = entry.service.model.engine.context if entry.service else checkpoint.config.context_length
    generic = served(http).settings.tools == "generic"
    shown = await asyncio.to_thread(_shown, entry, checkpoint, context, generic, bool(body.verbose))
    return json_response(shown, warning_header(body, http))


@router.post("/api/pull")
async def pull(body: Named, http: HttpRequest) -> Response:
    """Succeeds for a model that is served. Others are refused: nothing is fetched for those who ask."""
    try:
        body.entry(http)
    except Refusal as refusal:
        if refusal.status_code == 404:
            refusal.message += "; this server fetches nothing, `llama2 serve -m NAME` serves a model"
        raise
    if body.stream is False:
        return json_response({"status": "success"}, warning_header(body, http))
    lines = dump({"status": "pulling manifest"}) + b"\n" + dump({"status": "success"}) + b"\n"
    return Response(lines, headers=warning_header(body, http), media_type="application/x-ndjson")


@router.get("/api/blobs/{digest}")
async def blob(http: HttpRequest) -> Response:
    """No file can be put here, so none is."""
    raise Refusal(404, "blob not found", code="not_found")


@router.post("/api/create")
@router.post("/api/copy")
@router.delete("/api/delete")
@router.post("/api/push")
@router.post("/api/blobs/{digest}")
async def unchanged(http: HttpRequest) -> Response:
    """Refused: models are not made, copied, removed or sent away by those who ask."""
    what = http.url.path.split("/")[2]
    raise Refusal(
        403,
        f"/api/{what}: models of this server are not changed over HTTP; `llama2 pull`, `convert`, `quantize` and "
        "`rm` do that on its machine",
        code="not_allowed",
        type="permission_error",
    )


@router.get("/api/version")
async def version() -> Response:
    """The program's version."""
    return json_response({"version": llama2.__version__})


async def _load(body: Prompted, http: HttpRequest) -> Response:
    """Load a model; with `keep_alive: 0`, unload it, once nobody uses it."""
    if body.keep_alive == 0:
        await served(http).unload(body.model)
        reason = "unload"
    else:
        await served(http).service(body.model, body.keep_alive)
        reason = "load"
    head = {"model": body.model, "created_at": _time(time.time())}
    return json_response({**head, **body.content(""), "done": True, "done_reason": reason}, warning_header(body, http))


def _request(body: Prompted, service: Service, http: HttpRequest) -> Request:
    """What is asked of the engine, without a prompt. What changes no answer and is ignored becomes a warning."""
    o = body.options or Options()
    if body.think:
        warn(http, "think: there is no thinking apart from the answer")
    if o.num_ctx is not None and o.num_ctx > service.model.engine.context:
        warn(http, f"options.num_ctx: the context has {service.model.engine.context} tokens")
    if body.top_logprobs and not body.logprobs:
        warn(http, "top_logprobs: without logprobs there are none")
    sampling, processors = drawn(o, service, "options.")
    return Request(
        (),
        o.num_predict if o.num_predict is not None and o.num_predict > 0 else None,
        sampling,
        stops(http, o.stop, "options.stop: empty texts are ignored"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        processors=processors,
        lookup=served(http).settings.lookup,
    )


def _refuse_beside(body: Generate) -> None:
    """Raises Refusal for fields that mean nothing beside a raw prompt or a suffix."""
    alone = "raw" if body.raw else "suffix" if body.suffix else None
    for name in ("suffix", "system", "context"):
        if alone not in (None, name) and getattr(body, name):
            raise Refusal(400, f"{name}: means nothing beside {alone}; leave it out", param=name, code="invalid_value")


def _written(service: Service, body: Generate) -> list[int]:
    """Token ids of a raw prompt, or of one with a suffix. Raises Refusal, ContextError."""
    if body.suffix:
        tokens = infill_tokens(service, body.prompt, body.suffix)
        if tokens is None:
            raise unsupported("suffix", "this model has no tokens for filling in")
        return tokens
    return prompt_tokens(service, body.prompt)


async def _answer(answer: _Answer, requests: list[Request], http: HttpRequest) -> Response:
    stream = await common.submit(http, answer.service, requests)
    headers = warning_header(answer.body, http)
    if answer.body.stream is not False:
        return StreamingResponse(answer.lines(stream), stream.close, headers=headers, media_type="application/x-ndjson")
    async with CancelOnDisconnect(http, stream.close):
        return json_response(await answer.whole(stream), headers)


@dataclass(slots=True)
class _Answer:
    """One answer in wire form. Times are `time.perf_counter`'s."""

    body: Prompted
    service: Service
    reader: CallReader
    begun: float  # when the request came
    loaded: float  # when its model was loaded
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)

    async def lines(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as lines of JSON, the last of which has the figures."""
        try:
            async for text, logprobs in self._parts(stream):
                yield dump(self._row(self.body.content(text), logprobs)) + b"\n"
        except Refusal as failure:
            yield dump({"error": failure.message}) + b"\n"
            return
        if calls := self._calls():
            yield dump(self._row(self.body.content("", calls))) + b"\n"
        yield dump(self._row(self.body.content("")) | self._end(stream)) + b"\n"

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The answer as one object. Raises Refusal when it failed."""
        async for _ in self._parts(stream):
            pass
        text = self.reader.message()["content"] or ""
        return self._row(self.body.content(text, self._calls()), self.logprobs) | self._end(stream)

    async def _parts(self, stream: Stream) -> AsyncIterator[tuple[str, list[Logprob]]]:
        """Texts, and the log-probabilities of the tokens that came with each."""
        async for batch in stream.batches():
            text, logprobs = "", []
            for _, event in batch:
                common.check(event)
                text += "".join(piece.text for piece in self.reader.push(event) if isinstance(piece, Text))
                if event.token is not None:
                    self.tokens.append(event.token)
                if event.logprob is not None:
                    logprobs.append(event.logprob)
            self.logprobs += logprobs
            if text or logprobs:
                yield text, logprobs

    def _row(self, content: dict[str, Any], logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
        row = {"model": self.body.model, "created_at": _time(time.time()), **content, "done": False}
        if logprobs:
            row["logprobs"] = chat_logprobs(logprobs, self.service.texts)["content"]
        return row

    def _calls(self) -> list[dict[str, Any]]:
        """The calls of an answer that has ended, their arguments as objects."""
        calls: list[dict[str, Any]] = []
        for call in self.reader.message().get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            try:
                function = {"index": len(calls), "name": name, "arguments": json.loads(arguments)}
            except ValueError:  # a limit ended the answer in it, and then it is none
                log.warning("a call was cut short", extra={"facts": {"function": name}})
            else:
                calls.append({"id": call["id"], "function": function})
        return calls

    def _end(self, stream: Stream) -> dict[str, Any]:
        """What the last line says of the whole answer."""
        ended = stream.ended or stream.arrived
        first = stream.first or ended
        started = stream.started or first
        context = {}
        if isinstance(self.body, Generate) and not self.body.raw:
            context = {"context": [*stream.requests[0].prompt, *self.tokens]}
        return {
            "done": True,
            "done_reason": stream.finishes[0],
            **context,
            "total_duration": _nanoseconds(ended - self.begun),
            "load_duration": _nanoseconds(self.loaded - self.begun),
            "prompt_eval_count": stream.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - started),
            "eval_count": stream.completion_tokens,
            "eval_duration": _nanoseconds(ended - first),
        }


def _plain(index: int, turn: Turn) -> dict[str, Any]:
    message = to_message(f"messages.{index}", turn)
    return message if turn.tool_name is None else {**message, "name": turn.tool_name}


def _nanoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


def _named(entry: Entry) -> dict[str, Any]:
    """A model's name, which has a tag in Ollama's lists."""
    name = entry.name if ":" in entry.name else f"{entry.name}:latest"
    return {"name": name, "model": name}


def _card(entry: Entry) -> dict[str, Any]:
    """A row of the list of models. Opens the model's files."""
    checkpoint = entry.source.open()
    if checkpoint is None:
        empty = dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), "")
        facts = {"size": 0, "digest": "", "details": {**empty, "families": ["llama"]}}
        return {**_named(entry), "modified_at": _time(entry.created), **facts}
    with checkpoint:
        return {**_named(entry), "modified_at": _modified(checkpoint), "size": _size(checkpoint), **_facts(checkpoint)}


def _size(checkpoint: Checkpoint) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def _modified(checkpoint: Checkpoint) -> str:
    return _time(checkpoint.path.stat().st_mtime)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What lists say of a model. The digest names the state of its files, whose content it does not read."""
    what = [str(checkpoint.path.resolve()), str(checkpoint.path.stat().st_mtime_ns)]
    what += [adapter.digest() for adapter in checkpoint.adapters]
    matrices = Counter(tensor.format for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1)
    count = checkpoint.config.parameters()
    details = {
        "parent_model": "",
        "format": checkpoint.format,
        "family": "llama",
        "families": ["llama"],
        "parameter_size": f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.1f}B",
        "quantization_level": matrices.most_common(1)[0][0],
    }
    return {"digest": hashlib.sha256(" ".join(what).encode()).hexdigest(), "details": details}


def _shown(entry: Entry, checkpoint: Checkpoint, context: int, generic: bool, verbose: bool) -> dict[str, Any]:
    """All that `show` says. Reads the vocabulary; lists of its tokens are empty unless it is to be verbose."""
    c, t = checkpoint.config, checkpoint.tokenizer
    parts = t.vocabulary() if verbose else None
    template = checkpoint.template or ""
    tools = any(map(knows_tools, checkpoint.templates.values()))
    if generic and not tools:  # clients look for the word
        template += "{# tools are written as text into the system message #}"
    info = {
        "general.architecture": "llama",
        "general.parameter_count": c.parameters(),
        "llama.context_length": context,
        "llama.embedding_length": c.dim,
        "llama.block_count": c.n_layers,
        "llama.feed_forward_length": c.hidden_dim,
        "llama.attention.head_count": c.n_heads,
        "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": c.rope_theta,
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "llama" if t.kind == "sentencepiece" else "gpt2",
        "tokenizer.ggml.pre": t.pre or "default",
        "tokenizer.ggml.add_bos_token": t.add_bos,
        "tokenizer.ggml.bos_token_id": t.bos_id,
        "tokenizer.ggml.eos_token_id": t.eos_id,
        "tokenizer.ggml.tokens": parts.pieces if parts else [],
        "tokenizer.ggml.token_type": parts.types if parts else [],
        "tokenizer.ggml.merges": (parts.merges or []) if parts else [],
    }
    tensors = [
        {"name": tensor.name, "type": tensor.format, "shape": tensor.shape}
        for tensor in (checkpoint.tensors.values() if verbose else ())
    ]
    fills = infill_marks(t) is not None
    names = {id: text for text, id in t.control.items()}
    stops = [json.dumps(names[id], ensure_ascii=False) for id in sorted(t.stop_ids) if id in names]
    modelfile = [f"FROM {entry.name}", f'TEMPLATE """{template}"""', *(f"PARAMETER stop {stop}" for stop in stops)]
    return {
        "license": checkpoint.licence or "",
        "modelfile": "\n".join(modelfile) + "\n",
        "parameters": "\n".join(f"{'stop':<30} {stop}" for stop in stops),
        "template": template,
        **{"details": _facts(checkpoint)["details"]},
        "model_info": {name: value for name, value in info.items() if value is not None},
        **({"tensors": tensors} if verbose else {}),
        "capabilities": ["completion", *(["tools"] if tools or generic else []), *(["insert"] if fills else [])],
        "modified_at": _modified(checkpoint),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
