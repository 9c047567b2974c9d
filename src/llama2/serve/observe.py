"""What a server leaves behind for its operator: a log line and a trace for each request, without any prompt's text."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from opentelemetry import propagate, trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.serve.metrics import Metrics
from llama2.serve.service import Stream

log = logging.getLogger("llama2.serve")

#: Names of OpenTelemetry's conventions for generative AI, by route.
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/api/chat": "chat"}

#: Routes that machines ask so often that nobody wants to read of it.
_PROBES = ("/health", "/v1/health", "/metrics")


class Observed:
    """Wraps the application: counts requests, logs each with its figures, and records spans of what it generated."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: trace.Tracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer or trace.get_tracer("llama2.serve")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The observed application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        known: dict[str, Any] = scope.setdefault("state", {})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            self._metrics.http.labels(route, str(status)).inc()
            stream: Stream | None = known.get("stream")
            facts = {"method": scope["method"], "route": route, "status": status}
            facts["seconds"] = round(time.perf_counter() - begun, 4)
            if stream is not None:
                facts |= _facts(stream)
                self._trace(scope, route, stream)
            level = logging.DEBUG if route in _PROBES and status == 200 else logging.INFO
            log.log(level, "request", extra={"facts": facts})

    def _trace(self, scope: Scope, route: str, stream: Stream) -> None:
        """Spans of a request and its phases, made when all times are known; nothing without a tracing SDK."""
        offset = time.time() - time.perf_counter()
        operation = _OPERATIONS.get(route, "text_completion")
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        ended = stream.ended or time.perf_counter()
        phases = [
            ("queue", stream.arrived, stream.started),
            ("prefill", stream.started, stream.first),
            ("decode", stream.first, ended),
        ]
        span = self._tracer.start_span(
            f"{operation} {stream.service.name}",
            context=propagate.extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=int((stream.arrived + offset) * 1e9),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "llama2",
                "gen_ai.request.model": stream.service.name,
                "gen_ai.response.model": stream.service.name,
                "gen_ai.usage.input_tokens": stream.prompt_tokens,
                "gen_ai.usage.output_tokens": stream.completion_tokens,
                "gen_ai.response.finish_reasons": list(stream.finishes),
            },
        )
        if not span.is_recording():  # there is no tracing SDK, or it leaves this one out
            return
        inside = trace.set_span_in_context(span)
        for name, start, end in phases:
            if start is not None and end is not None:
                phase = self._tracer.start_span(name, context=inside, start_time=int((start + offset) * 1e9))
                phase.end(int((end + offset) * 1e9))
        span.end(int((ended + offset) * 1e9))


def _facts(stream: Stream) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": stream.service.name,
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": stream.completion_tokens,
        "finish": ",".join(sorted(set(stream.finishes))) or "open",
    }
    if stream.first is not None:
        facts["first_token_seconds"] = round(stream.first - stream.arrived, 4)
    return facts


class Lines(logging.Formatter):
    """A log record as one line: JSON, or words for people."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """The line, and after it a traceback if there is one."""
        facts = getattr(record, "facts", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        failure = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **facts}
            return json.dumps(line | ({"traceback": failure} if failure else {}))
        words = " ".join(f"{name}={value}" for name, value in facts.items())
        line_ = " ".join(filter(None, [when, record.levelname, record.getMessage(), words]))
        return line_ + (f"\n{failure}" if failure else "")


def set_up(*, as_json: bool) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(as_json=as_json))
    for name in ("llama2", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "llama2" else logging.WARNING)
