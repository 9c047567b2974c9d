"""A process of its own for what may take any time or memory, because it works on what a stranger wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from threading import Event, Lock, Timer
from typing import Any
from weakref import finalize

from llama2.errors import Llama2Error

_START_SECONDS = 20.0


class Worker:
    """Runs a `script` that prints `ready`, then answers each line of JSON with one, until it has to be killed.

    The process starts with the first request, and again after its end. It ends with `close`, or with this object.
    `failure` makes the exception for a reason.
    """

    def __init__(self, script: str, failure: Callable[[str], Llama2Error]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: finalize[..., Worker] | None = None
        self._script = script
        self._failure = failure
        self._lock = Lock()
        self._owner = os.getpid()

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The running process, None before it starts."""
        self._notice_fork()
        return self._process

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to `request`. Raises `failure` when it takes longer than `seconds`, or the process dies of it."""
        line = json.dumps(request).encode() + b"\n"
        self._notice_fork()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._exchange(line, seconds)
        if not answer:
            raise self._failure(f"it took more than {seconds:g} s or too much memory, and was stopped")
        return json.loads(answer)

    def close(self) -> None:
        """End the process, if it runs."""
        self._notice_fork()
        if self._ending is not None:
            self._ending()
        self._process = self._ending = None

    def _notice_fork(self) -> None:
        """After a fork the process is the parent's, and so is who holds the lock."""
        if self._owner != os.getpid():
            if self._ending is not None:
                self._ending.detach()
            self._process, self._ending, self._lock, self._owner = None, None, Lock(), os.getpid()

    def _start(self) -> None:
        self.close()
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", self._script], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise self._failure(f"cannot start a process for it: {error}") from None
        self._ending = finalize(self, _end, self._process, self._owner)
        if not self._exchange(b"", _START_SECONDS):
            raise self._failure("the process for it does not start")

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        """The process's next line after `line` was sent; empty if it died, which it does after `seconds`."""
        process: Any = self._process
        killed = Event()

        def kill() -> None:
            killed.set()
            process.kill()

        timer = Timer(seconds, kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer: bytes = process.stdout.readline()
        except OSError:
            answer = b""
        timer.cancel()
        timer.join()
        if killed.is_set() or not answer.endswith(b"\n"):
            self.close()
            return b""
        return answer


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a process, unless it belongs to the parent of this one."""
    if owner == os.getpid():
        process.kill()
        process.communicate()
