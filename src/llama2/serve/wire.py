"""What comes over the wire: JSON read strictly, and the request types of OpenAI's surface.

A field that is known but not supported is refused by name. One that nobody knows is accepted, and told in a warning
header and a log line.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import ClientDisconnect

from llama2.serve.errors import Refusal, unsupported

if TYPE_CHECKING:
    from llama2.serve.constrain import Constraint

#: Fields, and which values of each mean that nothing is asked.
Values = Mapping[str, tuple[Any, ...]]


class Wire(BaseModel):
    """A JSON object of a request. Types are taken strictly: "3" and true are no numbers."""

    model_config = ConfigDict(extra="allow", strict=True)

    #: Fields that are known and not supported, each with the values that mean "do not".
    UNSUPPORTED: ClassVar[Values] = {}

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Wire:
        for name, harmless in self.UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise unsupported(name)
        return self

    def unknown(self) -> Iterator[str]:
        """Names of fields that this server does not know, those of inner objects too."""
        yield from (name for name in self.model_extra or () if name not in self.UNSUPPORTED)
        for name, value in vars(self).items():
            items = value if isinstance(value, list) else [value]
            if items and isinstance(items[0], Wire):  # and so are the others
                for item in items:
                    yield from (f"{name}.{inner}" for inner in item.unknown())


Token = Annotated[int, Field(ge=0, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Wire):
    """What a stream tells besides the answer."""

    UNSUPPORTED: ClassVar[Values] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class Sampled(Wire):
    """What OpenAI's routes share: how tokens are drawn. `top_k`, `min_p`, `repetition_penalty` and `lookup` are extras.

    Omitted or null, a field has the default of OpenAI's specification.
    """

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    lookup: int | None = Field(None, ge=0, le=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class Part(Wire):
    """A piece of a message's content. Only text is supported; nothing that an address names is ever fetched."""

    type: str
    text: str | None = None


class Message(Wire):
    """One message of a chat."""

    UNSUPPORTED: ClassVar[Values] = {"audio": (), "function_call": (), "refusal": ("",)}

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class JsonSchema(Wire):
    """What an answer must be."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = None  # the schema is followed in any case


class ResponseFormat(Wire):
    """Free text, any JSON object, or what a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to it. Raises Refusal, RequestError."""
        from llama2.serve import constrain

        if self.type == "json_object":
            return constrain.json_object("response_format")
        if self.type == "text":
            return None
        if self.json_schema is None:
            field = "response_format.json_schema"
            raise Refusal(400, f"{field}: is missing", param=field, code="invalid_value")
        return constrain.json_schema(self.json_schema.schema_, "response_format.json_schema.schema")


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    UNSUPPORTED: ClassVar[Values] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=1 << 62)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 62)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None  # without tools it means nothing
    metadata: dict[str, str] | None = None  # kept by nobody, as nothing is stored
    prompt_cache_key: str | None = None  # the cache finds equal prompts by itself
    safety_identifier: str | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    UNSUPPORTED: ClassVar[Values] = {"suffix": ("",)}

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(max_length=1 << 22)
    max_tokens: int | None = Field(None, ge=0, lt=1 << 62)
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None  # an extra
    echo: bool | None = None


class StrictRoute(APIRoute):
    """A route whose endpoint takes `http`, after a JSON body read by `parse` if there is one.

    The body goes to its model at once: solving dependencies, of which there are no others, is a tenth of a request.
    """

    def get_route_handler(self) -> Callable[[HttpRequest], Any]:
        model = get_type_hints(self.endpoint).get("body")
        if model is None:
            return super().get_route_handler()

        async def handler(request: HttpRequest) -> Response:
            try:
                value = parse(await request.body())
            except ClientDisconnect:
                raise Refusal(400, "body: the client left before its end") from None
            try:
                body = model.model_validate(value)
            except ValidationError as error:
                errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
                raise RequestValidationError(errors, body=value) from None
            response: Response = await self.endpoint(body, request)
            return response

        return handler


def parse(body: bytes) -> Any:
    """The value that a JSON text stands for. Raises Refusal 400 for what is no JSON, or would be read in two ways."""
    try:
        return json.loads(body, parse_constant=_no_constant, object_pairs_hook=_object, parse_float=_finite)
    except RecursionError:
        reason = "nested too deeply"
    except (ValueError, UnicodeDecodeError) as error:
        reason = str(error)
    raise Refusal(400, f"body: not JSON that can be read: {reason}", code="invalid_json")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1])[0]
        raise ValueError(f"{twice[:100]!r} stands twice in one object")
    return value


def refusal(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a request, as one line that names the field."""
    first = error.errors()[0]
    where, value = [], error.body
    for step in first["loc"][1:] if first["loc"][0] == "body" else first["loc"]:
        if isinstance(value, dict) and (step in value or first["type"] == "missing"):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            break  # what follows names one of several types, not a place
        where.append(str(step))
    field = ".".join(where)
    message = " ".join(str(first["msg"]).split())
    return Refusal(400, f"{field or 'body'}: {message}", param=field or None, code="invalid_value")
