"""The lineage of rounds: what each stage read, by what settings, and what it left, linked by hashes.

lineage.json    {"stages": [{"name", "inputs", "settings", "outputs", "scores", "previous"}, …], "run"}

Inputs are digests of models and of files, outputs digests of files in the folder. `previous` is the digest of the stage
before. So no file, and no stage, can be changed without the chain showing it. `run` says when and where it began, and
is in no digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2 import files, records
from llama2.align.outputs import write_lines
from llama2.errors import RunError

LINEAGE = "lineage.json"
_LONGEST = 1 << 26  # bytes


@dataclass
class Lineage:
    """The stages of a folder that are done, in order."""

    folder: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=records.origin)

    @classmethod
    def open(cls, folder: Path) -> Lineage:
        """That of a folder, or a new one. Raises RunError for one that is damaged, or whose chain does not hold."""
        path = folder / LINEAGE
        if not files.exists(path):
            return cls(folder)
        with files.open_file(path, error=RunError) as file:
            text = file.read(_LONGEST)
        try:
            found = json.loads(text)
            lineage = cls(folder, found["stages"], found["run"])
            names = [(stage["name"], stage["previous"], stage["outputs"].items()) for stage in lineage.stages]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RunError(f"{path}: is not a lineage; begin again in another folder") from None
        before = ""
        for (name, previous, _), stage in zip(names, lineage.stages, strict=True):
            if previous != before:
                raise RunError(f"{path}: stage {name}: does not follow from the stage before it, which was changed")
            before = digest_of(stage)
        return lineage

    def find(self, name: str) -> dict[str, Any] | None:
        """A stage that is done."""
        return next((stage for stage in self.stages if stage["name"] == name), None)

    def check(self) -> None:
        """Raise RunError for an output that is missing, or is not as its stage left it."""
        for stage in self.stages:
            for name, digest in stage["outputs"].items():
                path = self.folder / name
                if not path.is_file():
                    raise RunError(f"{path}: stage {stage['name']} left it, and it is missing; restore it")
                if files.sha256(path, error=RunError) != digest:
                    raise RunError(
                        f"{path}: was changed after stage {stage['name']} left it; restore it, or begin again"
                    )

    def refuse_other(self, name: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Raise RunError where a stage that is done read other inputs, or had other settings."""
        stage = self.find(name)
        if stage is None:
            return
        for kind, before, now in (("input", stage["inputs"], inputs), ("setting", stage["settings"], settings)):
            for key in sorted({*before, *now}):
                if before.get(key) != now.get(key):
                    raise RunError(
                        f"{self.folder}: stage {name} is done, and its {kind} {key} is another now; "
                        "restore it, or begin again in another folder"
                    )

    def add(
        self,
        name: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        outputs: Iterable[Path],
        scores: Mapping[str, Any],
    ) -> None:
        """A stage is done: its outputs are files in the folder."""
        left = {
            path.relative_to(self.folder).as_posix(): files.sha256(path, error=RunError) for path in sorted(outputs)
        }
        previous = digest_of(self.stages[-1]) if self.stages else ""
        stage = {"name": name, "inputs": dict(inputs), "settings": dict(settings), "outputs": left}
        self.stages.append(stage | {"scores": dict(scores), "previous": previous})
        write_lines(self.folder / LINEAGE, [json.dumps({"stages": self.stages, "run": self.run}, indent=1)])


def digest_of(stage: Mapping[str, Any]) -> str:
    """SHA-256 of a stage."""
    return hashlib.sha256(json.dumps(stage, sort_keys=True).encode()).hexdigest()
