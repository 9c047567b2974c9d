"""What the engine's thread publishes to the event loop, and when, by a clock that only steps move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama2
from llama2.api import Model
from llama2.engine.request import Event, Request, Sampling
from llama2.serve import engine_thread as module
from llama2.serve.engine_thread import TimedEvent
from llama2.serve.metrics import Metrics
from llama2.serve.service import Service, Stream
from llama2.serve.settings import ServeSettings
from serving import write_model

#: Of the engine, in seconds.
STEP = 0.01

Call = tuple[float, dict[Stream, list[TimedEvent]]]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return llama2.load(write_model(tmp_path, context_length=256), threads=1, sequences=4)


@pytest.fixture
def served(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Service, list[Call]]]:
    """Makes a service, and the calls by which it will have published of streams, each with its time."""
    clock = [1.0]
    step = model.engine.step

    def timed() -> list[Event]:
        clock[0] += STEP
        return step()

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(model.engine, "step", timed)

    def make() -> tuple[Service, list[Call]]:
        calls: list[Call] = []
        publish = Service._on_events

        def recorded(service: Service, events: Any, now: float, load: Any) -> None:
            calls.append((now, events))
            publish(service, events, now, load)

        monkeypatch.setattr(Service, "_on_events", recorded)
        return Service("tiny", model, ServeSettings(), Metrics(), 1e6), calls

    return make


def asking(tokens: int) -> Request:
    return Request((5, 6, 7), tokens, Sampling(0, logit_bias={2: -100.0, 0: -100.0}))


async def everything(service: Service, tokens: int) -> list[Event]:
    stream = await service.submit([asking(tokens)])
    return [event async for batch in stream.batches() for _, event in batch]


def test_short_steps_are_published_together_but_for_the_first_and_the_last(served: Any, model: Model) -> None:
    expected = [event.token for event in model.engine.run(asking(23))]

    async def run() -> list[Event]:
        service, calls = served()
        try:
            events = await everything(service, 23)
        finally:
            service.stop()
        # Five steps make the 50 ms of _INTERVAL: the next one would end further from them.
        assert [sum(map(len, published.values())) for _, published in calls] == [1, 5, 5, 5, 5, 2]
        return events

    assert [event.token for event in asyncio.run(run())] == expected


def test_who_begins_or_ends_does_not_make_others_be_published(served: Any) -> None:
    async def run() -> list[Call]:
        service, calls = served()
        try:
            long = asyncio.create_task(everything(service, 240))
            for tokens in (4, 13, 31, 22):  # one after another, beside the long one
                assert len(await everything(service, tokens)) == tokens
            assert len(await long) == 240
        finally:
            service.stop()
        return calls

    begun, last, alone = set(), 0.0, 0
    for now, published in asyncio.run(run()):
        assert all(events[0][0] == now for stream, events in published.items() if stream not in begun)
        assert all(events[-1][0] == now for events in published.values() if events[-1][2].finish is not None)
        urgent = {
            stream for stream, events in published.items() if stream not in begun or events[-1][2].finish is not None
        }
        if urgent < published.keys():
            assert now - last > 0.05 - STEP
            last = now
        else:
            alone += 1
        begun |= published.keys()
    assert alone >= 5
