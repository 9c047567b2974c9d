"""How far a long step is: a callable, and the bar that is shown when the caller brings none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with what is being done, the bytes done, and the bytes in all (0 when not known).
Progress = Callable[[str, int, int], None]


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """`progress` itself, or a bar on stderr that appears after one second and only in a terminal."""
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda *_: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks = {}
    start = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total or None)
        if not bars.live.is_started and time.monotonic() - start > 1:
            bars.start()

    try:
        yield show
    finally:
        bars.stop()
