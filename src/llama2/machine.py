"""The machine, and what it allows this process to use: processors, memory, names."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self")
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")


def processors() -> int:
    """Processors this process may use: those it may run on, or fewer where a control group limits its time.

    A container's limit is such a quota. More threads than it allows would wait for each other, and be stopped for most
    of each period.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota()
    return allowed if limit is None else max(1, min(allowed, math.ceil(limit)))


def quota(proc: Path = _PROC, root: Path = _CGROUPS) -> float | None:
    """Processors' worth of time that this process's control group or one above it allows; None without a limit.

    Version 2 says it in `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`. `proc` is the process's
    folder in /proc, and `root` where control groups are mounted. Files that are not there, or say something else, limit
    nothing.
    """
    limits = []
    for line in _words(proc / "cgroup", "\n"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not line.startswith("0::") and "cpu" not in controllers.split(","):
            continue
        for mounted in [root / "cpu", root / controllers] if controllers else [root, root / "unified"]:
            # Within a container, the path may begin above what is mounted: the group's own files are at the root then.
            inside = [part for part in group.split("/") if part not in ("", "..")]
            folders = [mounted.joinpath(*inside[:depth]) for depth in range(len(inside) + 1)]
            limits += [limit for folder in folders if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def total_memory() -> int | None:
    """Bytes of the machine's memory; None where the system does not say."""
    if sys.platform == "win32":
        return _windows_memory("total")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory(meminfo: Path = _MEMINFO) -> int:
    """Bytes that the system could give to this process without swapping; 0 where it does not say, as macOS."""
    if sys.platform == "win32":
        return _windows_memory("available") or 0
    return _kilobytes(meminfo, "MemAvailable:") or 0


def peak_memory(proc: Path = _PROC) -> int | None:
    """Bytes of the largest resident set that this process has had; None on Windows, which counts otherwise."""
    if peak := _kilobytes(proc / "status", "VmHWM:"):  # Linux's getrusage also counts the process that started this one
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's name, as far as the system reports it."""
    import platform

    lines = _words(cpuinfo, "\n")
    if not lines:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _kilobytes(path: Path, key: str) -> int | None:
    """The bytes that a line of a file in /proc states after `key`; None without such a line."""
    return next((int(line.split()[1]) * 1024 for line in _words(path, "\n") if line.startswith(key)), None)


def _limit(folder: Path) -> float | None:
    words = _words(folder / "cpu.max") or [
        *_words(folder / "cpu.cfs_quota_us"),
        *_words(folder / "cpu.cfs_period_us"),
    ]
    try:
        time, period = map(int, words)
    except ValueError:  # "max", or no such file
        return None
    return time / period if time > 0 and period > 0 else None  # version 1 says -1 for no limit


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX: 64 bytes."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _windows_memory(kind: str) -> int | None:
    """The machine's "total" or "available" memory, in bytes."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    known = ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(getattr(status, kind)) if known else None


def _words(path: Path, separator: str | None = None) -> list[str]:
    if sys.platform == "win32":  # under wine, /proc would be the system's below it
        return []
    try:
        return path.read_text(encoding="utf-8", errors="replace").split(separator)
    except OSError:
        return []
