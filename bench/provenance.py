"""Where a measured number comes from: date, machine, versions, commit, command."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

from llama2 import machine, records


def provenance() -> dict[str, object]:
    """What a reader needs to repeat a measurement made by this process."""
    return {
        "date": records.now(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": records.commit(Path(__file__).parent) or "unknown",
        "cpu": machine.cpu(),
        "cores": machine.processors(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "llama2": records.installed("whole-llama"),
        "numpy": records.installed("numpy"),
    }
