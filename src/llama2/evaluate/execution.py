"""Generated code, executed in a sandbox: bubblewrap's namespaces, and limits on time, memory, processes and output.

Inside there is no network, no environment, no file but Python and the system's libraries, and nothing to write to.
Whether a program passes does not depend on what it prints or on its exit status (`isolated.py`). One limit is inherent
to tests of this kind: they call the program in its own process, so an object that equals everything passes `==`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llama2.errors import EvaluationError
from llama2.evaluate import isolated

#: Address space in bytes, processes and threads, open files, bytes of output, bytes of a core file.
LIMITS = {
    "RLIMIT_AS": 1 << 30,
    "RLIMIT_NPROC": 32,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_FSIZE": 1 << 20,
    "RLIMIT_CORE": 0,
}
#: How much of an outcome's detail is retained, in characters.
_DETAIL = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an execution ended."""

    passed: bool  # the tests ran to their end
    reason: str  # "passed", "failed", "time" or "output": what ended it
    detail: str  # the last line of output: where it failed, the exception


def available() -> str | None:
    """Why programs cannot be executed here, in one line; None if they can."""
    if not sys.platform.startswith("linux"):
        return "generated code is executed under bubblewrap, which needs Linux"
    if shutil.which("bwrap") is None:
        return "generated code is executed under bubblewrap, and bwrap is not installed; install the package bubblewrap"
    try:
        run("")
    except EvaluationError as error:
        return str(error)
    return None


def run(program: str, tests: str = "", *, seconds: float = 10) -> Outcome:
    """Execute Python source `program`, then `tests` in the same module; stop both after `seconds` of wall time.

    The program passes if the tests run to their end without an exception. Nothing that it starts survives the call.
    Raises EvaluationError where bubblewrap is missing or cannot start.
    """
    token = secrets.token_hex(isolated.TOKEN // 2).encode()
    request = json.dumps({"program": program, "tests": tests, "limits": LIMITS}).encode()
    with tempfile.TemporaryFile() as output:
        ended = _communicate(len(request).to_bytes(8, "big") + request + token, output, seconds)
        output.seek(0)
        written = output.read(LIMITS["RLIMIT_FSIZE"])
    text = written.removeprefix(isolated.STARTED)
    lines = text.decode("utf-8", "replace").split("\n")
    detail = next((line.strip() for line in reversed(lines) if line.strip()), "")[:_DETAIL]
    if text == written and ended:
        raise EvaluationError(
            f"bubblewrap cannot start: {detail}; it needs root, or namespaces of users, which a container may forbid"
        )
    if not ended:
        return Outcome(False, "time", f"stopped after {seconds:g} s")
    if len(written) == LIMITS["RLIMIT_FSIZE"]:
        return Outcome(False, "output", f"wrote more than {len(written)} bytes")
    passed = token in text
    return Outcome(passed, "passed" if passed else "failed", "" if passed else detail)


def _communicate(request: bytes, output: IO[bytes], seconds: float) -> bool:
    """Run the sandbox to its end, its output in a file; False if it was killed for its time."""
    with subprocess.Popen(
        _command(), stdin=subprocess.PIPE, stdout=output, stderr=output, env={}, cwd="/", start_new_session=True
    ) as process:
        try:
            process.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:  # killing bubblewrap ends its namespace of processes, and with it all that a program started
            process.kill()
    return True


def _command() -> list[str]:
    """The command line of bubblewrap around Python.

    bubblewrap itself starts with an empty environment: the program could read it as that of process 1. As root, it
    makes no namespace of users: in one, the program would still count as root, and not see Python in root's home.
    It retains what it takes to become another user instead.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise EvaluationError("bwrap: not found; install the package bubblewrap, which executes generated code")
    users = ["--unshare-user"]
    if os.getuid() == 0:
        users = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    namespaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    mounts = ["--ro-bind", "/usr", "/usr", "--perms", "0755", "--dir", "/etc"]
    mounts += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in ("/lib", "/lib64"):
        if os.path.islink(folder):
            mounts += ["--symlink", os.readlink(folder), folder]
        else:
            mounts += ["--ro-bind-try", folder, folder]
    if not python.is_relative_to("/usr"):  # where it is may be closed to others, such as root's home
        mounts += ["--perms", "0755", "--dir", "/python", "--ro-bind", str(python.parents[1] / "lib"), "/python/lib"]
        mounts += ["--perms", "0755", "--dir", "/python/bin", "--ro-bind", str(python), "/python/bin/python"]
        python = Path("/python/bin/python")
    mounts += ["--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]
    options = ["--die-with-parent", "--new-session", "--chdir", "/", "--setenv", "PYTHONHASHSEED", "0"]
    text = Path(isolated.__file__).read_text(encoding="utf-8")
    return [bwrap, *users, *namespaces, *mounts, *options, str(python), "-B", "-s", "-S", "-P", "-c", text]
