"""The interpreter's end, and what it must not interrupt.

At its end, the interpreter stops what daemon threads still do, wherever they are. Within a library of C++ or Rust that
gave the interpreter's lock away, that aborts the process. With a lock in hand, the end itself may wait for it. So what
does either is a section. The end waits for threads in one; a thread that enters one later waits until the process is
gone.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from threading import get_ident

#: What takes longer is not waited for.
_LONGEST = 60.0  # seconds

_inside: dict[int, int] = {}  # how deep a thread is in sections
_ending: int | None = None  # the thread that ends the interpreter
_registered = False


class Section:
    """A `with` that the interpreter's end does not interrupt; it may be nested. Enter it before a lock is taken."""

    def __enter__(self) -> None:
        if not _registered:
            _register()
        thread = get_ident()
        depth = _inside[thread] = _inside.get(thread, 0) + 1  # before it is asked whether the end came, not after
        if depth == 1 and _ending not in (None, thread):
            del _inside[thread]
            threading.Event().wait()  # until the process is gone

    def __exit__(self, *_: object) -> None:
        thread = get_ident()
        if _inside[thread] == 1:
            del _inside[thread]
        else:
            _inside[thread] -= 1


section = Section()


class EndsInSection:
    """What holds weights in objects of C++.

    The last of them closes the file, which gives the lock away for a moment. The interpreter's end must not come there:
    a destructor of C++ cannot be stopped half-way.
    """

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with section:
                self.__dict__.clear()


def _register() -> None:
    global _registered  # noqa: PLW0603
    _registered = True
    atexit.register(_end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_threads)


def _forget_threads() -> None:
    """In a forked process, which has none of its parent's threads but one."""
    for thread in [thread for thread in _inside if thread != get_ident()]:
        del _inside[thread]


def _end() -> None:
    global _ending  # noqa: PLW0603
    _ending = get_ident()
    latest = time.monotonic() + _LONGEST
    while any(thread != _ending for thread in list(_inside)) and time.monotonic() < latest:
        time.sleep(0.001)
