"""Processors, memory and names of the machine, by files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama2 import machine


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),  # the one above limits too
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../host/x\n", {"cpu.max": "200000 100000\n"}, 2.0),  # in a container, whose own group is the root
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "1e5"},
            None,
        ),
        (
            "4:memory:/m\n3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
        ("3:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.0),
        ("4:memory:/m\n", {"memory/m/cpu.max": "100000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "0 0\n"}, None),
        ("0::/\n", {"cpu.max": "\xff\n"}, None),
        ("", {"cpu.max": "100000 100000\n"}, None),
    ],
)
def test_quota(tmp_path: Path, group: str, files: dict[str, str], expected: float | None) -> None:
    proc = written(tmp_path / "proc", {"cgroup": group})
    assert machine.quota(proc, written(tmp_path / "cgroup", files)) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert machine.quota(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(("limit", "expected"), [(None, 8), (0.2, 1), (1.5, 2), (2.0, 2), (20.0, 8)])
def test_processors_are_those_that_are_allowed_in_time(
    limit: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "quota", lambda: limit)
    assert machine.processors() == expected


def test_memory_by_files_of_proc(tmp_path: Path) -> None:
    written(tmp_path, {"meminfo": "MemTotal:  8 kB\nMemFree:  2 kB\nMemAvailable:    3 kB\n"})
    assert machine.available_memory(tmp_path / "meminfo") == 3072
    assert machine.available_memory(tmp_path / "none") == 0
    written(tmp_path, {"status": "Name:\tpython\nVmPeak:\t  9 kB\nVmHWM:\t  5 kB\nVmRSS:\t  4 kB\n"})
    assert machine.peak_memory(tmp_path) == 5120


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="Windows reports neither")
def test_memory_of_this_machine(tmp_path: Path) -> None:
    total, peak = machine.total_memory(), machine.peak_memory(tmp_path)  # the latter by getrusage
    assert total is not None
    assert peak is not None
    assert 1 << 20 < peak < total


def test_name_of_the_processor(tmp_path: Path) -> None:
    written(tmp_path, {"cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nprocessor\t: 1\nmodel name\t: B\n"})
    assert machine.cpu(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert machine.cpu(tmp_path / "none")
