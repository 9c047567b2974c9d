"""Admission: the time to a first token is predicted from measured rates, and a request that would be late is refused.

The prediction is the waiting work divided by the rate of prefill, which includes decoding beside it. If every slot is
taken, it is the time until slots become free. Their rate is slots divided by the duration of an answer (Little's law),
even if answers end in waves. Without a measured rate, no request is refused.

Predictions err, since many requests run more slowly than the few by which the rates were measured. So a prediction is
multiplied by the ratio of real to predicted waits. A crowd begins with a prior ratio, until its first waits are over.

With no work ahead, a request is admitted however long it takes. One whose own prefill alone would be late is refused
for good while others are served, because coming back does not help it.

A refusal reserves a slot at the time that it names. While refused requests are still to come back, others are admitted
only if their wait is short. The reservation ends with a grace period. A request that comes back early keeps its
reservation, and gets no second one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llama2.serve.errors import Refusal

#: How much an earlier measurement counts when another one comes.
_MEMORY = 0.9

#: The most reservations, and the seconds for which one is kept after its time.
_RESERVATIONS, _GRACE = 4096, 2.0

#: Shares of the longest wait: for requests that come back, and for others while some are to come back.
_PLANNED, _OTHERS = 0.6, 0.5

#: Real waits divided by predicted ones: the largest ratio that is used, and the prior with its weight in seconds.
_MAX_ERROR, _PRIOR_ERROR, _PRIOR_WEIGHT = 2.0, 1.7, 8.0


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One request, from admission to the end of its choices."""

    tokens: int  # of its prompts
    choices: int
    arrived: float
    predicted: float | None = None  # seconds to its first token, if other work is ahead
    queued: bool = False  # whether it waits for a slot
    began: float | None = None  # when its first token came


@dataclass(slots=True)
class Rate:
    """A moving average of amounts per second; None before the first."""

    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """An amount in so many seconds."""
        self.amount = self.amount * _MEMORY + amount
        self.seconds = self.seconds * _MEMORY + seconds

    @property
    def value(self) -> float | None:
        """Amount per second."""
        return self.amount / self.seconds if self.seconds > 0 else None


def _prior_waits() -> Rate:
    return Rate(_PRIOR_ERROR * _PRIOR_WEIGHT, _PRIOR_WEIGHT)


@dataclass
class AdmissionController:
    """Predicts waits, and refuses requests that would be late. `now` is in seconds of one clock."""

    max_queue: int
    max_wait: float
    slots: int  # choices that run at once
    prefill: Rate = field(default_factory=Rate)  # tokens
    ending: Rate = field(default_factory=Rate)  # choices, of one slot
    waits: Rate = field(default_factory=_prior_waits)  # real seconds per predicted one
    waiting: list[PendingRequest] = field(default_factory=list)  # for their first tokens
    answering: list[PendingRequest] = field(default_factory=list)  # since their first tokens, in that order
    running: int = 0  # choices that were admitted and have not ended
    _last_first: float = -math.inf
    _reserved_until: float = -math.inf  # the time of the last reservation
    _reservations: dict[int, float] = field(default_factory=dict)  # times by key, soonest first

    def seconds(self, tokens: int, choices: int, now: float) -> float:
        """Predicted time to the first token of such a request: the work ahead times the error of predictions."""
        return self._work(tokens, choices, now) * self._error

    @property
    def _error(self) -> float:
        """How many times longer than its prediction a wait is."""
        return min(max(1.0, self.waits.value or 1.0), _MAX_ERROR)

    def _work(self, tokens: int, choices: int, now: float) -> float:
        """That time by the measured rates alone."""
        rate = self.prefill.value
        ahead: float = sum(pending.tokens for pending in self.waiting)
        if self.waiting and rate:
            ahead = max(0.0, ahead - rate * (now - max(self._last_first, self.waiting[0].arrived)))
        prefill = (ahead + tokens) / rate if rate else 0.0
        over = self.running + choices - self.slots
        free = self._free_rate(now)
        if over <= 0 or not free:
            return prefill
        return max(prefill, over / free + (tokens / rate if rate else 0.0))

    def admit(
        self, tokens: int, choices: int, now: float, *, refuse: bool = True, key: int | None = None
    ) -> PendingRequest:
        """Admit a request. Unless `refuse` is false, raises Refusal: 429 with the time to come back, or 400.

        A request that was refused before is recognised by its `key`.
        """
        work = self._work(tokens, choices, now)
        wait = work * self._error
        rate = self.prefill.value
        own = tokens / rate if rate else 0.0
        unobstructed = not self.waiting and self.running + choices <= self.slots
        while self._reservations and (first := next(iter(self._reservations.items())))[1] < now - _GRACE:
            del self._reservations[first[0]]
        returning = key is not None and self._reservations.get(key, math.inf) <= now
        limit = self.max_wait * (_OTHERS if self._reservations and not returning else 1)
        if not refuse or unobstructed:
            pass
        elif own > self.max_wait:
            raise Refusal(
                400,
                f"the prompt's {tokens} tokens take {own:.0f} s, and --max-wait, while others wait, is "
                f"{self.max_wait:g} s; shorten it",
                code="prompt_too_slow",
            )
        elif len(self.waiting) >= self.max_queue:
            back = max(0.0, wait - _PLANNED * self.max_wait, self._each(tokens, choices, now))
            raise self._refusal(f"{len(self.waiting)} requests are waiting already", back, tokens, choices, now, key)
        elif wait > limit:
            reason = f"the first token would come after {wait:.1f} s, and the limit is {limit:g} s"
            raise self._refusal(reason, max(0.0, wait - _PLANNED * self.max_wait), tokens, choices, now, key)
        if key is not None:
            self._reservations.pop(key, None)
        pending = PendingRequest(tokens, choices, now, queued=self.running + choices > self.slots)
        if not unobstructed:
            pending.predicted = work
        elif not self._reservations:  # what waits from now on is another crowd
            self.waits = _prior_waits()
        self.waiting.append(pending)
        self.running += choices
        return pending

    def began(self, pending_requests: list[PendingRequest], now: float) -> None:
        """First tokens came, in one step."""
        since = max(self._last_first, min(pending.arrived for pending in pending_requests))
        if not any(pending.queued for pending in pending_requests) and now > since:
            self.prefill.add(sum(pending.tokens for pending in pending_requests), now - since)
        self._last_first = now
        for pending in pending_requests:
            if pending.predicted:
                self.waits.add(now - pending.arrived, pending.predicted)
            pending.began = now
            self.waiting.remove(pending)
            self.answering.append(pending)

    def ended(self, pending: PendingRequest, choices: int, now: float) -> None:
        """Some choices of a request ended, after its first token or before."""
        self.running -= choices
        pending.choices -= choices
        if pending.began is not None and now > pending.began:
            self.ending.add(choices, choices * (now - pending.began))
        if not pending.choices:
            (self.waiting if pending.began is None else self.answering).remove(pending)

    def _free_rate(self, now: float) -> float | None:
        """Slots that become free per second, if all are taken."""
        rate = self.ending.value
        if rate is None and self.answering and self.answering[0].began is not None and now > self.answering[0].began:
            rate = 1 / (now - self.answering[0].began)  # an answer takes at least so long
        return None if rate is None else self.slots * rate

    def _each(self, tokens: int, choices: int, now: float) -> float:
        """Seconds between two such requests that are admitted one after another."""
        rate, free = self.prefill.value, self._free_rate(now)
        each = max(tokens / rate if rate else 0.0, choices / free if free and self.running >= self.slots else 0.0)
        return each * self._error

    def _refusal(self, reason: str, seconds: float, tokens: int, choices: int, now: float, key: int | None) -> Refusal:
        """The refusal with a reservation: requests come back one after another, as fast as they can be served.

        A request that comes back early gets the time of its reservation.
        """
        reserved = None if key is None else self._reservations.get(key)
        if reserved is not None and reserved > now:
            back = reserved
        else:
            back = max(now + seconds, self._reserved_until + self._each(tokens, choices, now))
            self._reserved_until = back
        if key is not None and len(self._reservations) < _RESERVATIONS:
            self._reservations.pop(key, None)
            self._reservations[key] = back
        wait = back - now
        return Refusal(
            429,
            f"busy: {reason}; come back in {math.ceil(wait)} s",
            code="overloaded",
            type="rate_limit_error",
            headers={"Retry-After": str(max(1, math.ceil(wait))), "Retry-After-Ms": str(max(1, round(wait * 1000)))},
        )
