"""A log line and a trace for each request, without the text of prompts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry import propagate, trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.console import visible
from llama2.serve.metrics import Metrics
from llama2.serve.service import Stream

log = logging.getLogger("llama2.serve")

#: Names of OpenTelemetry's conventions for generative AI, by route.
_OPERATIONS = dict.fromkeys(("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"), "chat")
_OPERATIONS |= dict.fromkeys(("/v1/embeddings", "/api/embed", "/api/embeddings"), "embeddings")

#: Routes that monitoring calls so often that their log lines are of level debug.
_PROBES = ("/health", "/v1/health", "/metrics")

#: The status in the log, as nginx has it, of a client that disconnected before its answer was whole.
_DISCONNECTED = 499


class AccessLog:
    """Wraps the application: counts requests, logs each, and records spans of the generation."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: trace.Tracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer or trace.get_tracer("llama2.serve")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, whole, disconnected = time.perf_counter(), 0, False, False
        state: dict[str, Any] = scope.setdefault("state", {})

        async def send_observed(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                whole = True
            await send(message)

        async def receive_observed() -> Message:
            nonlocal disconnected
            message = await receive()
            disconnected |= message["type"] == "http.disconnect" and not whole
            return message

        try:
            await self._app(scope, receive_observed, send_observed)
        finally:
            status = _DISCONNECTED if disconnected else status
            route = getattr(scope.get("route"), "path", None) or "other"
            self._metrics.http.labels(route, str(status)).inc()
            streams: list[Stream] = state.get("streams", [])
            facts = {"method": scope["method"], "route": route, "status": status}
            facts["seconds"] = round(time.perf_counter() - begun, 4)
            if "refused" in state:
                facts["reason"] = state["refused"]
            if streams:
                facts |= _facts(streams)
                self._trace(scope, route, streams)
            level = logging.DEBUG if route in _PROBES and status == 200 else logging.INFO
            log.log(level, "request", extra={"facts": facts})

    def _trace(self, scope: Scope, route: str, streams: Sequence[Stream]) -> None:
        """Record spans of a request and its phases, once all times are known; nothing without a tracing SDK.

        The streams of a request run one after another.
        """
        begin, end = streams[0], streams[-1]
        offset = time.time() - time.perf_counter()
        operation = _OPERATIONS.get(route, "text_completion")
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        ended = end.ended or time.perf_counter()
        phases = [
            ("queue", begin.arrived, begin.started),
            ("prefill", begin.started, end.first),
            ("decode", end.first, ended),
        ]
        span = self._tracer.start_span(
            f"{operation} {begin.service.name}",
            context=propagate.extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=int((begin.arrived + offset) * 1e9),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "llama2",
                "gen_ai.request.model": begin.service.name,
                "gen_ai.response.model": begin.service.name,
                "gen_ai.usage.input_tokens": sum(stream.prompt_tokens for stream in streams),
                "gen_ai.usage.output_tokens": sum(stream.completion_tokens for stream in streams),
                "gen_ai.response.finish_reasons": [reason for stream in streams for reason in stream.reasons],
            },
        )
        if not span.is_recording():  # there is no tracing SDK, or it does not sample this one
            return
        inside = trace.set_span_in_context(span)
        for name, first, last in phases:
            if first is not None and last is not None:
                phase = self._tracer.start_span(name, context=inside, start_time=int((first + offset) * 1e9))
                phase.end(int((last + offset) * 1e9))
        span.end(int((ended + offset) * 1e9))


def _facts(streams: Sequence[Stream]) -> dict[str, Any]:
    first = streams[0]
    facts: dict[str, Any] = {
        "model": first.service.name,
        "prompt_tokens": sum(stream.prompt_tokens for stream in streams),
        "completion_tokens": sum(stream.completion_tokens for stream in streams),
        "finish": ",".join(sorted({reason for stream in streams for reason in stream.reasons})) or "open",
    }
    if first.first is not None and first.completion_tokens:
        facts["first_token_seconds"] = round(first.first - first.arrived, 4)
    return facts


class LineFormatter(logging.Formatter):
    """A log record as one line: JSON, or words for people."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback after it if there is one."""
        facts = getattr(record, "facts", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        failure = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **facts}
            return json.dumps(line | ({"traceback": failure} if failure else {}))
        words = " ".join(f"{name}={value}" for name, value in facts.items())
        line_ = " ".join(filter(None, [when, record.levelname, record.getMessage(), words]))
        return visible(line_ + (f"\n{failure}" if failure else ""))


def configure_logging(*, as_json: bool) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(as_json=as_json))
    for name in ("llama2", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "llama2" else logging.WARNING)
