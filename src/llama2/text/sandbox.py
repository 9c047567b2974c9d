"""Renders a chat template in Jinja's sandbox; as a program, does so for a parent that can kill it.

The sandbox keeps a template from Python's internals, but not from time and memory. So an unknown template
runs in this file as a process of its own. It takes one JSON request a line on stdin, and writes one JSON answer a line
on stdout. It
imports nothing of the package, to start quickly.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

#: Memory of the process, where the system can bound it. It needs a fifth of that to start.
MEMORY = 256 << 20
#: A process ends itself after so many seconds of one request, should its parent be gone.
ALARM = 5


@lru_cache(maxsize=8)
def compile_template(source: str) -> Any:
    """The template of a Jinja `source`, with what Hugging Face's templates expect to find."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}…{% endgeneration %}` is around an answer for training; it renders as what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise ValueError(f"it refuses the dialog: {message}")

    def tojson(
        x: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    prefixes: Sequence[tuple[int, bool]],
    variables: Mapping[str, Any],
    limit: int,
) -> list[str]:
    """What the template `source` writes for each of `prefixes`: so many messages, and whether an answer is requested.

    Raises ValueError with the reason when it is malformed, forbidden, refuses, or writes more than `limit` characters.
    """
    try:
        template = compile_template(source)
        texts = []
        for count, prompts in prefixes:
            context = {**variables, "messages": messages[:count], "add_generation_prompt": prompts}
            texts.append("".join(_bounded(template.generate(context), limit)))
        return texts
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"it uses too much memory or recursion ({type(error).__name__})") from None
    except Exception as error:  # a template can raise anything that Python can
        raise ValueError(str(error) or type(error).__name__) from None


def attempt(source: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """`render`'s texts, or its error in one line."""
    try:
        return {"texts": render(source, **job)}
    except ValueError as error:
        return {"error": " ".join(str(error)[:400].split())}


def _bounded(parts: Iterator[str], limit: int) -> Iterator[str]:
    for part in parts:
        limit -= len(part)
        if limit < 0:
            raise ValueError("it writes more text than its limit allows")
        yield part


def serve(answer: Callable[[Any], Any], memory: int, seconds: int = ALARM) -> None:
    """Print `ready`, then the `answer` to each line of JSON until stdin ends, in an address space of `memory` bytes.

    `answer` must have imported what it needs, because the parent's clock runs from the first line on. The process ends
    itself after so many `seconds` of one request.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    alarm = getattr(signal, "alarm", _Alarm().set)
    limit_memory(memory)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        alarm(seconds)
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
        alarm(0)


class _Alarm:
    """Ends the process where the system has no alarm. It needs Python's lock, which all but a library's loop gives."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def set(self, seconds: int) -> None:
        """End the process in so many seconds; 0: do not."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, os._exit, [1]) if seconds else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()


def limit_memory(memory: int) -> None:
    """Let this process have `memory` bytes at most: of address space, on Windows of memory that it commits.

    Raises OSError where Windows refuses. macOS has no such limit.
    """
    if sys.platform == "win32":
        _limit_by_job(memory)
        return
    import resource

    with suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


class JobLimits(ctypes.Structure):
    """Windows' JOBOBJECT_EXTENDED_LIMIT_INFORMATION, with its parts in a row: 144 bytes."""

    _fields_ = (
        ("process_time", ctypes.c_int64),
        ("job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("least_working_set", ctypes.c_size_t),
        ("most_working_set", ctypes.c_size_t),
        ("processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    )


#: JOB_OBJECT_LIMIT_PROCESS_MEMORY, and JOB_OBJECT_LIMIT_ACTIVE_PROCESS, as another process would have as much again.
JOB_FLAGS = 0x100 | 0x8
#: JobObjectExtendedLimitInformation
_EXTENDED = 9


def _limit_by_job(memory: int) -> None:
    """Put this process into a Job Object. Its handle stays open, and so the job lasts as long as the process."""
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = ctypes.c_void_p
    job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
    limits = JobLimits(flags=JOB_FLAGS, processes=1, process_memory=memory)
    here = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not (
        kernel.SetInformationJobObject(job, _EXTENDED, ctypes.byref(limits), ctypes.sizeof(limits))
        and kernel.AssignProcessToJobObject(job, here)
    ):
        raise ctypes.WinError(ctypes.get_last_error())  # type: ignore[attr-defined]


if __name__ == "__main__":
    render("", [], [], {}, 0)  # imports Jinja
    serve(lambda request: [attempt(request["source"], job) for job in request["jobs"]], MEMORY)
