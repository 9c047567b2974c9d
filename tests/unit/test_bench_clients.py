"""bench/serve_clients.py: outcomes of a client's process, what is not installed, the table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("resource", reason="bench/ measures on POSIX systems")
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("serve_clients")


def environment(folder: Path, name: str, program: str) -> None:
    """An environment whose interpreter is a shell program."""
    interpreter = folder / name / "bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)


def test_a_client_that_dies_fails_and_keeps_what_it_had_tried(driver: ModuleType, tmp_path: Path) -> None:
    environment(tmp_path, "openai", """echo chatter; echo '["chat", "passes"]'; echo no module >&2; exit 1""")
    cells = dict(driver.tried(tmp_path, "openai", "http://127.0.0.1:9", "m"))
    assert cells == {"chat": "passes", "process": "FAILS: no module"}


def test_versions_are_empty_where_a_package_is_missing(driver: ModuleType, tmp_path: Path) -> None:
    assert driver.versions(tmp_path, "openai") == {}
    assert driver.versions(tmp_path, "Vercel AI SDK") == {}
    environment(tmp_path, "anthropic", "exit 1")
    assert driver.versions(tmp_path, "anthropic") == {}
    environment(tmp_path, "autogen", "echo 1.2 3.4")
    assert driver.versions(tmp_path, "autogen-agentchat") == {"autogen-agentchat": "1.2", "autogen-ext": "3.4"}


def test_the_table_lists_every_failure(driver: ModuleType) -> None:
    results = {
        "a": {"packages": {"x": "1"}, "outcomes": {"chat": "passes", "process": "FAILS: died"}},
        "b": {"packages": {}, "outcomes": {}},
    }
    head, _, first, second, *notes = driver.table(results).splitlines()
    assert head.count("|") == first.count("|") == second.count("|")
    assert "x 1" in first
    assert "passes" in first
    assert "FAILS (1)" in first
    assert "not installed" in second
    assert "FAILS" not in second
    assert notes == ["", "1. a, process: FAILS: died"]


def test_an_outcome_names_the_error(driver: ModuleType) -> None:
    probes = sys.modules["client_probes"]

    def late() -> None:
        raise TimeoutError("two\n lines")

    assert probes.outcome(lambda: None) == "passes"
    assert probes.outcome(late) == "FAILS: TimeoutError: two lines"
    assert probes.outcome(lambda: sys.exit(3)) == "FAILS: SystemExit: 3"
