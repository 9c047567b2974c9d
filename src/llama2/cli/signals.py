"""Signals while a command works."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `act` within the block, instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-Break raise SystemExit within the block, so that unfinished files are removed."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP", "SIGBREAK")  # of which no system has all
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
