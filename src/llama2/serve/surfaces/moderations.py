"""OpenAI's moderations, by the server's policy and its judge."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

from llama2.safety.moderation import Moderator
from llama2.serve.errors import Refusal, unsupported
from llama2.serve.surfaces.context import models_of, warning_header
from llama2.serve.surfaces.encoding import json_response
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.prompts import MOST_TEXTS, refuse_long
from llama2.serve.surfaces.wire import Wire

router = APIRouter(route_class=JsonRoute)


class InputPart(Wire):
    """A part of one input. Only text is judged."""

    type: str
    text: str | None = None


class ModerationRequest(Wire):
    """`POST /v1/moderations`. The operator chooses the judge, whatever `model` is."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
        | Annotated[list[InputPart], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    model: str | None = None


@router.post("/v1/moderations")
async def moderations(body: ModerationRequest, http: HttpRequest) -> Response:
    """How each text is judged. A list of parts is one text; what was not judged is null."""
    texts = _texts(body)
    models = models_of(http)
    moderator = models.moderator
    if moderator is None:
        moderator = await asyncio.to_thread(models.default_moderator)
    results = await asyncio.to_thread(_results, moderator, texts)
    head = {"id": f"modr-{secrets.token_hex(12)}", "model": moderator.judge.name}
    return json_response({**head, "results": results}, warning_header(body, http))


def _results(moderator: Moderator, texts: list[str]) -> list[dict[str, Any]]:
    return [moderator.result(moderator.moderate([{"role": "user", "content": text}], "input")) for text in texts]


def _texts(body: ModerationRequest) -> list[str]:
    """The texts to judge. Raises Refusal for an image, for no text, and for more than is judged at once."""
    given: Any = body.input
    texts: list[Any] = [given] if isinstance(given, str) else given
    if not isinstance(texts[0], str):
        for i, part in enumerate(texts):
            if part.type != "text" or part.text is None:
                raise unsupported(f"input.{i}", f"{part.type[:40]!r} is not supported, only text is")
        texts = ["\n".join(str(part.text) for part in texts)]
    if not all(text.strip() for text in texts):
        raise Refusal(400, "input: is empty; give a text", param="input", code="invalid_value")
    refuse_long(texts)
    return texts
