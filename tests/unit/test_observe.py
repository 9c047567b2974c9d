"""What is left behind of a request: spans with their times, and lines without any text of a prompt."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from starlette.types import Receive, Scope, Send

from llama2.serve.http.access_log import AccessLog, LineFormatter
from llama2.serve.metrics import CountedHistogram, Metrics


def test_a_request_is_a_span_with_its_phases(caplog: pytest.LogCaptureFixture) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    now = time.perf_counter()
    stream: Any = SimpleNamespace(
        **{"arrived": now - 10, "started": now - 9, "first": now - 6, "ended": now - 1, "reasons": ["length", "stop"]},
        **{"prompt_tokens": 7, "completion_tokens": 5, "service": SimpleNamespace(name="tiny")},
    )

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        scope["state"]["streams"] = [stream]
        scope["route"] = SimpleNamespace(path="/v1/chat/completions")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ignore(_: Any) -> None:
        return

    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    scope: Scope = {"type": "http", "method": "POST", "headers": [(b"traceparent", parent)], "path": "/"}
    observed = AccessLog(app, Metrics(), provider.get_tracer("test"))
    caplog.set_level(logging.INFO, "llama2.serve")
    asyncio.run(observed(scope, ignore, ignore))  # type: ignore[arg-type]

    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans.pop("chat tiny")
    assert whole.context is not None
    assert whole.parent is not None
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(whole.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama2",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length", "stop"),
    }
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}  # type: ignore[operator]
    assert seconds == pytest.approx({"queue": 1, "prefill": 3, "decode": 5}, abs=1e-4)
    assert all(span.parent == whole.context for span in spans.values())
    assert whole.end_time is not None
    assert whole.end_time / 1e9 == pytest.approx(time.time() - 1, abs=5)

    (record,) = caplog.records
    line = json.loads(LineFormatter(as_json=True).format(record))
    assert {name: line[name] for name in ("event", "route", "status", "model", "prompt_tokens", "finish")} == {
        **{"event": "request", "route": "/v1/chat/completions", "status": 200, "model": "tiny"},
        **{"prompt_tokens": 7, "finish": "length,stop"},
    }
    assert line["first_token_seconds"] == 4.0
    assert " status=200 " in LineFormatter(as_json=False).format(record)


def test_repeated_values_are_told_as_the_librarys_histogram_tells_them() -> None:
    limits = (0.001, 0.5, 1, 2.5)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    repeated = CountedHistogram("gap", "Between.", ours, limits)
    histogram = Histogram("gap", "Between.", ["model"], registry=theirs, buckets=limits)
    for model, seconds, count in (("a", 0.25, 3), ("b", 7, 2), ("a", 1, 1), ("a", 0.001, 2), ("a", 2.75, 1)):
        repeated.observe(model, seconds, count)
        for _ in range(count):
            histogram.labels(model).observe(seconds)
    expected = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == expected
