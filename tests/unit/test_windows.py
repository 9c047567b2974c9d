"""What Windows wants, as far as another system can tell: layouts, encodings, names. bench/wine.py runs the rest."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama2 import files, machine
from llama2.cli.main import choose_encodings
from llama2.errors import CheckpointError
from llama2.text import sandbox


def test_layout_of_a_jobs_limits() -> None:
    """Worked out from winnt.h for 64 bits: basic limits of 64 bytes, six counters of 8, four sizes of 8."""
    assert ctypes.sizeof(sandbox.JobLimits) == 64 + 48 + 32
    offsets = {"flags": 16, "processes": 40, "affinity": 48, "io_counters": 64, "process_memory": 112}
    assert {name: getattr(sandbox.JobLimits, name).offset for name in offsets} == offsets


def test_layout_of_a_memory_status() -> None:
    """MEMORYSTATUSEX has two words of 4 bytes and seven of 8."""
    assert ctypes.sizeof(machine._MemoryStatus) == 2 * 4 + 7 * 8


def test_a_process_without_an_alarm_ends_itself() -> None:
    script = (
        "import sys; from llama2.text.sandbox import _Alarm; a = _Alarm(); a.set(30); a.set(0); a.set(0.05)\nwhile 1: 0"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 1


def test_an_alarm_that_was_taken_back_ends_nothing() -> None:
    script = "import time; from llama2.text.sandbox import _Alarm; a = _Alarm(); a.set(0.05); a.set(0); time.sleep(0.2)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_pipes_are_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a Western code page a multiplication sign was another byte, and a star an escape."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode()), encoding="cp1252"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    choose_encodings()
    sys.stdout.write("2 × ★\udc80")
    sys.stdout.flush()
    assert written.getvalue() == "2 × ★\\udc80".encode()
    assert sys.stdin.read() == "Grüße"


def test_a_users_own_encoding_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    choose_encodings()
    sys.stdout.write("2 × ★")
    sys.stdout.flush()
    assert written.getvalue() == b"2 \xd7 \\u2605"


@pytest.mark.parametrize(
    "name", ["con", "NUL", "aux.gguf", "Com1.txt", "lpt9", "COM¹", "conout$", "model.", "model ", "model.gguf:other"]
)
def test_names_that_windows_takes_for_something_else(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert files.reserved(name)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(CheckpointError, match=r"Windows, or ends in what Windows cuts; rename"):
        files.open_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="on Windows this is"), files.create(tmp_path / name):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name", ["con1", "console", "com0", "com10", "auxiliary.gguf", "model.gguf", ".hidden", "nul-1"]
)
def test_names_that_are_names_everywhere(name: str) -> None:
    assert not files.reserved(name)


def test_no_file_of_another_system_is_read_on_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under wine, /proc/meminfo is Linux's."""
    (tmp_path / "meminfo").write_text("MemAvailable: 100 kB\n")
    if sys.platform != "win32":
        assert machine.available_memory(tmp_path / "meminfo") == 100 << 10
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.peak_memory(tmp_path) is None or machine._words(tmp_path / "meminfo") == []


def test_powershell_completes_commands() -> None:
    """Typer's script for PowerShell calls the program with these variables; the answer is a word and its help."""
    asked = {"_TYPER_COMPLETE_ARGS": "llama2 se", "_TYPER_COMPLETE_WORD_TO_COMPLETE": "se"}
    environment = {**os.environ, **asked, "_LLAMA2_COMPLETE": "complete_powershell"}
    script = "from llama2.cli.main import run; run([])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["serve:::Serve models to programs and people."]
