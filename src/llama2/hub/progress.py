"""How far a long step is: a callable, and the bar that is shown when the caller brings none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llama2.console import visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

#: Called with what is being done, the bytes done, and the bytes in all (0 when not known).
Progress = Callable[[str, int, int], None]


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """`progress` itself, or a bar on stderr that appears after one second and only in a terminal."""
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda *_: None)
        return
    start = time.monotonic()
    bars: Bars | None = None
    tasks = {}

    def show(what: str, done: int, total: int) -> None:
        nonlocal bars
        if time.monotonic() - start < 1:
            return
        bars = bars or _bars()
        if what not in tasks:
            tasks[what] = bars.add_task(visible(what))
        bars.update(tasks[what], completed=done, total=total or None)

    try:
        yield show
    finally:
        if bars is not None:
            bars.stop()


def _bars() -> Bars:
    """A running display; made only when there is something to show, because rich takes a while to import."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bars.start()
    return bars
