"""Who is let in: the time to the first token is predicted at the door, from what was measured.

Work that is waiting divided by the measured rate of prefill, decoding beside it included; and where every place is
taken, how fast places become free. A rate that is not known yet refuses nobody.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from llama2.serve.errors import Refusal

#: How much an earlier measurement counts when another one comes.
_MEMORY = 0.9
#: Finishing answers of which the rate is taken.
_FINISHES = 64


@dataclass(slots=True)
class Demand:
    """What the door knows of one request."""

    tokens: int  # of its prompts
    choices: int
    arrived: float
    queued: bool = False  # whether it has to wait for a place
    waiting: bool = True  # for its first token


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
class Door:
    """Predicts, and refuses what cannot be in time. Every method is told the time, in seconds of one clock."""

    max_queue: int
    max_wait: float
    places: int  # choices that run at once
    prefill: Rate = field(default_factory=Rate)
    waiting: list[Demand] = field(default_factory=list)
    running: int = 0  # choices that were admitted and have not ended
    _finishes: deque[float] = field(default_factory=lambda: deque(maxlen=_FINISHES))
    _last_first: float = -math.inf
    _promised: float = -math.inf  # when the client that was refused last may come back

    def seconds(self, tokens: int, choices: int, now: float) -> float:
        """Predicted time to the first token of such a request."""
        rate = self.prefill.value
        ahead: float = sum(demand.tokens for demand in self.waiting)
        if self.waiting and rate:
            ahead = max(0.0, ahead - rate * (now - max(self._last_first, self.waiting[0].arrived)))
        prefill = (ahead + tokens) / rate if rate else 0.0
        over = self.running + choices - self.places
        free = self._free_rate()
        if over <= 0 or not free:
            return prefill
        return max(prefill, over / free + (tokens / rate if rate else 0.0))

    def enter(self, tokens: int, choices: int, now: float, *, refuse: bool = True) -> Demand:
        """Let a request in; unless `refuse` is false, raises Refusal 429, which tells when to come back."""
        wait = self.seconds(tokens, choices, now)
        if not refuse:
            pass
        elif len(self.waiting) >= self.max_queue:
            back = max(0.0, wait - self.max_wait, self._each(tokens, choices))
            raise self._refusal(f"{len(self.waiting)} requests are waiting already", back, tokens, choices, now)
        elif wait > self.max_wait:
            reason = f"the first token would come after {wait:.1f} s, and the limit is {self.max_wait:g} s"
            raise self._refusal(reason, wait - self.max_wait, tokens, choices, now)
        demand = Demand(tokens, choices, now, queued=self.running + choices > self.places)
        self.waiting.append(demand)
        self.running += choices
        return demand

    def began(self, demands: list[Demand], now: float) -> None:
        """First tokens came, in one step."""
        since = max(self._last_first, min(demand.arrived for demand in demands))
        if not any(demand.queued for demand in demands) and now > since:
            self.prefill.add(sum(demand.tokens for demand in demands), now - since)
        self._last_first = now
        for demand in demands:
            demand.waiting = False
            self.waiting.remove(demand)

    def ended(self, demand: Demand, choices: int, now: float) -> None:
        """So many choices of a request ended, after its first token or before."""
        if self.running > self.places:
            self._finishes.extend([now] * choices)
        elif self.running < self.places // 2:
            self._finishes.clear()  # places were free for a while, so the times between say nothing
        self.running -= choices
        demand.choices -= choices
        if not demand.choices and demand.waiting:
            demand.waiting = False
            self.waiting.remove(demand)

    def _free_rate(self) -> float | None:
        """Places that become free per second, where all are taken."""
        times = self._finishes
        if len(times) < 2 or times[-1] <= times[0]:
            return None
        return (len(times) - 1) / (times[-1] - times[0])

    def _each(self, tokens: int, choices: int) -> float:
        """Seconds until the next such request may be let in, where they come one after another."""
        rate, free = self.prefill.value, self._free_rate()
        return max(tokens / rate if rate else 0.0, choices / free if free and self.running >= self.places else 0.0)

    def _refusal(self, reason: str, seconds: float, tokens: int, choices: int, now: float) -> Refusal:
        """Those who are refused together come back one after another, as fast as they can be served."""
        back = max(now + seconds, self._promised + self._each(tokens, choices))
        self._promised = back
        wait = back - now
        return Refusal(
            429,
            f"busy: {reason}; come back in {math.ceil(wait)} s",
            code="overloaded",
            type="rate_limit_error",
            headers={"Retry-After": str(max(1, math.ceil(wait))), "Retry-After-Ms": str(max(1, round(wait * 1000)))},
        )
