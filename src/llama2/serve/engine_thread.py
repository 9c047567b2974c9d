"""The thread that owns a model's engine. Nothing else uses the engine while it runs.

Other threads submit and cancel. The thread answers by two callbacks, which run in it. It calls `accepted` once the
engine has accepted or refused a submission, and `publish` with the events of a step. Events of short steps are
published together, because waking coroutines and sending costs as much as a step of a small model. The first event of
a submission and the end of a choice are published without delay.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import EngineStats, Event, Request

log = logging.getLogger("llama2.serve")

#: About so many seconds of tokens are published together, if steps are shorter.
_INTERVAL = 0.05

#: The time of a step, the index of a choice among its submission's requests, and the event.
TimedEvent = tuple[float, int, Event]


class Submission(Protocol):
    """Requests that start together, one for each choice."""

    requests: Sequence[Request]
    started: float | None  # when the first step began, by `time.perf_counter`


S = TypeVar("S", bound=Submission)


Accepted = Callable[[S, Exception | None], None]
Publish = Callable[[Mapping[S, Sequence[TimedEvent]], float, EngineStats], None]


class EngineThread(Generic[S]):
    """Runs an engine's steps. `stop` cancels running requests, and waits for the end of the thread."""

    def __init__(
        self,
        name: str,
        engine: EngineProtocol,
        accepted: Accepted[S],
        publish: Publish[S],
    ) -> None:
        self._engine = engine
        self._inbox: deque[tuple[str, S, int | None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._choices: dict[int, tuple[S, int]] = {}  # by the engine's id
        self._ids: dict[S, set[int]] = {}
        self._unstarted: dict[int, S] = {}  # by the engine's id, in order of arrival
        self._silent: set[S] = set()  # without a published event
        self._unpublished: dict[S, list[TimedEvent]] = {}
        self._published = 0.0  # when all events were last published
        # The callbacks belong to the thread alone, or their owner and this object would keep each other alive.
        self._thread = threading.Thread(
            target=self._run, args=(accepted, publish), name=f"engine of {name}", daemon=True
        )
        self._thread.start()

    def submit(self, submission: S) -> None:
        """Start its requests, all or none; `accepted` reports which."""
        self._post("submit", submission)

    def cancel(self, submission: S, index: int | None = None) -> None:
        """Cancel its running requests, or one of them. Their cache is freed after the current step."""
        self._post("cancel", submission, index)

    def stop(self) -> None:
        """End the thread. Running requests are published as cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _post(self, what: str, submission: S, index: int | None = None) -> None:
        self._inbox.append((what, submission, index))
        self._wake.set()

    # What follows runs in the thread.

    def _run(self, accepted: Accepted[S], publish: Publish[S]) -> None:
        while not self._stopping:
            self._wake.clear()
            while self._inbox:
                what, submission, index = self._inbox.popleft()
                if what == "submit":
                    accepted(submission, self._add(submission))
                else:
                    for id in self._ids.get(submission, ()):
                        if index in (None, self._choices[id][1]):
                            self._engine.cancel(id)
            if self._engine.busy:
                self._step(publish)
            else:
                self._wake.wait()
        for id in self._choices:
            self._engine.cancel(id)
        while self._engine.busy:
            self._step(publish)

    def _add(self, submission: S) -> Exception | None:
        """Add its requests to the engine, all or none; returns the error if none."""
        ids: list[int] = []
        failure: Exception | None = None
        try:
            for request in submission.requests:
                ids.append(self._engine.add(request))
        except Exception as error:
            failure = error
            for id in ids:
                self._engine.cancel(id)
        else:
            self._ids[submission] = set(ids)
            self._choices |= {id: (submission, index) for index, id in enumerate(ids)}
            self._unstarted |= dict.fromkeys(ids, submission)
            self._silent.add(submission)
        return failure

    def _step(self, publish: Publish[S]) -> None:
        begun = time.perf_counter()
        try:
            events = self._engine.step()
        except Exception as failure:  # an error of the engine: end all requests, and continue with new ones
            log.exception("the engine failed")
            reason = f"{type(failure).__name__}: {failure}"
            events = [Event(id, None, "", "error", error=reason) for id in self._choices]
            for id in self._choices:
                self._engine.cancel(id)
        if self._unstarted:  # they start in order of arrival, after the preempted ones
            for id in list(self._unstarted)[: max(0, len(self._unstarted) - self._engine.stats.waiting)]:
                submission = self._unstarted.pop(id)
                submission.started = submission.started or begun
        now = time.perf_counter()
        urgent = self._sort(events, now)
        if now - self._published + (now - begun) / 2 > _INTERVAL:  # the next step would end further from the interval
            ready, self._unpublished, self._published = self._unpublished, {}, now
        else:
            ready = {submission: self._unpublished.pop(submission) for submission in urgent}
        if ready:
            publish(ready, now, self._engine.stats)

    def _sort(self, events: Sequence[Event], now: float) -> set[S]:
        """Add events to their submissions, and return the submissions whose events must not wait."""
        urgent: set[S] = set()
        for event in events:
            if (choice := self._choices.get(event.request)) is None:
                continue
            submission, index = choice
            self._unpublished.setdefault(submission, []).append((now, index, event))
            if submission in self._silent:
                urgent.add(submission)
                self._silent.remove(submission)
            if event.finish is not None:
                urgent.add(submission)
                del self._choices[event.request]
                ids = self._ids[submission]
                ids.discard(event.request)
                self._unstarted.pop(event.request, None)
                if not ids:
                    del self._ids[submission]
        return urgent
