"""What Azure's clients ask besides OpenAI's routes: their other addresses are in `http/paths.py`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from llama2.serve.surfaces.common import json_response, served
from llama2.serve.surfaces.wire import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.get("/info")
async def info(http: HttpRequest) -> Response:
    """Which model answers where a request names none, as Azure's model inference API has it."""
    name = next(iter(served(http).entries))
    return json_response({"model_name": name, "model_type": "chat-completion", "model_provider_name": "llama2"})
