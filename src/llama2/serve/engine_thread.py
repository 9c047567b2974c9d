"""The thread that owns a model's engine. Nothing else touches the engine while it runs.

Other threads submit and cancel. The thread answers through two callbacks, which run in it: `accepted` once a submission
is in the engine, or was refused by it, and `publish` with the events of a step. Events of short steps are published
together, because waking coroutines and sending costs as much as a step of a small model. The first event of a
submission and the end of a choice are published without delay.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from llama2.engine.protocol import EngineProtocol
from llama2.engine.request import Event, Load, Request

log = logging.getLogger("llama2.serve")

#: Seconds of tokens that are published together, about, where steps are shorter.
_INTERVAL = 0.05

#: The time of a step, the index of a choice among its submission's requests, and the event.
TimedEvent = tuple[float, int, Event]


class Submission(Protocol):
    """Requests that start together, one for each choice."""

    requests: Sequence[Request]
    started: float | None  # when the first step began, by `time.perf_counter`


S = TypeVar("S", bound=Submission)


Accepted = Callable[[S, Exception | None], None]
Publish = Callable[[Mapping[S, Sequence[TimedEvent]], float, Load], None]


class EngineThread(Generic[S]):
    """Runs an engine's steps. `stop` cancels what still runs, and waits for the end of the thread."""

    def __init__(
        self,
        name: str,
        engine: EngineProtocol,
        accepted: Accepted[S],
        publish: Publish[S],
    ) -> None:
        self._engine = engine
        self._inbox: deque[tuple[str, S]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._choices: dict[int, tuple[S, int]] = {}  # by the engine's id
        self._ids: dict[S, set[int]] = {}
        self._unstarted: dict[int, S] = {}  # by the engine's id, in order of arrival
        self._silent: set[S] = set()  # of which nothing was published
        self._unpublished: dict[S, list[TimedEvent]] = {}
        self._published = 0.0  # when all of them last were
        # The callbacks belong to the thread alone, or their owner and this object would keep each other alive.
        self._thread = threading.Thread(
            target=self._run, args=(accepted, publish), name=f"engine of {name}", daemon=True
        )
        self._thread.start()

    def submit(self, submission: S) -> None:
        """Start its requests, all or none; `accepted` says which."""
        self._post("submit", submission)

    def cancel(self, submission: S) -> None:
        """End what still runs of it. Its cache is freed when the step that runs is over."""
        self._post("cancel", submission)

    def stop(self) -> None:
        """End the thread. What still runs is published as cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _post(self, what: str, submission: S) -> None:
        self._inbox.append((what, submission))
        self._wake.set()

    # What follows runs in the thread.

    def _run(self, accepted: Accepted[S], publish: Publish[S]) -> None:
        while not self._stopping:
            self._wake.clear()
            while self._inbox:
                what, submission = self._inbox.popleft()
                if what == "submit":
                    accepted(submission, self._add(submission))
                else:
                    for id in self._ids.get(submission, ()):
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
        """Put its requests into the engine, all or none; returns why none."""
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
        except Exception as failure:  # the engine's own mistake: end what was in it, and go on with what comes
            log.exception("the engine failed")
            reason = f"{type(failure).__name__}: {failure}"
            events = [Event(id, None, "", "error", error=reason) for id in self._choices]
            for id in self._choices:
                self._engine.cancel(id)
        if self._unstarted:  # they start in order of arrival, once those that were preempted run again
            for id in list(self._unstarted)[: max(0, len(self._unstarted) - self._engine.load.waiting)]:
                submission = self._unstarted.pop(id)
                submission.started = submission.started or begun
        now = time.perf_counter()
        urgent = self._sort(events, now)
        if now - self._published + (now - begun) / 2 > _INTERVAL:  # the next step would end further from it
            ready, self._unpublished, self._published = self._unpublished, {}, now
        else:
            ready = {submission: self._unpublished.pop(submission) for submission in urgent}
        if ready:
            publish(ready, now, self._engine.load)

    def _sort(self, events: Sequence[Event], now: float) -> set[S]:
        """Put events to their submissions, and return those whose events may not wait."""
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
