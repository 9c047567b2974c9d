"""The JSON objects of requests, as strict types, and the types that several surfaces share.

A field that would change the answer and is not supported is refused by name. One without effect is accepted, and named
in a warning header and a log line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import PydanticCustomError, core_schema

from llama2.serve.errors import unsupported

#: Fields, and for each the values that request nothing.
Values = Mapping[str, tuple[Any, ...]]

#: Entries of a list or an object of a request, unless its field has a limit of its own.
MAX_ITEMS, MAX_ENTRIES = 16_384, 1024
#: Prompts of a request, and tokens of a prompt.
MAX_PROMPTS, MAX_TOKENS = 2048, 1 << 22

#: Keys of pydantic's schemas whose values hold no schemas, and those whose values hold schemas by field name.
_OPAQUE = frozenset({"cls", "config", "default", "function", "metadata", "serialization"})
_NAMED = frozenset({"fields", "choices"})


def _bounded(schema: Any, *, named: bool = False) -> Any:
    """A pydantic schema with limits on its lists and objects; `named`: its keys are names of fields."""
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
        return core_schema.no_info_before_validator_function(_limit_entries, schema)
    return schema


def _limit_entries(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", f"has {len(value)} entries, and the limit is {MAX_ENTRIES}")
    return value


class Wire(BaseModel):
    """A JSON object of a request. Types are strict: "3" and true are not numbers."""

    model_config = ConfigDict(extra="allow", strict=True)

    #: Fields that are known and not supported, each with the values that request nothing.
    UNSUPPORTED: ClassVar[Values] = {}
    #: Fields that change no answer and have no effect here, each with the values that need no warning.
    HARMLESS: ClassVar[Values] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Every list and object of a request has a limit, and a list is refused at its first error."""
        bounded: core_schema.CoreSchema = _bounded(handler(source))
        return core_schema.no_info_before_validator_function(_limit_entries, bounded)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Wire:
        for name, harmless in self.UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise unsupported(name)
        return self

    def ignored(self) -> Iterator[str]:
        """Names of fields that have no effect here, with those of inner objects."""
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
#: Stop strings: one, or a list; empty ones end nothing.
Stops = Annotated[
    Annotated[list[StopText], Field(max_length=16)] | None,
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


#: A limit in tokens; −1 means no limit.
Count = Annotated[
    Annotated[int, Field(ge=0, lt=1 << 62)] | None, BeforeValidator(lambda value: None if value == -1 else value)
]


class StreamOptions(Wire):
    """What a stream reports besides the answer."""

    UNSUPPORTED: ClassVar[Values] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class SamplingRequest(Wire):
    """How tokens are sampled, as OpenAI's routes share it. An omitted or null field has the server's default.

    `top_k`, `min_p`, `repetition_penalty`, `lookup` and `watermark` are extras.
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
    watermark: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class ContentPart(Wire):
    """A part of a message's content. Only text is supported; no URL is ever fetched."""

    type: str
    text: str | None = None


class ChatMessage(Wire):
    """One message of a chat."""

    UNSUPPORTED: ClassVar[Values] = {"audio": (), "function_call": (), "refusal": ("",)}

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
