"""The detector of the server's watermark."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import Field

from llama2.engine.watermark import Watermark
from llama2.safety import detection
from llama2.serve.errors import Refusal
from llama2.serve.service import Service
from llama2.serve.surfaces.context import models_of, warning_header
from llama2.serve.surfaces.encoding import json_response
from llama2.serve.surfaces.json_body import JsonRoute
from llama2.serve.surfaces.prompts import MOST_TEXTS, refuse_long
from llama2.serve.surfaces.wire import Wire

router = APIRouter(route_class=JsonRoute)


class DetectRequest(Wire):
    """`POST /v1/watermark/detect`."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
    level: float = Field(detection.LEVEL, gt=0, le=0.5)


@router.post("/v1/watermark/detect")
async def detect(body: DetectRequest, http: HttpRequest) -> Response:
    """Whether each text has the mark of the model's key."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    refuse_long(texts)
    models = models_of(http)
    service = await models.service(body.model)
    watermark = models.settings.watermarks.get(service.name)
    if watermark is None:
        raise Refusal(404, "the server has no watermark's key for this model", param="model", code="no_watermark")
    rows = await asyncio.to_thread(_rows, service, watermark, texts, body.level)
    return json_response({"object": "list", "model": service.name, "data": rows}, warning_header(body, http))


def _rows(service: Service, watermark: Watermark, texts: list[str], level: float) -> list[dict[str, Any]]:
    tokenizer = service.model.tokenizer
    found = (detection.detect_text(watermark, text, tokenizer, level=level) for text in texts)
    return [{"index": i, "level": level, **each.to_json()} for i, each in enumerate(found)]
