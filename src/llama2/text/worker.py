"""A process of its own for what may take any time or memory, because it works on what a stranger wrote."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable
from threading import Event, Lock, Timer
from typing import Any

from llama2.errors import Llama2Error

_START_SECONDS = 20.0


class Worker:
    """Runs a `script` that says `ready`, then answers each line of JSON with one, until it has to be killed.

    It is started when it is first asked, and again after its end. `failure` makes the exception for a reason.
    """

    def __init__(self, script: str, failure: Callable[[str], Llama2Error]) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._script = script
        self._failure = failure
        self._lock = Lock()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to `request`. Raises `failure` when it takes longer than `seconds`, or the process dies of it."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            answer = self._exchange(line, seconds)
        if not answer:
            raise self._failure(f"it took more than {seconds} s or too much memory, and was stopped")
        return json.loads(answer)

    def close(self) -> None:
        """End the process; a second time is no error."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _forget(self) -> None:
        """After a fork: the process is the parent's, and so is whoever holds the lock."""
        self.process, self._lock = None, Lock()

    def _start(self) -> None:
        self.close()
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", self._script], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise self._failure(f"cannot start a process for it: {error}") from None
        if not self._exchange(b"", _START_SECONDS):
            raise self._failure("the process for it does not start")

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        """The process's next line after `line` was sent; empty if it died, which it does after `seconds`."""
        process: Any = self.process
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
