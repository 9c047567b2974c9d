"""What comes over the wire: JSON read strictly, and the request types of OpenAI's surface.

What would change the answer and is not supported is refused by name. What has no effect is taken, and named in a
warning header and a log line.
"""

from __future__ import annotations

import asyncio
import json
import json.scanner
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema
from starlette.requests import ClientDisconnect

from llama2.serve.errors import Refusal, unsupported

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint

#: Fields, and which values of each mean that nothing is asked.
Values = Mapping[str, tuple[Any, ...]]

#: Entries of a list or an object of a request, where its field does not say it.
MAX_ITEMS, MAX_ENTRIES = 16_384, 1024
#: Prompts of a request, and tokens of a prompt.
MAX_PROMPTS, MAX_TOKENS = 2048, 1 << 22


#: Parts of a schema that hold no others, and those that hold them by names of ours.
_OPAQUE = frozenset({"cls", "config", "default", "function", "metadata", "serialization"})
_NAMED = frozenset({"fields", "choices"})


def _bounded(schema: Any, *, named: bool = False) -> Any:
    """A schema of pydantic's whose lists and objects have bounds; `named`: its keys are names of ours."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if named:
        return {name: _bounded(value) for name, value in schema.items()}
    schema = {
        name: value if name in _OPAQUE else _bounded(value, named=name in _NAMED) for name, value in schema.items()
    }
    if schema.get("type") == "list":
        return {"max_length": MAX_ITEMS, **schema, "fail_fast": True}
    if schema.get("type") == "dict":
        return core_schema.no_info_before_validator_function(_few, schema)
    return schema


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", f"has {len(value)} entries, and the limit is {MAX_ENTRIES}")
    return value


class Wire(BaseModel):
    """A JSON object of a request. Types are taken strictly: "3" and true are no numbers."""

    model_config = ConfigDict(extra="allow", strict=True)

    #: Fields that are known and not supported, each with the values that mean "do not".
    UNSUPPORTED: ClassVar[Values] = {}
    #: Fields that change no answer and have no effect here, each with the values that need no warning.
    HARMLESS: ClassVar[Values] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Every list and object of a request has a bound, and a list is refused at its first error."""
        bounded: core_schema.CoreSchema = _bounded(handler(source))
        return core_schema.no_info_before_validator_function(_few, bounded)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Wire:
        for name, harmless in self.UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise unsupported(name)
        return self

    def ignored(self) -> Iterator[str]:
        """Names of fields that have no effect here, those of inner objects too."""
        for name, value in (self.model_extra or {}).items():
            if name not in self.UNSUPPORTED and value is not None and value not in self.HARMLESS.get(name, ()):
                yield name
        for name, value in vars(self).items():
            items = value if isinstance(value, list) else [value]
            if items and isinstance(items[0], Wire):  # and so are the others
                for item in items:
                    yield from (f"{name}.{inner}" for inner in item.ignored())


Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(max_length=MAX_TOKENS)]
StopText = Annotated[str, Field(max_length=1000)]
#: Texts that end an answer: one, or a list; empty ones end nothing.
Stops = Annotated[
    Annotated[list[StopText], Field(max_length=16)] | None,
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


#: A limit in tokens; −1 is none.
Count = Annotated[
    Annotated[int, Field(ge=0, lt=1 << 62)] | None, BeforeValidator(lambda value: None if value == -1 else value)
]


class StreamOptions(Wire):
    """What a stream tells besides the answer."""

    UNSUPPORTED: ClassVar[Values] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class Sampled(Wire):
    """What OpenAI's routes share: how tokens are drawn. `top_k`, `min_p`, `repetition_penalty` and `lookup` are extras.

    Omitted or null, a field has the server's default (`Service.sampling`).
    """

    UNSUPPORTED: ClassVar[Values] = {
        **{"typical_p": (1, 1.0), "mirostat": (0,), "tfs_z": (1, 1.0), "xtc_probability": (0, 0.0)},
        **{"dry_multiplier": (0, 0.0), "dynatemp_range": (0, 0.0), "use_beam_search": (False,)},
        **{"length_penalty": (1, 1.0), "prompt_logprobs": (), "bad_words": ([],), "logits_processors": ([],)},
        **{"allowed_token_ids": ([],), "truncate_prompt_tokens": (), "echo": (False,)},
        **{"skip_special_tokens": (True,), "include_stop_str_in_output": (False,)},
    }

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[
        Annotated[int, Field(ge=0, le=1 << 30)] | None, BeforeValidator(lambda value: 0 if value == -1 else value)
    ] = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(None, ge=1, le=128)
    stop: Stops = None
    stop_token_ids: list[Token] | None = None
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    ignore_eos: bool | None = None
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
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class JsonSchema(Wire):
    """What an answer must be."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # whether a keyword that no grammar can follow is refused


class ResponseFormat(Wire):
    """Free text, any JSON object, or what a schema describes; with `schema`, llama.cpp's form, `json_object` too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to it. Raises Refusal, RequestError."""
        from llama2.serve.constrain import constraints

        if self.type == "text":
            return None
        if self.json_schema is not None and self.json_schema.schema_ is not None and self.type == "json_schema":
            field, strict = "response_format.json_schema.schema", self.json_schema.strict is True
            return constraints.json_schema(self.json_schema.schema_, field, strict=strict)
        if self.schema_ is not None:
            return constraints.json_schema(self.schema_, "response_format.schema", strict=False)
        if self.type == "json_schema" and self.json_schema is None:
            field = "response_format.json_schema"
            raise Refusal(400, f"{field}: is missing", param=field, code="invalid_value")
        return constraints.json_object("response_format")


class StructuredOutputs(Wire):
    """vLLM's constraints of an answer, of which one may be given."""

    UNSUPPORTED: ClassVar[Values] = {"structural_tag": (), "whitespace_pattern": ()}

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Constrained(Sampled):
    """What holds an answer to a form: OpenAI's field, llama.cpp's and vLLM's, of which one may be given."""

    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    n_predict: Count = None
    return_token_ids: bool | None = None

    @property
    def constraint(self) -> Constraint | None:
        """What holds an answer to the one form that is asked for. Raises Refusal, RequestError."""
        from llama2.serve.constrain import constraints

        more = self.structured_outputs or StructuredOutputs()
        forms: dict[str, tuple[Any, Callable[[Any, str], Constraint]]] = {
            "json_schema": (self.json_schema, _schema),
            "grammar": (self.grammar, constraints.grammar),
            "guided_json": (self.guided_json, _schema),
            "guided_regex": (self.guided_regex, constraints.regex),
            "guided_choice": (self.guided_choice, constraints.choice),
            "guided_grammar": (self.guided_grammar, constraints.grammar),
            "structured_outputs.json": (more.json_, _schema),
            "structured_outputs.regex": (more.regex, constraints.regex),
            "structured_outputs.choice": (more.choice, constraints.choice),
            "structured_outputs.grammar": (more.grammar, constraints.grammar),
            "structured_outputs.json_object": (
                more.json_object or None,
                lambda _, field: constraints.json_object(field),
            ),
        }
        given = {field: (value, make) for field, (value, make) in forms.items() if value not in (None, "")}
        asked = [*given, *(["response_format"] if self.response_format and self.response_format.type != "text" else [])]
        if len(asked) > 1:
            raise Refusal(400, f"{asked[0]}: an answer cannot follow {asked[1]} too; leave one out", param=asked[0])
        for field, (value, make) in given.items():
            return make(value, field)
        return self.response_format.constraint if self.response_format else None


def _schema(value: dict[str, Any] | str, field: str) -> Constraint:
    """The constraint of a JSON schema, which may be given as JSON text."""
    from llama2.serve.constrain import constraints

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refusal(400, f"{field}: is not JSON", param=field, code="invalid_value") from None
    return constraints.json_schema(value, field, strict=False)  # type: ignore[arg-type]  # which it checks


class ChatRequest(Constrained):
    """`POST /v1/chat/completions`."""

    UNSUPPORTED: ClassVar[Values] = {
        **Sampled.UNSUPPORTED,
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "web_search_options": (),
    }
    HARMLESS: ClassVar[Values] = {
        **{"prediction": (), "reasoning_effort": ("none",), "service_tier": ("auto", "default"), "store": (False,)},
        "verbosity": ("medium",),
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: Count = None
    max_completion_tokens: Count = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None  # without tools it means nothing
    metadata: dict[str, str] | None = None  # kept by nobody, as nothing is stored
    prompt_cache_key: str | None = None  # the cache finds equal prompts by itself
    safety_identifier: str | None = None


class CompletionRequest(Constrained):
    """`POST /v1/completions`."""

    UNSUPPORTED: ClassVar[Values] = {**Sampled.UNSUPPORTED, "suffix": ("",)}

    prompt: (
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS)]
    )
    max_tokens: Count = None
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None


class JsonRoute(APIRoute):
    """A route whose endpoint takes `http`, after a JSON body read by `read` if there is one.

    The body goes to its model at once: solving dependencies, of which there are no others, is a tenth of a request.
    A large one is read in a thread.
    """

    def get_route_handler(self) -> Callable[[HttpRequest], Any]:
        model = get_type_hints(self.endpoint).get("body")
        if model is None:
            return super().get_route_handler()

        async def handler(request: HttpRequest) -> Response:
            try:
                given = await request.body()
            except ClientDisconnect:
                raise Refusal(400, "body: the client left before its end") from None
            models, named = request.app.state.models, request.scope["state"].get("model")
            options = (model, models.settings.max_values, named, next(iter(models.entries)))
            if len(given) <= _SMALL:
                body = read(given, *options)
            else:
                async with request.app.state.parsers:
                    body = await asyncio.to_thread(read, given, *options)
            response: Response = await self.endpoint(body, request)
            return response

        return handler


W = TypeVar("W", bound=Wire)


def read(body: bytes, model: type[W], max_values: int, named: str | None = None, default: str = "") -> W:
    """A request, for the model that its address `named`, or for the `default` one where its body must name one.

    Raises Refusal.
    """
    value = parse(body, max_values)
    if isinstance(value, dict) and (field := model.model_fields.get("model")):
        if named is not None:
            value["model"] = named
        elif field.is_required() and value.get("model") is None:
            value["model"] = default
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise refusal(errors, value) from None


def parse(body: bytes, max_values: int = 1 << 62) -> Any:
    """The value that a JSON text stands for.

    Raises Refusal: 400 for what is no JSON, or would be read in two ways; 413 for more than `max_values` values.
    """
    counted = len(body) > _SMALL and sum(body.count(mark) for mark in _MARKS) > _QUICK
    decoder = _CountingDecoder(max_values) if counted else _Decoder()
    try:
        text = body.decode("utf-8-sig")
        if any(found["lone"] for found in _ESCAPES.finditer(text)):
            raise ValueError("half of a surrogate pair is no character")
        return decoder.decode(text)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise Refusal(400, f"body: not JSON that can be read: {reason}", code="invalid_json")


#: Bytes of a body that is read in the event loop.
_SMALL = 32 << 10

#: Bytes of which a text has one for each value but the first, or for each escape; and of how many such it is decoded in
#: one go, during which no other thread runs.
_MARKS, _QUICK = (b",", b"[", b"{", b":", b"\\"), 100_000

#: Escapes of JSON, in turn: of a surrogate pair, of half of one, of anything else.
_ESCAPES = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


#: The standard library's decoder as it is where it was not compiled.
_PYTHON: Any = json.decoder
_SCANNER: Any = json.scanner


class _Decoder(json.JSONDecoder):
    """Reads JSON strictly: no constants that JSON does not have, no numbers without end, no name twice."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_no_constant, object_pairs_hook=_object, parse_float=_finite)


class _CountingDecoder(_Decoder):
    """Decodes value by value in Python, so that other threads have their turn. Raises Refusal 413 for too many."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = self._left = limit
        self.parse_string = _PYTHON.py_scanstring
        self.parse_array = self._array
        self.parse_object = self._object
        self.scan_once = _SCANNER.py_make_scanner(self)

    def _array(self, place: Any, scan: Any) -> Any:
        return _PYTHON.JSONArray(place, self._counting(scan))

    def _object(self, place: Any, strict: bool, scan: Any, *hooks: Any) -> Any:
        return _PYTHON.JSONObject(place, strict, self._counting(scan), *hooks)

    def _counting(self, scan: Any) -> Any:
        def counted(text: str, index: int) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Refusal(
                    413, f"body: has more than {self._limit} values, the limit; --max-values", code="too_many_values"
                )
            return scan(text, index)

        return counted


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


def refusal(errors: Sequence[Any], value: Any) -> Refusal:
    """The first thing that is wrong with a request, as one line that names the field."""
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])  # of several types, this
    where = []
    for step in first["loc"][1:] if first["loc"][0] == "body" else first["loc"]:
        if isinstance(value, dict) and (step in value or first["type"] == "missing"):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            break  # what follows names one of several types, not a place
        where.append(str(step)[:60])
    field = ".".join(where)
    message = " ".join(str(first["msg"]).split())[:400]
    return Refusal(400, f"{field or 'body'}: {message}", param=field or None, code="invalid_value")
