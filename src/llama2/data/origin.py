"""What a corpus was built from, in its folder, so that a later build sees whether it is still that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.io import get_datafolder

from llama2 import files as safely
from llama2.data import contamination, shards
from llama2.data.read import File, changed
from llama2.data.settings import BuildRecipe
from llama2.errors import DataError
from llama2.recipe import leaves

ORIGIN = "origin.json"
#: Differences that are named.
_NAMED = 4
#: Settings that say where, and by whom, the work is done.
_FREE: Any = {"output": True, "dir": True, "executor": {"kind", "workers", "memory", "time", "partition"}}

Facts = dict[str, Any]


def facts(recipe: BuildRecipe, files: Sequence[File]) -> Facts:
    """All that a corpus depends on: settings, each file's size and time of change, and the tokenizer's hash.

    Raises DataError for benchmarks' files that are missing, and a tokenizer that cannot be read.
    """
    sources: dict[str, dict[str, Any]] = {name: {} for name in recipe.sources}
    for file in files:
        sources[file.source][file.path] = [file.size, file.changed]
    for name, benchmark in recipe.decontamination.benchmarks.items():
        place = get_datafolder(recipe.benchmarks_folder)
        found = {path: place.info(path) for path in contamination.find(recipe.benchmarks_folder, name, benchmark)}
        sources[f"benchmark {name}"] = {path: [info["size"], changed(info)] for path, info in found.items()}
    return {
        "folder": recipe.folder,
        "recipe": recipe.model_dump(mode="json", exclude=_FREE),
        "tokenizer": shards.sha256(recipe.tokenizer.file) if recipe.tokenizer.file else None,
        "files": sources,
    }


def write(corpus: Path, now: Facts) -> None:
    """Write the facts beside what was built."""
    with safely.create(corpus / ORIGIN, error=DataError) as file:
        file.write(json.dumps(now, indent=1).encode() + b"\n")


def differences(corpus: Path, now: Facts) -> list[str]:
    """In what the facts of a corpus that is there differ from those of now; none where it is what it would become."""
    try:
        then = json.loads((corpus / ORIGIN).read_bytes())
        found = [*_differences(then, now)]
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return ["it does not say what it was built from"]
    return found[:_NAMED] + ([f"{len(found) - _NAMED} more"] if len(found) > _NAMED else [])


def _differences(then: Facts, now: Facts) -> Iterator[str]:
    if then["folder"] != now["folder"]:
        yield f"its documents were in {then['folder']}, and are in {now['folder']}"
    before, after = leaves(then["recipe"]), leaves(now["recipe"])
    for name in sorted((before.keys() | after.keys()) - {"tokenizer.file"}):  # which is known by its hash
        old, new = (json.dumps(each[name]) if name in each else "not there" for each in (before, after))
        if old != new:
            yield f"{name} was {old}, and is {new}"
    if then["tokenizer"] != now["tokenizer"]:
        yield "the tokenizer is another one"
    for name in sorted({*then["files"], *now["files"]}):
        old, new = then["files"].get(name, {}), now["files"].get(name, {})
        changed = [path for path in new if path in old and new[path] != old[path]]
        for what, paths in (
            ("new", [path for path in new if path not in old]),
            ("gone", [path for path in old if path not in new]),
            ("changed", changed),
        ):
            if paths:
                yield f"{name}: {_count(paths)} {what} ({paths[0]}{', …' if len(paths) > 1 else ''})"


def _count(paths: Sequence[str]) -> str:
    return f"{len(paths):,} files are" if len(paths) > 1 else "1 file is"
