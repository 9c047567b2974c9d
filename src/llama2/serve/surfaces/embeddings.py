"""Embeddings, by OpenAI's route and by Ollama's two.

Inputs run in pieces, each submitted when the one before it has ended. So a long list delays other answers by at most a
piece. All inputs are checked before the first one runs.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from numpy.typing import NDArray
from pydantic import Field

from llama2.engine.embedding import normalised, pieces
from llama2.engine.request import Pooling, Request
from llama2.errors import ContextError, Llama2Error
from llama2.serve.errors import Refusal, to_refusal
from llama2.serve.service import Service, Stream
from llama2.serve.surfaces.choices import check
from llama2.serve.surfaces.context import models_of, warning_header
from llama2.serve.surfaces.encoding import dump, quote
from llama2.serve.surfaces.generation import submit
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.keep_alive import KeepAlive
from llama2.serve.surfaces.streaming import CancelOnDisconnect
from llama2.serve.surfaces.wire import MAX_PROMPTS, Tokens, Values, Wire

#: Tokens that the inputs of one request may have together.
MAX_TOTAL_TOKENS = 300_000

Floats = NDArray[np.float32]
Inputs = Sequence[str | Sequence[int]]

router = APIRouter(route_class=JsonRoute)


class EmbeddingsRequest(Wire):
    """`POST /v1/embeddings`. `pooling` is an extra."""

    UNSUPPORTED: ClassVar[Values] = {"truncate_prompt_tokens": (), "add_special_tokens": (True,)}

    model: str
    input: (
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    pooling: Pooling | None = None
    user: str | None = None


class OllamaEmbeddingRequest(Wire):
    """The fields of Ollama's two routes. Options are about sampling, so they have no effect here."""

    model: str
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive = None
    pooling: Pooling | None = None  # an extra


class OllamaEmbedRequest(OllamaEmbeddingRequest):
    """`POST /api/embed`. An input longer than the context is truncated only if `truncate` is true."""

    input: str | Annotated[list[str], Field(max_length=MAX_PROMPTS)] | None = None
    truncate: bool | None = None
    dimensions: int | None = Field(None, ge=1)


class OllamaOneEmbeddingRequest(OllamaEmbeddingRequest):
    """`POST /api/embeddings`, Ollama's older route, whose vectors are not normalised."""

    prompt: str = ""


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, http: HttpRequest) -> Response:
    """A vector of each text, or of each list of token ids. `dimensions` keeps the first ones, normalised again."""
    service = await models_of(http).service(body.model)
    given: Any = body.input
    inputs: Inputs = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not inputs:
        raise Refusal(400, "input: is empty", param="input", code="invalid_value")
    encode = _base64 if body.encoding_format == "base64" else _floats
    requests = await _requests(service, inputs, body.pooling)
    rows = await _rows(http, service, requests, _normaliser(service, body.dimensions), encode)
    data = b",".join(b'{"object":"embedding","index":%d,"embedding":%b}' % row for row in enumerate(rows))
    tokens = sum(len(request.prompt) for request in requests)
    rest = quote({"model": body.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return _response(b'{"object":"list","data":[%b],%b' % (data, rest[1:].encode()), body, http)


@router.post("/api/embed")
async def embed(body: OllamaEmbedRequest, http: HttpRequest) -> Response:
    """A vector of each text. Without a text, the model is loaded or unloaded."""
    begun = time.perf_counter()
    inputs = [body.input] if isinstance(body.input, str) else body.input or []
    service = await _load(body, http, bool(body.input))
    loaded = time.perf_counter()
    rows: Sequence[bytes] = ()
    requests: list[Request] = []
    if service is not None and body.input:
        requests = await _requests(service, inputs, body.pooling, truncate=body.truncate is True)
        rows = await _rows(http, service, requests, _normaliser(service, body.dimensions), _floats)
    rest = {
        "model": body.model,
        "total_duration": int((time.perf_counter() - begun) * 1e9),
        "load_duration": int((loaded - begun) * 1e9),
        "prompt_eval_count": sum(len(request.prompt) for request in requests),
    }
    return _response(b'{"embeddings":[%b],%b' % (b",".join(rows), dump(rest)[1:]), body, http)


@router.post("/api/embeddings")
async def one_embedding(body: OllamaOneEmbeddingRequest, http: HttpRequest) -> Response:
    """A vector of one text. Without a text, the model is loaded or unloaded."""
    service = await _load(body, http, bool(body.prompt))
    row = b"[]"
    if service is not None and body.prompt:
        requests = await _requests(service, [body.prompt], body.pooling)
        (row,) = await _rows(http, service, requests, lambda vector: vector, _floats)
    return _response(b'{"embedding":%b}' % row, body, http)


async def _load(body: OllamaEmbeddingRequest, http: HttpRequest, has_input: bool) -> Service | None:
    """The model's service; None if the request has no input and unloads the model by `keep_alive: 0`."""
    if not has_input and body.keep_alive == 0:
        await models_of(http).unload(body.model)
        return None
    return await models_of(http).service(body.model, body.keep_alive)


async def _requests(
    service: Service, inputs: Inputs, pooling: Pooling | None, *, truncate: bool = False
) -> list[Request]:
    """The engine's requests. Raises Refusal for inputs that are empty, too long or too many."""

    def build() -> list[Request]:
        for i, text in enumerate(inputs):
            if isinstance(text, str) and not truncate:
                try:
                    service.limit.check(text)
                except ContextError as error:
                    raise ContextError(f"input {i}: {error}") from None
        return service.model.embedding_requests(inputs, pooling or "last", truncate=truncate)

    try:
        requests = await asyncio.to_thread(build)
    except Llama2Error as error:
        refusal = to_refusal(error)
        refusal.param = "input"
        raise refusal from None
    tokens = sum(len(request.prompt) for request in requests)
    if tokens > MAX_TOTAL_TOKENS:
        raise Refusal(
            400,
            f"input: {tokens} tokens in total, and the limit of a request is {MAX_TOTAL_TOKENS}; split the list",
            param="input",
            code="invalid_value",
        )
    return requests


async def _rows(
    http: HttpRequest,
    service: Service,
    requests: Sequence[Request],
    finish: Callable[[Floats], Floats],
    encode: Callable[[Floats], bytes],
) -> list[bytes]:
    """The encoded vector of each request. No piece starts after the client has disconnected."""
    rows: list[bytes] = []
    async with CancelOnDisconnect(http) as client:
        for piece in pieces(requests):
            if client.disconnected:
                raise Refusal(400, "the client disconnected before the last embedding")
            stream = await submit(http, service, piece, refuse=not rows)
            client.close = stream.close
            vectors = await _vectors(stream)
            rows += await asyncio.to_thread(lambda: [encode(finish(vector)) for vector in vectors])  # noqa: B023  # awaited
    return rows


async def _vectors(stream: Stream) -> list[Floats]:
    """The embedding of each request of a piece. Raises Refusal if one failed."""
    found: dict[int, Floats] = {}
    async for batch in stream.batches():
        for index, event in batch:
            check(event)
            if event.embedding is not None:
                found[index] = event.embedding
    return [found[index] for index in range(len(stream.requests))]


def _normaliser(service: Service, dimensions: int | None) -> Callable[[Floats], Floats]:
    """A function that normalises the first `dimensions` of a vector; None: all. Raises Refusal for too many."""
    width = service.model.config.dim
    if dimensions is not None and dimensions > width:
        raise Refusal(
            400,
            f"dimensions: {dimensions} is more than the {width} that this model's embeddings have",
            param="dimensions",
            code="invalid_value",
        )
    return lambda vector: normalised(vector[:dimensions])


def _base64(vector: Floats) -> bytes:
    """Little-endian float32 in base64, as a JSON string."""
    return b'"%b"' % b64encode(vector.astype("<f4").tobytes())


def _floats(vector: Floats) -> bytes:
    """A JSON array. Nine digits determine a float32."""
    return ("[" + ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist()) + "]").encode()


def _response(content: bytes, body: Wire, http: HttpRequest) -> Response:
    return Response(content, headers=warning_header(body, http), media_type="application/json")
