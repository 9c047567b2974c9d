"""A loaded model that answers requests from coroutines, and the streams of their events.

This is the event loop's side: admission, counts and metrics. The engine runs in an `EngineThread`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from llama2 import native
from llama2.api import Model
from llama2.engine.request import EngineStats, Event, FinishReason, Request, Sampling
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.engine.watermark import Watermark
from llama2.errors import RequestError
from llama2.serve.admission import AdmissionController, PendingRequest
from llama2.serve.constrain.constrainer import Constrainer
from llama2.serve.engine_thread import EngineThread, TimedEvent
from llama2.serve.errors import Refusal
from llama2.serve.metrics import Metrics
from llama2.serve.moderated import AnswerModeration, ChoiceEvent
from llama2.serve.settings import ServeSettings
from llama2.serve.text_limit import TextLimit
from llama2.serve.token_text import TokenTexts
from llama2.version import package_version

#: Tokens of the prompt that measures a model's prefill rate.
_TRIAL = 64


class Stream:
    """The events of one HTTP request's choices, in batches. For the event loop's thread alone.

    `close` cancels the choices that still run. Times are `time.perf_counter`'s.
    """

    def __init__(self, service: Service, requests: Sequence[Request], pending: PendingRequest) -> None:
        self.requests = requests
        self.service = service
        self.pending = pending
        self.prompt_tokens = sum(len(request.prompt) for request in requests if request.choice == 0)
        self.cached_tokens = 0  # prefix-hit tokens of the prompts
        self.completion_tokens = 0
        self.finishes: list[str] = []  # the engine's reasons of the choices that have ended
        self.ends: dict[int, FinishReason] = {}  # by choice, as the client sees them
        self.moderation: AnswerModeration | None = None
        self.arrived = pending.arrived
        self.started: float | None = None  # when the first step began
        self.first: float | None = None  # when the first token came
        self.ended: float | None = None  # when the last choice ended
        self.last = [self.arrived] * len(requests)  # when each choice's last token came
        self._events: list[ChoiceEvent] = []
        self._accepted = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def reasons(self) -> list[str]:
        """Why choices ended: for their clients, or in the engine where nobody saw the end."""
        return [*self.ends.values()] or self.finishes

    @property
    def open(self) -> int:
        """Choices that have not ended."""
        return len(self.requests) - len(self.finishes)

    async def accepted(self) -> None:
        """Wait until the engine has accepted the requests. Raises its ContextError or RequestError."""
        while not self._accepted and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure

    async def batches(self, interval: float | None = None) -> AsyncIterator[list[ChoiceEvent]]:
        """The events in batches, until every choice has finished; an empty batch after `interval` seconds without.

        Where answers are moderated, these are the events that may pass.
        """
        while self.open or self._events:
            if not self._events:
                await self._wait(interval)
            batch, self._events = self._events, []
            if batch and self.moderation is not None:
                batch = await self.moderation.passing(batch, self.cancel)
                if not batch:
                    continue
            self.ends |= {index: event.finish for index, event in batch if event.finish is not None}
            yield batch

    def cancel(self, index: int) -> None:
        """Cancel one choice."""
        self.service.cancel(self, index)

    def close(self) -> None:
        """Cancel the choices that still run. A second call does nothing."""
        if self.open:
            self.service.cancel(self)

    async def _wait(self, interval: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if interval is None else loop.call_later(interval, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def accept(self, failure: Exception | None) -> None:
        """The engine has accepted every request, or none because of `failure`."""
        self._accepted, self._failure = True, failure
        if failure is not None:
            self.finishes = ["refused"] * len(self.requests)
        self._wake()

    def publish(self, events: list[ChoiceEvent]) -> None:
        """Add events, of one step or more."""
        self._events += events
        self._wake()


class Service:
    """A model that answers requests from coroutines. Create it in the event loop's thread; `stop` waits for its end.

    `prefill` is the rate of prefill in tokens a second, from `measure`.
    """

    def __init__(self, name: str, model: Model, settings: ServeSettings, metrics: Metrics, prefill: float) -> None:
        self.name = name
        self.model = model
        self.metrics = metrics
        self.texts = TokenTexts(model.tokenizer)
        self.limit = TextLimit(model.tokenizer, model.engine.context)
        self.constrainer = Constrainer(model.tokenizer)
        self.fingerprint = _fingerprint(model, settings.watermarks.get(name))
        self.sampling = _sampling(model, settings)  # the defaults of requests
        self.admission = AdmissionController(settings.max_queue, settings.max_wait, MAX_SEQUENCES)
        self.admission.prefill.add(prefill, 1.0)
        self.streams: set[Stream] = set()  # that have not ended
        self._generated = metrics.generated.labels(name)
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._thread: EngineThread[Stream] = EngineThread(name, model.engine, self._on_accepted, self._on_events)

    async def submit(self, requests: Sequence[Request], *, refuse: bool = True) -> Stream:
        """Start answers, all or none. Raises Refusal, ContextError or RequestError.

        Unless `refuse`, they are part of admitted work: admission counts them, but does not refuse them.
        """
        if self._stopping:
            raise Refusal(503, "the model is being unloaded; send the request again", type="unavailable_error")
        now = time.perf_counter()
        tokens = sum(len(request.prompt) for request in requests if request.choice == 0)  # choices share their prompt
        context = self.model.engine.context
        too_long = any(len(request.prompt) + (request.max_tokens or 1) > context for request in requests)
        try:
            key = hash((requests[0].prompt, len(requests)))
            # The engine has the better error for a request that is too long.
            pending = self.admission.admit(tokens, len(requests), now, refuse=refuse and not too_long, key=key)
        except Refusal:
            self.metrics.refused.labels(self.name).inc()
            raise
        stream = Stream(self, requests, pending)
        self.streams.add(stream)
        self._thread.submit(stream)
        try:
            await stream.accepted()
        except BaseException as failure:
            if isinstance(failure, asyncio.CancelledError):
                stream.close()
            else:
                self._end(stream, len(requests), time.perf_counter())
            raise
        self.metrics.prompt.labels(self.name).inc(stream.prompt_tokens)
        return stream

    def cancel(self, stream: Stream, index: int | None = None) -> None:
        """Cancel the choices of a stream that still run, or one; their cache is freed after the current step."""
        self._thread.cancel(stream, index)

    def answered(self, requests: Sequence[Request], text: str) -> Stream:
        """A stream in which each choice is `text`, in place of an answer that the policy refuses."""
        now = time.perf_counter()
        stream = Stream(self, requests, PendingRequest(0, len(requests), now, began=now))
        stream.finishes = ["content_filter"] * len(requests)
        stream.started = stream.first = stream.ended = now
        stream.accept(None)
        stream.publish([(i, Event(i, None, text, "content_filter")) for i in range(len(requests))])
        return stream

    def stop(self) -> None:
        """End the thread; running answers are cancelled."""
        self._stopping = True
        self._thread.stop()
        self.constrainer.close()

    def _on_accepted(self, stream: Stream, failure: Exception | None) -> None:
        self._loop.call_soon_threadsafe(stream.accept, failure)

    def _on_events(self, events: Mapping[Stream, Sequence[TimedEvent]], now: float, load: EngineStats) -> None:
        self._loop.call_soon_threadsafe(self._publish, events, now, load)

    def _publish(self, published: Mapping[Stream, Sequence[TimedEvent]], now: float, load: EngineStats) -> None:
        """Count events, and add them to their streams. Runs in the event loop.

        First tokens and ends are of the last step, which ended `now`: they are published without delay.
        """
        self.admission.slots = max(1, load.running) if load.waiting else MAX_SEQUENCES  # the cache may hold fewer
        gaps: dict[float, int] = {}  # tokens by seconds since the one before; the tokens of a step have equal gaps
        tokens = 0
        began: list[PendingRequest] = []
        ended: list[tuple[Stream, int]] = []
        for stream, events in published.items():
            finishes = len(stream.finishes)
            for when, index, event in events:
                if event.token is not None:
                    if stream.last[index] > stream.arrived:
                        gap = when - stream.last[index]
                        gaps[gap] = gaps.get(gap, 0) + 1
                    stream.last[index] = when
                    stream.completion_tokens += 1
                    tokens += 1
                if event.finish is not None:
                    stream.finishes.append(event.finish)
                    if event.embedding is None:
                        self.metrics.finished.labels(self.name, event.finish).inc()
                    else:
                        self.metrics.embedded.labels(self.name).inc()
                    if stream.requests[index].choice == 0:
                        stream.cached_tokens += event.cached_tokens
                        self.metrics.cached.labels(self.name).inc(event.cached_tokens)
                # Without tokens to generate, prefill ends with the last choice.
                if stream.first is None and (event.token is not None or (event.finish == "length" and not stream.open)):
                    stream.first = now
                    began.append(stream.pending)
            if len(stream.finishes) > finishes:
                ended.append((stream, len(stream.finishes) - finishes))
        self._generated.inc(tokens)
        for gap, count in gaps.items():
            self.metrics.between.observe(self.name, gap, count)
        if began:
            self.admission.began(began, now)
        for stream, choices in ended:
            self._end(stream, choices, now)
        for stream, events in published.items():
            stream.publish([(index, event) for _, index, event in events])

    def _end(self, stream: Stream, choices: int, now: float) -> None:
        """Some choices of a stream have ended."""
        self.admission.ended(stream.pending, choices, now)
        if stream.open:
            return
        stream.ended = now
        self.streams.discard(stream)
        if stream.started is not None and stream.first is not None and {"stop", "length"} >= set(stream.finishes):
            self.metrics.queue.labels(self.name).observe(stream.started - stream.arrived)
            self.metrics.prefill.labels(self.name).observe(stream.first - stream.started)
            if stream.completion_tokens:
                self.metrics.first.labels(self.name).observe(stream.first - stream.arrived)
            self.metrics.whole.labels(self.name).observe(now - stream.arrived)


def measure(model: Model) -> float:
    """Prefill tokens a second, for the predictions before the first request; it also warms the model up."""
    tokens = min(_TRIAL, model.engine.context - 1)
    begun = time.perf_counter()
    for _ in model.engine.run(Request((model.tokenizer.eos_id or 0,) * tokens, max_tokens=1)):
        pass
    return tokens / (time.perf_counter() - begun)


def _sampling(model: Model, settings: ServeSettings) -> Sampling:
    """The operator's choice, else the checkpoint's generation_config.json, else the defaults of the command line."""
    sampling = Sampling()
    published = model.checkpoint.metadata.get("generation_config")
    values = published if isinstance(published, Mapping) else {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        with suppress(RequestError):  # values that are out of range, or not numbers, are ignored
            sampling = replace(sampling, **{name: values.get(name, getattr(sampling, name))})
    return replace(sampling, **settings.sampling)


def _fingerprint(model: Model, watermark: Watermark | None) -> str:
    """A text that changes whenever equal requests may get different answers."""
    path = model.checkpoint.path
    engine = type(model.engine).__name__
    what = f"{package_version()} {engine} {native.module().__name__} {path.resolve()} {path.stat().st_mtime_ns}"
    what += "".join(f" {adapter.digest()}" for adapter in model.checkpoint.adapters)
    what += "" if watermark is None else f" {watermark}"
    return "fp_" + hashlib.sha256(what.encode()).hexdigest()[:12]
