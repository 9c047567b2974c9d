"""Progress of a command on standard error, with the time left."""

from __future__ import annotations

import sys
import time

from llama2.console import rewrite, say


class Bar:
    """Progress on standard error, with the time left: a line that is rewritten, or outside a terminal, one in 10 s."""

    def __init__(self) -> None:
        self._rewrites = sys.stderr.isatty()
        self._what, self._start, self._first = "", 0.0, 0
        self._last = 0.0 if self._rewrites else time.monotonic()  # when it was shown

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._first = what, now, done
        ended = done == total
        if now - self._last < (0.2 if self._rewrites else 10) and not ended:
            return
        self._last = now
        speed = (done - self._first) / (now - self._start) if now > self._start else 0
        left = f"  {clock((total - done) / speed)} left" if speed else ""
        text = f"{what}  {done:,}/{total:,}{left}"
        if self._rewrites:
            rewrite(text, ended=ended)
        else:
            say(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
