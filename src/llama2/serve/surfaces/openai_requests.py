"""The requests of OpenAI's chat completions and completions, with the extras of llama.cpp and vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llama2.serve.errors import Refusal
from llama2.serve.surfaces.wire import MAX_PROMPTS, ChatMessage, Count, SamplingRequest, Tokens, Values, Wire

if TYPE_CHECKING:
    from llama2.serve.constrain.constraints import Constraint


class JsonSchema(Wire):
    """The JSON schema that the answer follows."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # whether a keyword that no grammar can follow is refused


class ResponseFormat(Wire):
    """Free text, any JSON object, or one that follows a schema; `schema` is llama.cpp's field."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @property
    def constraint(self) -> Constraint | None:
        """The constraint of the answer; None for free text. Raises Refusal, RequestError."""
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
    """vLLM's constraints of an answer; one of them may be given."""

    UNSUPPORTED: ClassVar[Values] = {"structural_tag": (), "whitespace_pattern": ()}

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ConstrainedRequest(SamplingRequest):
    """The constraint of an answer in OpenAI's field, llama.cpp's or vLLM's; one of them may be given."""

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
        """The constraint of the answer, if one is requested. Raises Refusal, RequestError."""
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
        names = [*given, *(["response_format"] if self.response_format and self.response_format.type != "text" else [])]
        if len(names) > 1:
            raise Refusal(400, f"{names[0]}: an answer cannot follow {names[1]} too; leave one out", param=names[0])
        for field, (value, make) in given.items():
            return make(value, field)
        return self.response_format.constraint if self.response_format else None


def _schema(value: dict[str, Any] | str, field: str) -> Constraint:
    """The constraint of a JSON schema, or of its JSON text."""
    from llama2.serve.constrain import constraints

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refusal(400, f"{field}: is not JSON", param=field, code="invalid_value") from None
    return constraints.json_schema(value, field, strict=False)  # type: ignore[arg-type]  # it checks the type


class ChatRequest(ConstrainedRequest):
    """`POST /v1/chat/completions`."""

    UNSUPPORTED: ClassVar[Values] = {
        **SamplingRequest.UNSUPPORTED,
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

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Count = None
    max_completion_tokens: Count = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None  # has no meaning without tools
    metadata: dict[str, str] | None = None  # nothing is stored
    prompt_cache_key: str | None = None  # the cache finds equal prompts by itself
    safety_identifier: str | None = None


class CompletionRequest(ConstrainedRequest):
    """`POST /v1/completions`."""

    UNSUPPORTED: ClassVar[Values] = {**SamplingRequest.UNSUPPORTED, "suffix": ("",)}

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
