"""llama.cpp's routes: health, properties, tokens."""

from __future__ import annotations

from fastapi import APIRouter, Response

from llama2.serve.openai import reply
from llama2.serve.wire import StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.get("/health")
@router.get("/v1/health", include_in_schema=False)
async def health() -> Response:
    """Whether requests are taken."""
    return reply({"status": "ok"})
