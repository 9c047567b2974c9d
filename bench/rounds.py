"""Rounds: programs that are compared run one right after the other, and only on cores that are really theirs.

A shared machine changes speed from second to second, above all when its host runs two virtual cores on one real one, or
when other processes run beside. So each program comes first in turn, the cores are probed around each, and what others
did meanwhile is counted. A round in which the programs had too little is kept, but does not count.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llama2 import native

#: Seconds to wait for real cores before a round, and how many rounds are tried for one that counts.
PATIENCE, TRIES = 60.0, 4

#: "decode tokens/s": 120.0 and so on; the last word of a name is its unit.
Figures = dict[str, float]


class MeasurementError(Exception):
    """A program failed, or there were too few cores; says what happened, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a finished process showed."""

    stdout: str
    first_byte: float  # seconds from its start to the first byte on stdout
    peak: float  # MiB of resident memory, mapped files included
    anonymous: float = 0.0  # MiB of it that are no file's, at most, as often as it was looked at; 0 where nobody tells


@dataclass(frozen=True, slots=True)
class Round:
    """Figures by program in the order of their runs, and the cores they had.

    A round ends at the first sign of too few cores, and then has figures of fewer programs and does not count.
    """

    figures: dict[str, Figures]
    cores: list[float]  # how many the probes found before, between and after the runs
    left: list[float]  # how many other processes left to each run
    counts: bool


def run(command: list[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a program to its end, with additions to the environment.

    Raises MeasurementError with its last words when it fails or prints nothing.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(environment or {})},
        ) as process:
            assert process.stdout
            try:
                with watched(Path(f"/proc/{process.pid}/status")) as peaks:
                    stdout = os.read(process.stdout.fileno(), 1)
                    first_byte = time.perf_counter() - start
                    stdout += process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:  # Ctrl-C and SIGTERM among them
                process.kill()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not stdout:
            errors.seek(0)
            words = errors.read()[-500:].decode(errors="replace")
            raise MeasurementError(f"{shlex.join(command)} ended with exit code {process.returncode}:\n{words}")
    return Run(stdout.decode(errors="replace"), first_byte, max_resident(usage), max(peaks))


@contextmanager
def watched(status: Path) -> Iterator[list[float]]:
    """Meanwhile, a list of the anonymous memory of a process, in MiB, twenty times a second; Linux alone tells it."""
    found, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            with suppress(OSError, IndexError):
                found.append(int(status.read_text().split("RssAnon:")[1].split()[0]) / 2**10)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def max_resident(usage: resource.struct_rusage) -> float:
    """MiB of the largest resident set. On Linux it begins at that of the process which started it, as exec keeps it."""
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def real_cores(threads: int) -> float:
    """How many cores' worth of arithmetic `threads` threads do at this moment."""
    rate = native.module().int8_gemm_rate
    return round(float(rate(threads, 0.05) / rate(1, 0.05)), 2)


def work_of_others(stat: Path = Path("/proc/stat")) -> float:
    """Processor seconds since the system's start that were not spent by this process and those it waited for.

    0 where the system does not tell, which is everywhere but on Linux.
    """
    try:
        fields = stat.read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, fields[:8])
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return ticks / os.sysconf("SC_CLK_TCK") - sum(usage.ru_utime + usage.ru_stime for usage in own)


def one_round(programs: Mapping[str, Callable[[], Figures]], *, first: int, threads: int, real: float) -> Round:
    """Wait for real cores, then run the programs in order, beginning with number `first`, with probes around them.

    `real` is the share of the threads that must have a core of their own.
    """
    needed, machine = real * threads, os.cpu_count() or threads
    deadline = time.monotonic() + PATIENCE
    while (found := real_cores(threads)) < needed and time.monotonic() < deadline:
        time.sleep(0.5)
    cores = [found]
    left: list[float] = []
    figures: dict[str, Figures] = {}
    names = list(programs)
    for name in names[first:] + names[:first]:
        if min(cores + left) < needed:
            break
        start, others = time.monotonic(), work_of_others()
        figures[name] = programs[name]()
        left.append(round(machine - (work_of_others() - others) / (time.monotonic() - start), 2))
        cores.append(real_cores(threads))
    return Round(figures, cores, left, counts=min(cores + left) >= needed)


def add_rounds(
    rounds: list[Round],
    programs: Mapping[str, Callable[[], Figures]],
    *,
    wanted: int,
    threads: int,
    real: float,
    added: Callable[[], None] = lambda: None,
) -> None:
    """Append rounds until `wanted` of them count, calling `added` after each.

    Progress on stderr: a dot for a round that counts, an x for one that does not. Raises MeasurementError when too many
    do not, or a program fails.
    """
    tried = 0
    while sum(one.counts for one in rounds) < wanted:
        if tried == TRIES * wanted:
            raise MeasurementError(
                f"{threads} threads seldom had {threads} real cores; try again when the machine is quiet"
            )
        rounds.append(one_round(programs, first=len(rounds) % len(programs), threads=threads, real=real))
        tried += 1
        print("." if rounds[-1].counts else "x", end="", file=sys.stderr, flush=True)
        added()
