"""A run's lock: one process at a time, or the processes of one torchrun, begin or continue a run.

The system's own lock on a file ends with its process, however that ends. It may not reach another machine, so the file
also says who has it, and its time changes every few seconds during the run. The library filelock has the system's
lock or a lease, not both. The first does not reach another machine; a killed process's lease delays `--resume`.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from llama2.errors import RunError
from llama2.records import Run, now
from llama2.train.processes import Processes, broadcast

LOCK = "lock"
#: Seconds between two signs of life, and how long one of another machine is waited for.
BEAT, WATCHED = 5.0, 30.0

_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_TRIES = 100


@contextmanager
def hold(folder: Path, dist: Processes, *, resume: bool) -> Iterator[None]:
    """Keep a run's folder to these processes; nothing is written before the lock is held.

    All processes call this. A lock whose process is gone is taken over; whether one of another machine is gone shows
    within WATCHED seconds. Raises RunError where another has the run, or there is one already, or none to `resume`.
    """
    with ExitStack() as stack:
        refused = None
        if dist.is_main:
            try:
                stack.enter_context(_held(folder, resume))
            except RunError as error:
                refused = str(error)
        if refused := broadcast(refused):
            raise RunError(refused)
        yield


@contextmanager
def _held(folder: Path, resume: bool) -> Iterator[None]:
    Run.look(folder, resume=resume)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    path = folder / LOCK
    try:
        try:
            descriptor = _take(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be locked ({error.strerror}); remove it, or choose another name") from None
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
        try:
            Run.look(folder, resume=resume)  # another process may have begun it in between
            _write(descriptor, json.dumps({**_self(), "pid": os.getpid(), "since": now()}))
            beating.start()
            yield
        finally:
            ended.set()
            with suppress(OSError):
                _write(descriptor, "")
                path.unlink()
            os.close(descriptor)
    finally:
        for each in made:  # where the run was refused before it began
            with suppress(OSError):
                each.rmdir()


def _take(path: Path) -> int:
    """The lock's file, open and locked. Raises RunError where another process has it, and OSError."""
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, _FLAGS, 0o666)
        except FileNotFoundError:  # another process ended, and took the empty folder with it
            continue
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RunError(f"{path}: is not a regular file; remove it, or choose another name")
            locked = _lock(descriptor)
            holder = _read(descriptor)
            elsewhere = bool(holder) and (not locked or holder.get("boot") != _self()["boot"])
            if locked is False or (elsewhere and _beats(path)):
                raise RunError(
                    f"{path.parent}: process {holder.get('pid', '?')} on {holder.get('host', '?')} has this run since "
                    f"{holder.get('since', '?')}; wait for its end, or choose another name"
                )
            if _is(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a process that ended in between and removed it
    raise RunError(f"{path}: cannot be locked; choose another folder for runs")


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool | None:
    """Lock an open file: False where another process has; None where the system or the file system cannot."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _self() -> dict[str, str]:
    """This machine: its name, and an id of this start of its system."""
    name = socket.gethostname()
    try:
        return {"host": name, "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()}
    except OSError:
        return {"host": name, "boot": name}


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _read(descriptor: int) -> dict[str, Any]:
    """Who has the lock, as far as its file says."""
    try:
        value = json.loads(os.read(descriptor, 1 << 12))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _beat(path: Path, ended: threading.Event) -> None:
    """Show that the process lives, until the run has ended."""
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _beats(path: Path) -> bool:
    """Whether the file's time changes while it is watched; by its own clock, since two machines' may differ."""
    try:
        before = path.stat().st_mtime_ns
        until = time.monotonic() + WATCHED
        while time.monotonic() < until:
            time.sleep(min(1.0, WATCHED))
            with path.open("rb") as file:  # which lets a network's file system look again
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
    except OSError:
        pass
    return False
