"""One thread for each loaded model, which owns its engine; and the streams by which coroutines follow its events.

Coroutines never touch the engine: it holds its lock for a whole step. They post what is to be added or cancelled, and
the thread hands all events of a step to the event loop at once.
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
from llama2.engine.request import Event, Request
from llama2.serve.tokens import Texts

log = logging.getLogger("llama2.serve")

#: A step's news of one choice: its index among the stream's requests, and the event.
News = tuple[int, Event]


class Stream:
    """The events of one HTTP request's choices, batched as they come. For the event loop's thread alone.

    Close it when nobody wants the rest: what still runs is cancelled.
    """

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.arrived = time.perf_counter()
        self.first: float | None = None  # when the first token came
        self.last = self.arrived  # when the last token came
        self._service = service
        self._pending: list[News] = []
        self._open = len(requests)  # choices whose last event has not come
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def accepted(self) -> None:
        """Wait until the engine has taken the requests. Raises its ContextError or RequestError."""
        while not self._pending and self._failure is None and not self._taken:
            await self._wait()
        if self._failure is not None:
            raise self._failure

    _taken = False

    async def batches(self, patience: float | None = None) -> AsyncIterator[list[News]]:
        """The events in batches, until every choice has finished; an empty batch after `patience` seconds without."""
        while self._open or self._pending:
            if not self._pending:
                await self._wait(patience)
            batch, self._pending = self._pending, []
            yield batch

    def close(self) -> None:
        """Cancel what still runs; a second time is no error."""
        if self._open:
            self._service.cancel(self)

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

    def take(self) -> None:
        """The engine has accepted every request."""
        self._taken = True
        self._wake()

    def refuse(self, failure: Exception) -> None:
        """The engine has accepted none of the requests."""
        self._failure, self._open = failure, 0
        self._wake()

    def tell(self, news: list[News]) -> None:
        """Events of a step."""
        self._pending += news
        self._open -= sum(event.finish is not None for _, event in news)
        self._wake()


class Service:
    """A model that answers requests from coroutines. Start it in the event loop's thread; `stop` waits for its end."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.texts = Texts(model.tokenizer)
        self.fingerprint = _fingerprint(model)
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[str, Stream]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._streams: dict[int, tuple[Stream, int]] = {}  # of the thread alone
        self._ids: dict[Stream, list[int]] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Start several answers together. Raises ContextError or RequestError, and then none is started."""
        stream = Stream(self, requests)
        self._post("add", stream)
        await stream.accepted()
        return stream

    def cancel(self, stream: Stream) -> None:
        """End what still runs of a stream; its cache is freed within a step."""
        self._post("cancel", stream)

    def stop(self) -> None:
        """End the thread; what still runs is told to be cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _post(self, what: str, stream: Stream) -> None:
        self._posted.append((what, stream))
        self._wake.set()

    def _work(self) -> None:
        engine = self.model.engine
        while not self._stopping:
            self._wake.clear()
            while self._posted:
                what, stream = self._posted.popleft()
                if what == "add":
                    self._add(stream)
                else:
                    for id in self._ids.get(stream, ()):
                        engine.cancel(id)
            if engine.busy:
                self._step()
            else:
                self._wake.wait()
        for id in list(self._streams):
            engine.cancel(id)
        if engine.busy:
            self._step()

    def _add(self, stream: Stream) -> None:
        ids: list[int] = []
        try:
            for request in stream.requests:
                ids.append(self.model.engine.add(request))
        except Exception as failure:
            for id in ids:
                self.model.engine.cancel(id)
            self._loop.call_soon_threadsafe(stream.refuse, failure)
            return
        self._ids[stream] = ids
        self._streams |= {id: (stream, index) for index, id in enumerate(ids)}
        self._loop.call_soon_threadsafe(stream.take)

    def _step(self) -> None:
        try:
            events = self.model.engine.step()
        except Exception as failure:  # the engine's own mistake: end what was in it, and go on with what comes
            log.exception("engine step failed")
            for id in self._streams:
                self.model.engine.cancel(id)
            reason = f"{type(failure).__name__}: {failure}"
            events = [Event(id, None, "", "error", error=reason) for id in self._streams]
        news: dict[Stream, list[News]] = {}
        for event in events:
            if event.request not in self._streams:
                continue
            stream, index = self._streams[event.request]
            news.setdefault(stream, []).append((index, event))
            if event.finish is not None:
                del self._streams[event.request]
                ids = self._ids[stream]
                ids.remove(event.request)
                if not ids:
                    del self._ids[stream]
        if news:
            self._loop.call_soon_threadsafe(_tell, news)


def _tell(news: dict[Stream, list[News]]) -> None:
    for stream, events in news.items():
        stream.tell(events)


def _fingerprint(model: Model) -> str:
    """Changes whenever equal requests may get other answers."""
    path = model.checkpoint.path
    what = f"{llama2.__version__} {native.module().__name__} {path.resolve()} {path.stat().st_mtime_ns}"
    return "fp_" + hashlib.sha256(what.encode()).hexdigest()[:12]
