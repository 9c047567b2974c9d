"""A run's record: a folder with its recipe, its origin, and a line of metrics for every step.

run.json        command, commit, versions, hardware, seed and when it began
recipe.json     every setting, defaults too
metrics.jsonl   one object a line
states/         step-…/, each with what continues the run, and the model as of that step
tensorboard/    the metrics once more
samples.jsonl   what the model wrote
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.errors import RunError

ORIGIN, RECIPE, METRICS = "run.json", "recipe.json", "metrics.jsonl"
#: The folder with a run's states, its name in older runs, and in each state the folder with the model or the adapter.
STATES, OLD_STATES, MODEL, ADAPTER = "states", "checkpoints", "model", "adapter"
#: The name of a state's folder, and in it the step: a pattern, which is not compiled at every start of the program.
STATE = r"step-([0-9]{1,18})"

#: Metrics of a line, and their old names; null where they were not finite.
_METRIC_NAMES = (
    *("loss", "lr", "norm", "tokens", "epoch", "seconds", "tokens_per_second", "mfu"),
    *("validation", "MWh", "tCO2eq"),
)
_RENAMED = {"rate": "lr"}
_LARGEST = 1e100  # of a metric
#: The most bytes of an object's file, letters of a text in it that is shown, bytes of a line of metrics, and lines.
_LONGEST, _TEXT, _LINE, _LINES = 1 << 22, 1 << 12, 1 << 16, 1 << 22
_METRICS = 1 << 30  # bytes of all lines


def states_folder(run: Path) -> Path:
    """The folder with a run's states."""
    old = run / OLD_STATES
    return old if old.is_dir() and not (run / STATES).exists() else run / STATES


def newest(path: Path, what: str) -> Path:
    """The last model or adapter that a training run has saved, if the path is a run's; else the path."""
    found = states_folder(path).glob(f"step-*/{what}")
    steps = {int(step[1]): each for each in found if (step := re.fullmatch(STATE, each.parent.name))}
    return steps[max(steps)] if steps else path


def origin() -> dict[str, Any]:
    """What it takes to repeat what this process does."""
    import platform  # here, and below, because every start of the program imports this module for two names
    import shlex
    import sys

    from llama2.machine import cpu, processors

    return {
        "date": now(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in ("whole-llama", "torch", "numpy", "datatrove") if (found := installed(name))},
        },
        "hardware": {"cpu": cpu(), "cores": processors(), "system": platform.platform()},
    }


def now() -> str:
    """The time, in ISO 8601."""
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the sources in a folder, this package's, with `-dirty` when they differ; None outside a clone."""
    import subprocess

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except OSError:
        return None
    return described.stdout.decode("utf-8", "replace").strip() or None


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
    def look(cls, folder: Path, *, resume: bool) -> None:
        """Raise RunError where there is a run already, or with `resume` none."""
        if resume:
            cls.open(folder)
        elif files.exists(folder / ORIGIN):
            raise RunError(f"{folder}: holds a run already; continue it with --resume, or choose another name")

    @classmethod
    def create(cls, folder: Path, recipe: Mapping[str, Any], **about: Any) -> Run:
        """Begin a run: its recipe, and `origin` with `about`. Raises RunError when there is one."""
        cls.look(folder, resume=False)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RECIPE, recipe)
        _write(folder / ORIGIN, origin() | about)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """A run that was begun. Raises RunError when there is none."""
        if not (folder / ORIGIN).is_file():
            raise RunError(f"{folder}: does not hold a run, {ORIGIN} is missing; begin one with `llama2 pretrain`")
        return cls(folder)

    @property
    def origin(self) -> dict[str, Any]:
        """What `create` recorded. Raises RunError when it is damaged."""
        origin = _read(self.folder / ORIGIN)
        number, text = (int, type(None)), (str, type(None))
        kinds: dict[str, Any] = {"date": str, "commit": text, "parameters": number, "seed": number}
        for name, kind in kinds.items():
            value = origin.setdefault(name, None)
            if not isinstance(value, kind) or (isinstance(value, str) and len(value) > _TEXT) or _absurd(value):
                raise RunError(f"{self.folder / ORIGIN}: {name} is damaged; begin another run")
        return origin

    @property
    def recipe(self) -> dict[str, Any]:
        """Its settings."""
        return _read(self.folder / RECIPE)

    def change(self, recipe: Mapping[str, Any], **about: Any) -> None:
        """Let the run continue by another recipe, and record more about it."""
        _write(self.folder / ORIGIN, self.origin | about)
        _write(self.folder / RECIPE, recipe)

    def log(self, **metrics: Any) -> None:
        """Add a line of metrics; those that are not finite are null, since JSON has no other word for them."""
        files.append(self.folder / METRICS, json.dumps(_finite(metrics), allow_nan=False) + "\n", error=RunError)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics, with the notes and the validation of each source that they have.

        A last line that was cut off while it was written is left out. Raises RunError for a line that is not an object
        with a step and numbers, and for more than any run writes.
        """
        return [line for _, line in self._lines()]

    def curve(self) -> list[dict[str, Any]]:
        """Lines by step; of steps that were done again after a rewind, the later ones. Raises as metrics."""
        return [line for _, line in sorted({line["step"]: line for line in self.metrics()}.items())]

    def keep_lines(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Leave out lines of metrics that are not wanted: what a run did after the state that it continues from."""
        with files.create(self.folder / METRICS, error=RunError) as file:
            for text, line in self._lines():
                if wanted(line):
                    file.write(text)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        path = self.folder / METRICS
        if not files.exists(path):
            return
        left = _METRICS
        with files.open_file(path, error=RunError) as file:
            for number in range(1, _LINES + 1):
                text = file.readline(_LINE + 1)
                left -= len(text)
                if len(text) > _LINE or left < 0:
                    break
                if not text.endswith(b"\n"):
                    return
                yield text, _line(text, f"{path}:{number}")
        raise RunError(
            f"{path}: is longer, or has a longer line, than any run writes; the run is damaged, begin another"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with files.create(path, error=RunError) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    with files.open_file(path, error=RunError) as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise RunError(f"{path}: has more than {_LONGEST >> 20} MB, which no run writes; begin another")
    return _object(data, path)


def _object(text: bytes, where: object) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where}: cannot be read ({error}); the run is damaged, begin another") from None
    if not isinstance(value, dict):
        raise RunError(f"{where}: is not a JSON object; the run is damaged, begin another")
    return value


def _line(text: bytes, where: str) -> dict[str, Any]:
    """The metrics of a line that are known, with its note and its sources."""
    said = _object(text, where)
    said = {_RENAMED.get(name, name): value for name, value in said.items()}
    if type(said.get("step")) is not int or _absurd(said["step"]):
        raise RunError(f"{where}: does not have a step; the run is damaged, begin another")
    line = {"step": said["step"]} | {
        name: _metric(said[name], f"{where}: {name}") for name in _METRIC_NAMES if name in said
    }
    if isinstance(note := said.get("note"), str):
        line["note"] = note
    if isinstance(sources := said.get("sources"), dict):
        line["sources"] = {name: _metric(value, f"{where}: sources") for name, value in sources.items()}
    if isinstance(measured := said.get("measured"), dict):
        line["measured"] = {name: _metric(value, f"{where}: measured") for name, value in measured.items()}
    return line


def _metric(value: Any, where: str) -> float | None:
    """A number; None for one that is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if type(value) not in (int, float) or _absurd(value):
        raise RunError(f"{where} is not a number; the run is damaged, begin another")
    number: float = value
    return number


def _absurd(value: Any) -> bool:
    """Whether something is a number that no run can reach."""
    return isinstance(value, bool) or (isinstance(value, int | float) and abs(value) > _LARGEST)
