"""What a run leaves behind: a folder with its recipe, where it comes from, and a line of figures for every step.

run.json        command, commit, versions, hardware, seed and when it began
recipe.json     every setting, defaults too
metrics.jsonl   one object a line
checkpoints/    step-…/, each with what continues the run, and the model as of that step
tensorboard/    the figures once more
samples.jsonl   what the model wrote
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama2.errors import RunError

ORIGIN, RECIPE, METRICS = "run.json", "recipe.json", "metrics.jsonl"
#: The folder with a run's states, and in each of them the one with the model.
CHECKPOINTS, MODEL = "checkpoints", "model"


def origin() -> dict[str, Any]:
    """What somebody needs to repeat what this process does."""
    import os  # here, and below, because every start of the program imports this module for two names
    import platform
    import shlex
    import sys

    return {
        "date": now(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in ("whole-llama", "torch", "numpy", "datatrove") if (found := installed(name))},
        },
        "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.platform()},
    }


def now() -> str:
    """The time, as ISO 8601 has it."""
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the sources in a folder, this package's, with `-dirty` when they differ; None outside a clone."""
    import subprocess

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return told.stdout.strip() or None


def cpu() -> str:
    """The processor's name, as far as the system tells it."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(distribution: str) -> str | None:
    """Version of an installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


class Run:
    """A run's folder, which one process writes and any may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, recipe: Mapping[str, Any], **about: Any) -> Run:
        """Begin a run: its recipe, and what `origin` and `about` tell of it. Raises RunError when there is one."""
        if (folder / ORIGIN).exists():
            raise RunError(f"{folder}: holds a run already; continue it with --resume, or choose another name")
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RECIPE, recipe)
        _write(folder / ORIGIN, origin() | about)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """A run that was begun. Raises RunError when there is none."""
        if not (folder / ORIGIN).is_file():
            raise RunError(f"{folder}: holds no run, {ORIGIN} is missing; begin one with `llama2 pretrain`")
        return cls(folder)

    @property
    def origin(self) -> dict[str, Any]:
        """What `create` was told."""
        return _read(self.folder / ORIGIN)

    @property
    def recipe(self) -> dict[str, Any]:
        """Its settings."""
        return _read(self.folder / RECIPE)

    def log(self, **figures: Any) -> None:
        """Add a line of figures."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of figures; a last one that was cut off while it was written is left out."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        return [json.loads(line) for line in lines[:-1]]

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Leave out lines of figures that are not wanted: what a run did after the state that it continues from."""
        kept = "".join(json.dumps(line) + "\n" for line in self.metrics() if wanted(line))
        part = self.folder / f"{METRICS}.part"
        part.write_text(kept, encoding="utf-8")
        part.replace(self.folder / METRICS)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); the run is damaged, begin another") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: is no JSON object; the run is damaged, begin another")
    return value
