"""The route of Azure's clients that OpenAI does not have; Azure's other paths are in `http/paths.py`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from llama2.serve.surfaces.context import models_of
from llama2.serve.surfaces.encoding import json_response
from llama2.serve.surfaces.json_body import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.get("/info")
async def info(http: HttpRequest) -> Response:
    """The default model, in the form of Azure's model inference API."""
    name = next(iter(models_of(http).entries))
    return json_response({"model_name": name, "model_type": "chat-completion", "model_provider_name": "llama2"})
