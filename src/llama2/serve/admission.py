"""Admission: the time to a first token is predicted from what was measured; a request that would be late is refused.

Work that is waiting divided by the measured rate of prefill, decoding beside it included; and where every slot is
taken, how fast slots become free: slots divided by how long an answer stays (Little's law), so that it does not
matter whether answers end in waves. A rate that is not known yet refuses nobody.

Where nothing is ahead, a request is admitted however long it takes. One that would be late by its own prefill alone is
refused for good while others are served, because coming back does not help it.

A refusal reserves a slot at the time that it names, so what comes later must not take it: while refused requests are
still to come back, others are admitted only where the wait is short all the same. Nothing is held for one that does not
come back in time. A request that comes back early keeps its reservation, and has no second one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llama2.serve.errors import Refusal

#: How much an earlier measurement counts when another one comes.
_MEMORY = 0.9

#: Refused requests that are known again, and for how many seconds after they may come back.
_RESERVATIONS, _GRACE = 4096, 2.0

#: Shares of the longest wait: what is planned for those who come back, as predictions err, and what is granted to
#: others while some are to come back.
_PLANNED, _OTHERS = 0.6, 0.5

#: How much longer than predicted waits are believed to be, at most, when that is what was seen.
_ERROR = 2.0


@dataclass(slots=True, eq=False)
class PendingRequest:
    """What admission knows of one request."""

    tokens: int  # of its prompts
    choices: int
    arrived: float
    predicted: float | None = None  # seconds to its first token, where it waits for a slot and rates are known
    queued: bool = False  # whether it has to wait for a slot
    began: float | None = None  # when its first token came


@dataclass(slots=True)
class Rate:
    """Amounts per second, later ones counting more; None before the first."""

    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """What was done in how long."""
        self.amount = self.amount * _MEMORY + amount
        self.seconds = self.seconds * _MEMORY + seconds

    @property
    def value(self) -> float | None:
        """Amount per second."""
        return self.amount / self.seconds if self.seconds > 0 else None


@dataclass
class AdmissionController:
    """Predicts, and refuses what cannot be in time. Every method is told the time, in seconds of one clock."""

    max_queue: int
    max_wait: float
    slots: int  # choices that run at once
    prefill: Rate = field(default_factory=Rate)  # tokens
    ending: Rate = field(default_factory=Rate)  # choices, of one slot
    waited: Rate = field(default_factory=Rate)  # seconds, of those that were predicted
    waiting: list[PendingRequest] = field(default_factory=list)  # for their first tokens
    answering: list[PendingRequest] = field(default_factory=list)  # since their first tokens, in that order
    running: int = 0  # choices that were admitted and have not ended
    _last_first: float = -math.inf
    _reserved_until: float = -math.inf  # when the client that was refused last may come back
    _reservations: dict[int, float] = field(default_factory=dict)  # by key: when it may come back; soonest first

    def seconds(self, tokens: int, choices: int, now: float) -> float:
        """Predicted time to the first token of such a request: what is to be done before, times how predictions err."""
        return self._work(tokens, choices, now) * self._error

    @property
    def _error(self) -> float:
        """How many times longer than the work before it a wait is."""
        return min(max(1.0, self.waited.value or 1.0), _ERROR)

    def _work(self, tokens: int, choices: int, now: float) -> float:
        """That time, if nothing but measured rates decided."""
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

        By its `key` a request is known again that was refused before.
        """
        work = self._work(tokens, choices, now)
        wait = work * self._error
        rate = self.prefill.value
        own = tokens / rate * self._error if rate else 0.0
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
        if pending.queued and self.ending.value:
            pending.predicted = work
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
                self.waited.add(now - pending.arrived, pending.predicted)
            pending.began = now
            self.waiting.remove(pending)
            self.answering.append(pending)

    def ended(self, pending: PendingRequest, choices: int, now: float) -> None:
        """So many choices of a request ended, after its first token or before."""
        self.running -= choices
        pending.choices -= choices
        if pending.began is not None and now > pending.began:
            self.ending.add(choices, choices * (now - pending.began))
        if not pending.choices:
            (self.waiting if pending.began is None else self.answering).remove(pending)

    def _free_rate(self, now: float) -> float | None:
        """Places that become free per second, where all are taken."""
        rate = self.ending.value
        if rate is None and self.answering and self.answering[0].began is not None and now > self.answering[0].began:
            rate = 1 / (now - self.answering[0].began)  # an answer takes at least so long
        return None if rate is None else self.slots * rate

    def _each(self, tokens: int, choices: int, now: float) -> float:
        """Seconds until the next such request may be let in, where they come one after another."""
        rate, free = self.prefill.value, self._free_rate(now)
        return max(tokens / rate if rate else 0.0, choices / free if free and self.running >= self.slots else 0.0)

    def _refusal(self, reason: str, seconds: float, tokens: int, choices: int, now: float, key: int | None) -> Refusal:
        """Those who are refused together come back one after another, as fast as they can be served.

        Who comes back early is told the time that was told before.
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
