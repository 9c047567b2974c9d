"""Ollama's routes: chat and generate as lines of JSON, and the lists of models.

Durations are in nanoseconds. The operator chooses the models: clients load and unload them, but cannot create, fetch
or remove them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

from llama2.checkpoint import Checkpoint
from llama2.engine.request import Logprob, Request
from llama2.engine.runner import BLOCK
from llama2.serve.constrain.tools import CallReader, Text, Toolset
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.models import Entry
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.choices import check
from llama2.serve.surfaces.context import models_of, warn, warning_header
from llama2.serve.surfaces.encoding import dump, json_response
from llama2.serve.surfaces.generation import Tools, build_requests, constraints_of, expand_choices, submit
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.keep_alive import FOREVER, KeepAlive
from llama2.serve.surfaces.llamacpp_sampling import LlamaCppSampling, sampling_and_processors
from llama2.serve.surfaces.messages import to_message
from llama2.serve.surfaces.prompts import infill_markers, infill_tokens, prompt_tokens
from llama2.serve.surfaces.sampling import stop_strings
from llama2.serve.surfaces.streaming import CancelOnDisconnect, StreamingResponse
from llama2.serve.surfaces.wire import ChatMessage, Token, Values, Wire
from llama2.serve.token_text import chat_logprobs
from llama2.text.template import knows_tools
from llama2.version import package_version

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

log = logging.getLogger("llama2.serve")

router = APIRouter(route_class=JsonRoute)


class OllamaOptions(LlamaCppSampling):
    """How tokens are sampled, and how many. Options of the engine, and unknown ones, are ignored."""

    UNSUPPORTED: ClassVar[Values] = {
        "mirostat": (0,),
        "tfs_z": (1, 1.0),
        "vocab_only": (False,),
        "embedding_only": (False,),
    }

    num_ctx: int | None = Field(None, ge=0, lt=1 << 62)
    num_predict: int | None = Field(None, ge=-2, lt=1 << 62)
    stop: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=64)] | str | None = None


class OllamaGeneration(Wire):
    """The fields of Ollama's two routes that generate."""

    model: str
    stream: bool | None = None
    options: OllamaOptions | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None  # a JSON schema
    keep_alive: KeepAlive = None
    think: bool | str | None = None
    watermark: bool | None = None  # an extra
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def constraint(self) -> Constraint | None:
        """The constraint of the answer, if a format is requested. Raises RequestError."""
        from llama2.serve.constrain import constraints

        if not self.format and self.format != {}:
            return None
        return (
            constraints.json_object("format")
            if self.format == "json"
            else constraints.json_schema(self.format, "format", strict=False)
        )

    def content(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """A part of an answer in the form of the route."""
        raise NotImplementedError


class OllamaMessage(ChatMessage):
    """One message of a chat; `tool_name` is the function of a tool's message."""

    UNSUPPORTED: ClassVar[Values] = {"images": ([],)}

    tool_name: str | None = None


class OllamaChatRequest(OllamaGeneration):
    """`POST /api/chat`."""

    messages: list[OllamaMessage] = Field([])
    tools: list[dict[str, Any]] | None = None

    def content(self, text: str, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """A message, with the calls of functions."""
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}


class OllamaGenerateRequest(OllamaGeneration):
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


class OllamaModelRequest(Wire):
    """A request about one model; `name` is its older field."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None  # no connection is made

    def entry(self, http: HttpRequest) -> Entry:
        """The named model. Raises Refusal 400 or 404."""
        name = self.model or self.name
        if not name:
            raise Refusal(400, "model: is missing", param="model", code="invalid_value")
        return models_of(http).entry(name)


@router.post("/api/chat")
async def chat(body: OllamaChatRequest, http: HttpRequest) -> Response:
    """The assistant's answer to a list of messages. Without messages, the model is loaded, or unloaded."""
    begun = time.perf_counter()
    if not body.messages:
        return await _load(body, http)
    service = await models_of(http).service(body.model, body.keep_alive)
    loaded = time.perf_counter()
    messages = [_dialog_message(i, message) for i, message in enumerate(body.messages)]
    tools = body.tools and [{"type": "function", **tool} for tool in body.tools]
    request = _request(body, service, http)
    requests, (reader,) = await build_requests(
        http, service, messages, request, tools=Tools(tools), response=body.constraint
    )
    return await _respond(_OllamaWriter(body, service, reader, begun, loaded), requests, http, messages)


@router.post("/api/generate")
async def generate(body: OllamaGenerateRequest, http: HttpRequest) -> Response:
    """The answer to a prompt, in the chat format unless it is raw. Without a prompt, the model is loaded, or unloaded.

    A raw prompt is the output of a template, so control tokens in it are recognised. With a `suffix`, the answer is the
    text before it. `context` has the tokens of an earlier answer; the new prompt follows them.
    """
    begun = time.perf_counter()
    if not body.prompt:
        return await _load(body, http)
    _check_fields(body)
    service = await models_of(http).service(body.model, body.keep_alive)
    loaded = time.perf_counter()
    request = _request(body, service, http)
    tokenizer = service.model.tokenizer
    messages: list[dict[str, Any]] | None = None
    if body.raw or body.suffix:
        tokens = await asyncio.to_thread(_raw_prompt, service, body)
        request = replace(request, prompt=tuple(tokens), raw_completion=True)
        constraints = constraints_of(http, body.constraint)
        requests = await asyncio.to_thread(expand_choices, service, request, 1, constraints)
        reader = Toolset(None, None, None, None, tokenizer).reader()
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        requests, (reader,) = await build_requests(http, service, messages, request, response=body.constraint)
    if body.context:
        # Llama 2's own format, which is not a template, begins every turn with BOS; others begin only a text with it.
        begins = service.model.checkpoint.template is not None and requests[0].prompt[:1] == (tokenizer.bos_id,)
        requests = [replace(r, prompt=(*body.context, *r.prompt[int(begins) :])) for r in requests]
        messages = None  # they are not all that the client gave
    return await _respond(_OllamaWriter(body, service, reader, begun, loaded), requests, http, messages)


@router.get("/api/tags")
async def tags(http: HttpRequest) -> Response:
    """The models that are served. Those that are not downloaded yet have no details."""
    entries = models_of(http).entries.values()
    return json_response({"models": await asyncio.to_thread(lambda: list(map(_card, entries)))})


@router.get("/api/ps")
async def ps(http: HttpRequest) -> Response:
    """The models that are loaded, the last to expire first. `size` is that of weights and cache in memory."""
    rows = []
    for entry in models_of(http).entries.values():
        if entry.service is None:
            continue
        model = entry.service.model
        cache = model.config.cache_bytes(model.engine.stats.blocks * BLOCK)
        left = min(entry.keep_alive, FOREVER) - entry.idle
        rows.append(
            {
                **_tagged_name(entry),
                **_details(model.checkpoint),
                "size": _size(model.checkpoint) + cache,
                "size_vram": 0,
                "context_length": model.engine.context,
                "expires_at": _time(time.time() + left),
            }
        )
    return json_response({"models": sorted(rows, key=lambda row: str(row["expires_at"]), reverse=True)})


@router.post("/api/show")
async def show(body: OllamaModelRequest, http: HttpRequest) -> Response:
    """The properties of a model. It is loaded if it is not downloaded yet."""
    entry = body.entry(http)
    checkpoint = await asyncio.to_thread(entry.source.open)
    if checkpoint is None:
        checkpoint = (await models_of(http).service(entry.name)).model.checkpoint
    context = entry.service.model.engine.context if entry.service else checkpoint.config.context_length
    generic = models_of(http).settings.tools == "generic"
    properties = await asyncio.to_thread(_show, entry, checkpoint, context, generic, bool(body.verbose))
    return json_response(properties, warning_header(body, http))


@router.post("/api/pull")
async def pull(body: OllamaModelRequest, http: HttpRequest) -> Response:
    """Succeeds for a model that is served. Others are refused: clients cannot download models."""
    try:
        body.entry(http)
    except Refusal as refusal:
        if refusal.status_code == 404:
            refusal.message += "; clients cannot download models, `llama2 serve -m NAME` serves one"
        raise
    if body.stream is False:
        return json_response({"status": "success"}, warning_header(body, http))
    lines = dump({"status": "pulling manifest"}) + b"\n" + dump({"status": "success"}) + b"\n"
    return Response(lines, headers=warning_header(body, http), media_type="application/x-ndjson")


@router.get("/api/blobs/{digest}")
async def blob(http: HttpRequest) -> Response:
    """Always 404: no file can be uploaded."""
    raise Refusal(404, "blob not found", code="not_found")


@router.post("/api/create")
@router.post("/api/copy")
@router.delete("/api/delete")
@router.post("/api/push")
@router.post("/api/blobs/{digest}")
async def unchangeable(http: HttpRequest) -> Response:
    """Refused: clients cannot create, copy, remove or upload models."""
    action = http.url.path.split("/")[2]
    raise Refusal(
        403,
        f"/api/{action}: models cannot be changed over HTTP; use `llama2 pull`, `convert`, `quantize` or `rm` on the "
        "server's machine",
        code="not_allowed",
        type="permission_error",
    )


@router.get("/api/version")
async def version() -> Response:
    """The program's version."""
    return json_response({"version": package_version()})


async def _load(body: OllamaGeneration, http: HttpRequest) -> Response:
    """Load a model; with `keep_alive: 0`, unload it once it is not in use."""
    if body.keep_alive == 0:
        await models_of(http).unload(body.model)
        reason = "unload"
    else:
        await models_of(http).service(body.model, body.keep_alive)
        reason = "load"
    head = {"model": body.model, "created_at": _time(time.time())}
    return json_response({**head, **body.content(""), "done": True, "done_reason": reason}, warning_header(body, http))


def _request(body: OllamaGeneration, service: Service, http: HttpRequest) -> Request:
    """The engine's request without a prompt. Fields without effect become warnings."""
    o = body.options or OllamaOptions()
    if body.think:
        warn(http, "think: this model does not think before it answers")
    if o.num_ctx is not None and o.num_ctx > service.model.engine.context:
        warn(http, f"options.num_ctx: the context has {service.model.engine.context} tokens")
    if body.top_logprobs and not body.logprobs:
        warn(http, "top_logprobs: without logprobs there are none")
    sampling, processors = sampling_and_processors(o, service, "options.")
    return Request(
        (),
        o.num_predict if o.num_predict is not None and o.num_predict > 0 else None,
        sampling,
        stop_strings(http, o.stop, "options.stop: empty texts are ignored"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        processors=processors,
        lookup=models_of(http).settings.lookup,
    )


def _check_fields(body: OllamaGenerateRequest) -> None:
    """Raises Refusal for fields that have no meaning with a raw prompt or a suffix."""
    alone = "raw" if body.raw else "suffix" if body.suffix else None
    for name in ("suffix", "system", "context"):
        if alone not in (None, name) and getattr(body, name):
            raise Refusal(400, f"{name}: has no meaning with {alone}; leave it out", param=name, code="invalid_value")


def _raw_prompt(service: Service, body: OllamaGenerateRequest) -> list[int]:
    """Token ids of a raw prompt, or of one with a suffix. Raises Refusal, ContextError."""
    if body.suffix:
        tokens = infill_tokens(service, body.prompt, body.suffix)
        if tokens is None:
            raise unsupported("suffix", "this model has no tokens for filling in")
        return tokens
    return prompt_tokens(service, body.prompt)


async def _respond(
    writer: _OllamaWriter, requests: list[Request], http: HttpRequest, dialog: list[dict[str, Any]] | None
) -> Response:
    stream = await submit(http, writer.service, requests, dialog=dialog, watermark=writer.body.watermark)
    if writer.body.stream is not False:
        headers = warning_header(writer.body, http)
        return StreamingResponse(writer.lines(stream), stream.close, headers=headers, media_type="application/x-ndjson")
    async with CancelOnDisconnect(http, stream.close):
        whole = await writer.whole(stream)
    return json_response(whole, warning_header(writer.body, http))


@dataclass(slots=True)
class _OllamaWriter:
    """Writes one answer, whole or as lines. Times are `time.perf_counter`'s."""

    body: OllamaGeneration
    service: Service
    reader: CallReader
    begun: float  # when the request came
    loaded: float  # when its model was loaded
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)

    async def lines(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as lines of JSON, the last of which has counts and durations."""
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
        """The answer as one object. Raises Refusal if it failed."""
        async for _ in self._parts(stream):
            pass
        text = self.reader.message()["content"] or ""
        return self._row(self.body.content(text, self._calls()), self.logprobs) | self._end(stream)

    async def _parts(self, stream: Stream) -> AsyncIterator[tuple[str, list[Logprob]]]:
        """Texts, and the log-probabilities of the tokens that came with each."""
        async for batch in stream.batches():
            text, logprobs = "", []
            for _, event in batch:
                check(event)
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
            except ValueError:  # a limit ended the answer within it
                log.warning("a call was cut short and left out", extra={"facts": {"function": name}})
            else:
                calls.append({"id": call["id"], "function": function})
        return calls

    def _end(self, stream: Stream) -> dict[str, Any]:
        """The fields of the last line."""
        ended = stream.ended or stream.arrived
        first = stream.first or ended
        started = stream.started or first
        context = {}
        if isinstance(self.body, OllamaGenerateRequest) and not self.body.raw:
            context = {"context": [*stream.requests[0].prompt, *self.tokens]}
        return {
            "done": True,
            "done_reason": stream.ends[0],
            **context,
            "total_duration": _nanoseconds(ended - self.begun),
            "load_duration": _nanoseconds(self.loaded - self.begun),
            "prompt_eval_count": stream.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - started),
            "eval_count": stream.completion_tokens,
            "eval_duration": _nanoseconds(ended - first),
        }


def _dialog_message(index: int, given: OllamaMessage) -> dict[str, Any]:
    message = to_message(f"messages.{index}", given)
    return message if given.tool_name is None else {**message, "name": given.tool_name}


def _nanoseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


def _tagged_name(entry: Entry) -> dict[str, Any]:
    """A model's name with a tag, as Ollama's lists have it."""
    name = entry.name if ":" in entry.name else f"{entry.name}:latest"
    return {"name": name, "model": name}


def _card(entry: Entry) -> dict[str, Any]:
    """A row of the list of models. Opens the model's files."""
    checkpoint = entry.source.open()
    if checkpoint is None:
        empty = dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), "")
        unknown = {"size": 0, "digest": "", "details": {**empty, "families": ["llama"]}}
        return {**_tagged_name(entry), "modified_at": _time(entry.created), **unknown}
    with checkpoint:
        return {
            **_tagged_name(entry),
            "modified_at": _modified(checkpoint),
            "size": _size(checkpoint),
            **_details(checkpoint),
        }


def _size(checkpoint: Checkpoint) -> int:
    """Bytes of a model's weights."""
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def _modified(checkpoint: Checkpoint) -> str:
    return _time(checkpoint.path.stat().st_mtime)


def _details(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model in the lists. The digest is of its files' names and times, not of their content."""
    identity = [str(checkpoint.path.resolve()), str(checkpoint.path.stat().st_mtime_ns)]
    identity += [adapter.digest() for adapter in checkpoint.adapters]
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
    return {"digest": hashlib.sha256(" ".join(identity).encode()).hexdigest(), "details": details}


def _show(entry: Entry, checkpoint: Checkpoint, context: int, generic: bool, verbose: bool) -> dict[str, Any]:
    """The answer of `show`. Lists of tokens are empty unless `verbose`."""
    c, t = checkpoint.config, checkpoint.tokenizer
    parts = t.vocabulary() if verbose else None
    template = checkpoint.template or ""
    tools = any(map(knows_tools, checkpoint.templates.values()))
    if generic and not tools:  # clients look for the word "tools"
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
    fills = infill_markers(t) is not None
    names = {id: text for text, id in t.control.items()}
    stops = [json.dumps(names[id], ensure_ascii=False) for id in sorted(t.stop_ids) if id in names]
    modelfile = [f"FROM {entry.name}", f'TEMPLATE """{template}"""', *(f"PARAMETER stop {stop}" for stop in stops)]
    return {
        "license": checkpoint.licence or "",
        "modelfile": "\n".join(modelfile) + "\n",
        "parameters": "\n".join(f"{'stop':<30} {stop}" for stop in stops),
        "template": template,
        **{"details": _details(checkpoint)["details"]},
        "model_info": {name: value for name, value in info.items() if value is not None},
        **({"tensors": tensors} if verbose else {}),
        "capabilities": ["completion", *(["tools"] if tools or generic else []), *(["insert"] if fills else [])],
        "modified_at": _modified(checkpoint),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
