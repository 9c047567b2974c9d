"""A run's lock: who is refused, what is left alone, and which lock is stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from llama2.errors import RunError
from llama2.records import Run
from llama2.train import lock
from llama2.train.lock import LOCK, hold
from llama2.train.processes import Processes

ALONE = Processes(torch.device("cpu"))

HOLDER = """
import sys, time
from pathlib import Path
import torch
from llama2.train.lock import hold
from llama2.train.processes import Processes
with hold(Path(sys.argv[1]), Processes(torch.device("cpu")), resume=False):
    print("held", flush=True)
    time.sleep(60)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_process_has_the_run_until_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout
            assert other.stdout.readline() == b"held\n"
            Run.create(folder, {})
            (folder / "states" / "step-00000003.part").mkdir(parents=True)
            before = contents(tmp_path)
            refusal = f"mine: process {other.pid} on .* has this run since .*; wait"
            with pytest.raises(RunError, match=refusal), hold(folder, ALONE, resume=True):
                pass
            with pytest.raises(RunError, match="holds a run already"), hold(folder, ALONE, resume=False):
                pass
            assert contents(tmp_path) == before
            assert (folder / "states" / "step-00000003.part").is_dir()
        finally:
            os.kill(other.pid, signal.SIGKILL)
    assert (folder / LOCK).read_bytes()  # nobody was there to remove it
    with hold(folder, ALONE, resume=True):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert not (folder / LOCK).exists()


def test_one_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold a run"), hold(tmp_path / "runs" / "a", ALONE, resume=True):
        pass
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "runs" / "a", ALONE, resume=False):
        raise ZeroDivisionError
    assert not (tmp_path / "runs").exists()


def test_two_of_one_process(tmp_path: Path) -> None:
    with (
        hold(tmp_path / "a", ALONE, resume=False),
        pytest.raises(RunError, match="has this run"),
        hold(tmp_path / "a", ALONE, resume=False),
    ):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    """Its own lock does not reach here; its signs of life do."""
    monkeypatch.setattr(lock, "WATCHED", 0.6)
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "elsewhere", "boot": "another", "pid": 7, "since": "noon"}))
    os.utime(path, (1, 1))
    if alive:
        monkeypatch.setattr("time.sleep", lambda _: os.utime(path))
    with ExitStack() as stack:
        if alive:
            stack.enter_context(pytest.raises(RunError, match="process 7 on elsewhere has this run since noon"))
        with hold(tmp_path, ALONE, resume=False):
            assert not alive
    assert path.exists() == alive


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with hold(tmp_path, ALONE, resume=False):
        os.utime(tmp_path / LOCK, (1, 1))
        monkeypatch.setattr(lock, "WATCHED", 5.0)
        assert lock._beats(tmp_path / LOCK)


def test_where_the_system_cannot_lock_the_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_lock", lambda _: None)
    monkeypatch.setattr(lock, "BEAT", 0.01)
    monkeypatch.setattr(lock, "WATCHED", 0.5)
    with (
        hold(tmp_path, ALONE, resume=False),
        pytest.raises(RunError, match="has this run"),
        hold(tmp_path, ALONE, resume=False),
    ):
        pass
    (tmp_path / LOCK).write_text('{"pid": 3}')
    with hold(tmp_path, ALONE, resume=False):
        pass


def test_a_lock_that_its_holder_removes_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the file before that has a lock on nothing, and must not take it for the run's."""
    path, really = tmp_path / LOCK, lock._lock
    ends = [path.unlink]

    def end(descriptor: int) -> bool | None:
        if ends:
            ends.pop()()
        return really(descriptor)

    monkeypatch.setattr(lock, "_lock", end)
    with hold(tmp_path, ALONE, resume=False):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("odd", ["fifo", "link", "folder", "deep"])
def test_an_odd_lock(tmp_path: Path, odd: str) -> None:
    path = tmp_path / LOCK
    if odd == "fifo":
        os.mkfifo(path)
    elif odd == "link":
        path.symlink_to(tmp_path / "private")
    elif odd == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 5000)
    with ExitStack() as stack:
        if odd != "deep":
            stack.enter_context(pytest.raises(RunError, match=r"lock: .*; remove it, or choose another name"))
        with hold(tmp_path, ALONE, resume=False):
            pass
    assert not (tmp_path / "private").exists()
