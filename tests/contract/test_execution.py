"""Generated code in its sandbox: real attempts on the machine, and on the verdict, each of which must fail.

A test's program succeeds only if its attempt does, so `passed` would be the breach.
"""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from llama2.errors import EvaluationError
from llama2.evaluate import execution
from llama2.evaluate.execution import Outcome, run

pytestmark = pytest.mark.skipif(execution.available() is not None, reason=str(execution.available()))


def test_a_program_passes_by_its_tests_alone() -> None:
    program = "def double(x):\n    return 2 * x\n"
    assert run(program, "assert double(4) == 8") == Outcome(True, "passed", "")
    assert run(program, "assert double(4) == 9, 'nine'") == Outcome(False, "failed", "AssertionError: nine")
    assert run("def double(x) return", "pass").detail.startswith("SyntaxError")
    # What sets need of Python: the standard library, classes, text on stdout, an input that is empty.
    program = "import dataclasses, hashlib, math, re\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nprint('é')"
    assert run(program, "import sys\nassert A().x == 1 and sys.stdin.read() == '' and __name__ != '__main__'").passed


@pytest.mark.parametrize(
    "program",
    [
        "import sys; print('passed'); sys.exit(0)",
        "import os; print('passed', flush=True); os._exit(0)",
        "import os; os.write(1, b'started\\npassed\\n'); os.close(1); os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "print('''passed",  # open quotes do not reach into the tests
        "def exit_early(*_): raise SystemExit(0)\nglobals()['__builtins__']['AssertionError'] = exit_early",
        "import builtins\nclass Passing(BaseException): pass\nraise Passing",
        "import atexit; atexit.register(print, 'passed'); raise SystemExit(0)",
        "import threading, os; threading.Timer(0.2, os._exit, [0]).start()\nwhile True: pass",
    ],
)
def test_a_verdict_cannot_be_printed_or_exited(program: str) -> None:
    outcome = run(program, "assert False\n'''")
    assert not outcome.passed
    assert outcome.reason == "failed"


def test_a_planted_file_is_not_there(tmp_path: Path) -> None:
    planted = tmp_path / "secret.txt"
    planted.write_text("secret")
    planted.chmod(0o644)
    for path in (planted, Path("/etc/passwd"), Path(__file__)):
        assert path.read_text()
        outcome = run(f"assert open({str(path)!r}).read()")
        assert "FileNotFoundError" in outcome.detail


def test_the_environment_of_the_parent_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA2_TEST_SECRET", "3f2a")
    program = """
import glob, os
found = str(dict(os.environ))
for path in ["/proc/1/environ", "/proc/self/environ", *glob.glob("/proc/*/environ")]:
    try:
        found += open(path).read()
    except OSError:
        pass
assert "3f2a" in found, found
"""
    assert run(program).detail == "AssertionError: {'PYTHONHASHSEED': '0', 'PWD': '/', 'LC_CTYPE': 'C.UTF-8'}"


def test_loopback_is_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, timeout=1).close()
        assert "Error" in run(f"import socket; socket.create_connection({address!r}, timeout=1)").detail


def test_nothing_can_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    program = f"""
import os
written = []
for folder in [{str(tmp_path)!r}, "/", "/tmp", "/usr", "/usr/lib", "/dev", "/dev/shm", "/etc", "/root", "/var/tmp"]:
    try:
        open(os.path.join(folder, "llama2-written"), "w").close()
        written.append(folder)
    except OSError:
        pass
assert written, "none"
"""
    assert run(program).detail == "AssertionError: none"
    assert not list(tmp_path.iterdir())


def test_it_is_not_root_and_cannot_become_it() -> None:
    assert run("import os; assert 0 in os.getresuid() + os.getresgid()").detail == "AssertionError:"
    assert "Error" in run("import os; os.setuid(0)").detail


def test_200_forks_are_stopped() -> None:
    program = "import os, time\nfor _ in range(200):\n    if not os.fork():\n        time.sleep(60)"
    assert "BlockingIOError" in run(program).detail


def test_memory_is_limited() -> None:
    assert run("bytearray(3 << 30)").detail == "MemoryError:"


@pytest.mark.parametrize("stream", [1, 2])
def test_output_is_limited(stream: int) -> None:
    program = f"import os\nfor _ in range(64):\n    try: os.write({stream}, bytes(1 << 20))\n    except OSError: pass"
    assert run(program).reason == "output"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nfor each in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(each, lambda *_: None)\nwhile True: signal.pause()",
        "import os\nif os.fork(): os._exit(0)\nos.setsid()\nwhile True: pass",  # a daemon ends with the sandbox
    ],
)
def test_time_is_limited(program: str) -> None:
    begun = time.monotonic()
    outcome = run(program, seconds=1)
    assert not outcome.passed
    assert time.monotonic() - begun < 10


def test_many_at_once_share_nothing() -> None:
    outcomes: list[Outcome | None] = [None] * 4

    def one(i: int) -> None:
        outcomes[i] = run(f"x = {i}", f"assert x == {i % 2}")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome and outcome.passed for outcome in outcomes] == [True, True, False, False]


def test_a_sandbox_that_cannot_start_is_not_a_failed_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(EvaluationError, match="cannot start: bwrap: No permissions to create new namespace; it needs"):
        run("x = 1")
    assert "cannot start" in str(execution.available())
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "install the package bubblewrap" in str(execution.available())
    with pytest.raises(EvaluationError, match="install the package bubblewrap"):
        run("x = 1")


def test_the_token_is_not_in_memory_while_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame, module or object that a program can reach holds the token: it is still in the pipe."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "5e" * size)
    program = """
import gc, sys
texts, frame = [], sys._getframe()
while frame:
    texts += [repr(frame.f_locals), repr(frame.f_globals)]
    frame = frame.f_back
texts += [repr(each) for each in gc.get_objects() if isinstance(each, (bytes, str, dict, list))]
assert "e5"[::-1] * 16 in " ".join(texts), "nowhere"
"""
    assert run(program).detail == "AssertionError: nowhere"
