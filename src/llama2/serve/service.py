"""One thread for each loaded model, which owns its engine; and the streams by which coroutines follow its events.

Coroutines never touch the engine: they post what is to be added or cancelled, and the thread hands all events of a step
to the event loop at once, or of a few steps that are short: waking coroutines and sending costs as much as a step of a
small model. What begins or ends is told without delay.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

import llama2
from llama2 import native
from llama2.api import Model
from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import Event, Load, Request
from llama2.engine.scheduler import MAX_SEQUENCES
from llama2.serve.admission import Demand, Door
from llama2.serve.constrain import Constrainer
from llama2.serve.errors import Refusal
from llama2.serve.metrics import Metrics
from llama2.serve.settings import Settings
from llama2.serve.tokens import Texts

log = logging.getLogger("llama2.serve")

#: Tokens of the prompt that a model is tried with.
_TRIAL = 64

#: About so many seconds' tokens are told together, where steps are shorter.
_TOGETHER = 0.05

#: News of one choice: its index among the stream's requests, and the event.
News = tuple[int, Event]

#: The same, after the time of its step.
Timed = tuple[float, int, Event]


class Stream:
    """The events of one HTTP request's choices, batched as they come. For the event loop's thread alone.

    Close it when nobody wants the rest: what still runs is cancelled. Times are `time.perf_counter`'s.
    """

    def __init__(self, service: Service, requests: Sequence[Request], demand: Demand) -> None:
        self.requests = requests
        self.service = service
        self.demand = demand
        self.prompt_tokens = sum(len(request.prompt) for request in requests if request.choice == 0)
        self.cached_tokens = 0  # of the prompts, that were found in the cache
        self.completion_tokens = 0
        self.finishes: list[str] = []  # reasons of the choices that have ended
        self.arrived = demand.arrived
        self.started: float | None = None  # when the first step began
        self.first: float | None = None  # when the first token came
        self.ended: float | None = None  # when the last choice ended
        self.last = [self.arrived] * len(requests)  # when each choice's last token came
        self._pending: list[News] = []
        self._taken = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def open(self) -> int:
        """Choices that have not ended."""
        return len(self.requests) - len(self.finishes)

    async def accepted(self) -> None:
        """Wait until the engine has taken the requests. Raises its ContextError or RequestError."""
        while not self._taken and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[News]]:
        """The events in batches, until every choice has finished; an empty batch after `patience` seconds without."""
        while self.open or self._pending:
            if not self._pending:
                await self._wait(patience)
            batch, self._pending = self._pending, []
            yield batch

    def close(self) -> None:
        """Cancel what still runs; a second time is no error."""
        if self.open:
            self.service.cancel(self)

    async def _wait(self, patience: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if patience is None else loop.call_later(patience, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self, failure: Exception | None) -> None:
        """The engine has accepted every request, or none because of `failure`."""
        self._taken, self._failure = True, failure
        if failure is not None:
            self.finishes = ["refused"] * len(self.requests)
        self._wake()

    def tell(self, news: list[News]) -> None:
        """Events of a step, or of several."""
        self._pending += news
        self._wake()


class Service:
    """A model that answers requests from coroutines. Make it in the event loop's thread; `stop` waits for its end.

    `prefill` is how many tokens a second of a prompt run, as `measure` says.
    """

    def __init__(self, name: str, model: Model, settings: Settings, metrics: Metrics, prefill: float) -> None:
        self.name = name
        self.model = model
        self.metrics = metrics
        self.texts = Texts(model.tokenizer)
        self.constrainer = Constrainer(model.tokenizer)
        self.fingerprint = _fingerprint(model)
        self.used = time.perf_counter()
        self.door = Door(settings.max_queue, settings.max_wait, MAX_SEQUENCES)
        self.door.prefill.add(prefill, 1.0)
        self.streams: set[Stream] = set()  # that have not ended
        self._generated = metrics.generated.labels(name)
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[str, Stream]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._choices: dict[int, tuple[Stream, int]] = {}  # by the engine's id; of the thread alone
        self._ids: dict[Stream, set[int]] = {}
        self._unstarted: dict[int, Stream] = {}  # by the engine's id, in order of arrival
        self._silent: set[Stream] = set()  # of which nothing was told
        self._untold: dict[Stream, list[Timed]] = {}
        self._told = 0.0  # when all of them last were
        self._thread = threading.Thread(target=self._work, name=f"engine of {name}", daemon=True)
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Start several answers together. Raises Refusal, ContextError or RequestError, and then none is started."""
        if self._stopping:
            raise Refusal(503, "the model is being unloaded; ask again", type="unavailable_error")
        now = self.used = time.perf_counter()
        tokens = sum(len(request.prompt) for request in requests if request.choice == 0)  # choices share their prompt
        context = self.model.engine.context
        hopeless = any(len(request.prompt) + (request.max_tokens or 1) > context for request in requests)
        try:
            key = hash((requests[0].prompt, len(requests)))
            # Of what is hopeless the engine says better why.
            demand = self.door.enter(tokens, len(requests), now, refuse=not hopeless, key=key)
        except Refusal:
            self.metrics.refused.labels(self.name).inc()
            raise
        stream = Stream(self, requests, demand)
        self.streams.add(stream)
        self._post("add", stream)
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

    def cancel(self, stream: Stream) -> None:
        """End what still runs of a stream; its cache is freed when the step that runs is over."""
        self._post("cancel", stream)

    def stop(self) -> None:
        """End the thread; what still runs is told to be cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _post(self, what: str, stream: Stream) -> None:
        self._posted.append((what, stream))
        self._wake.set()

    def _tell(self, told: dict[Stream, list[Timed]], now: float, load: Load) -> None:
        """Account for events, and hand them to those who wait.

        In the event loop. What begins or ends did so `now`, for the last step is told with no delay.
        """
        self.door.places = max(1, load.running) if load.waiting else MAX_SEQUENCES  # the cache may hold fewer
        gaps: dict[float, int] = {}  # seconds between tokens, and how many had them: a step's have the same
        tokens = 0
        began: list[Demand] = []
        ended: list[tuple[Stream, int]] = []
        for stream, events in told.items():
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
                    self.metrics.finished.labels(self.name, event.finish).inc()
                    if stream.requests[index].choice == 0:
                        stream.cached_tokens += event.cached_tokens
                        self.metrics.cached.labels(self.name).inc(event.cached_tokens)
                if stream.first is None and (event.token is not None or event.finish == "length"):
                    stream.first = now
                    began.append(stream.demand)
            if len(stream.finishes) > finishes:
                ended.append((stream, len(stream.finishes) - finishes))
        self._generated.inc(tokens)
        for gap, count in gaps.items():
            self.metrics.between.observe(self.name, gap, count)
        if began:
            self.door.began(began, now)
        for stream, choices in ended:
            self._end(stream, choices, now)
        for stream, events in told.items():
            stream.tell([(index, event) for _, index, event in events])

    def _end(self, stream: Stream, choices: int, now: float) -> None:
        """So many choices of a stream have ended."""
        self.door.ended(stream.demand, choices, now)
        self.used = now
        if stream.open:
            return
        stream.ended = now
        self.streams.discard(stream)
        if stream.started is not None and stream.first is not None and {"stop", "length"} >= set(stream.finishes):
            self.metrics.queue.labels(self.name).observe(stream.started - stream.arrived)
            self.metrics.prefill.labels(self.name).observe(stream.first - stream.started)
            self.metrics.first.labels(self.name).observe(stream.first - stream.arrived)
            self.metrics.whole.labels(self.name).observe(now - stream.arrived)

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        engine = self.model.engine
        while not self._stopping:
            self._wake.clear()
            while self._posted:
                what, stream = self._posted.popleft()
                if what == "add":
                    self._add(engine, stream)
                else:
                    for id in self._ids.get(stream, ()):
                        engine.cancel(id)
            if engine.busy:
                self._step(engine)
            else:
                self._wake.wait()
        for id in self._choices:
            engine.cancel(id)
        while engine.busy:
            self._step(engine)

    def _add(self, engine: EngineProtocol, stream: Stream) -> None:
        ids: list[int] = []
        failure: Exception | None = None
        try:
            for request in stream.requests:
                ids.append(engine.add(request))
        except Exception as error:
            failure = error
            for id in ids:
                engine.cancel(id)
        else:
            self._ids[stream] = set(ids)
            self._choices |= {id: (stream, index) for index, id in enumerate(ids)}
            self._unstarted |= dict.fromkeys(ids, stream)
            self._silent.add(stream)
        self._loop.call_soon_threadsafe(stream.take, failure)

    def _step(self, engine: EngineProtocol) -> None:
        begun = time.perf_counter()
        try:
            events = engine.step()
        except Exception as failure:  # the engine's own mistake: end what was in it, and go on with what comes
            log.exception("the engine failed")
            reason = f"{type(failure).__name__}: {failure}"
            events = [Event(id, None, "", "error", error=reason) for id in self._choices]
            for id in self._choices:
                engine.cancel(id)
        if self._unstarted:  # they start in order of arrival, once those that were preempted run again
            for id in list(self._unstarted)[: max(0, len(self._unstarted) - engine.load.waiting)]:
                stream = self._unstarted.pop(id)
                stream.started = stream.started or begun
        now = time.perf_counter()
        urgent: set[Stream] = set()
        for event in events:
            if (choice := self._choices.get(event.request)) is None:
                continue
            stream, index = choice
            self._untold.setdefault(stream, []).append((now, index, event))
            if stream in self._silent:
                urgent.add(stream)
                self._silent.remove(stream)
            if event.finish is not None:
                urgent.add(stream)
                del self._choices[event.request]
                ids = self._ids[stream]
                ids.discard(event.request)
                self._unstarted.pop(event.request, None)
                if not ids:
                    del self._ids[stream]
        if now - self._told + (now - begun) / 2 > _TOGETHER:  # the next step would end further from it
            told, self._untold, self._told = self._untold, {}, now
        else:
            told = {stream: self._untold.pop(stream) for stream in urgent}
        if told:
            self._loop.call_soon_threadsafe(self._tell, told, now, engine.load)


def measure(model: Model) -> float:
    """Tokens a second of a prompt, so that the first who come are not promised too much; it also wakes the model up."""
    tokens = min(_TRIAL, model.engine.context - 1)
    begun = time.perf_counter()
    for _ in model.engine.run(Request((model.tokenizer.eos_id or 0,) * tokens, max_tokens=1)):
        pass
    return tokens / (time.perf_counter() - begun)


def _fingerprint(model: Model) -> str:
    """Changes whenever equal requests may get other answers."""
    path = model.checkpoint.path
    engine = type(model.engine).__name__
    what = f"{llama2.__version__} {engine} {native.module().__name__} {path.resolve()} {path.stat().st_mtime_ns}"
    return "fp_" + hashlib.sha256(what.encode()).hexdigest()[:12]
