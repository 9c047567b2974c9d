"""What opening damaged models costs, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llama2 import checkpoint
from llama2.errors import CheckpointError, ConfigError

MB = 1 << 20

_RUNNER = """
import json, re, sys, time
from pathlib import Path
import llama2.checkpoint
from llama2.errors import Llama2Error

def peak():
    status = Path("/proc/self/status")  # not getrusage, whose maximum is inherited from the parent
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) if status.exists() else 0

before = peak()
for path in sys.argv[1:]:
    start = time.process_time()  # of this process alone: the machine may be busy
    try:
        model = llama2.checkpoint.open(path)
        model.check_finite()
        model.tokenizer
        reason = None
    except Llama2Error as error:
        reason = str(error)
    print(json.dumps({"reason": reason, "seconds": time.process_time() - start, "memory": peak() - before}))
"""


def refusal(path: Path) -> str:
    """The message that opening `path` ends with: one line that begins with the path, or with that of a file in it."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        checkpoint.open(path)
    message = str(caught.value)
    assert message.startswith((f"{path}: ", f"{path}/"))
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))
    return message


def assert_refused_cheaply(paths: Sequence[Path], options: Sequence[str]) -> None:
    """Python, with `options`, refuses each model within a second and 64 MB beyond the size of its files."""
    ordered = sorted(paths, key=_size)  # for the peak of memory only grows
    run = subprocess.run(
        [sys.executable, *options, "-c", _RUNNER, *map(str, ordered)], capture_output=True, text=True, check=True
    )
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(ordered)
    for path, result in zip(ordered, results, strict=True):
        assert result["reason"], path
        assert result["seconds"] < 1, path
        assert result["memory"] < _size(path) + 64 * MB, path


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.iterdir() if file.exists()) if path.is_dir() else path.stat().st_size
    )
