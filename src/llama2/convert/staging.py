"""Where a model is written and verified before it takes its place: a folder `NAME.part` beside it, on the same disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama2.errors import CheckpointError

#: What the name of a file that belongs to a model, or stands in its folder, ends with.
RECEIPT = "receipt.json"


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder in which to write what becomes `target`, under its name, and files that are to stand beside it.

    At the end they take their places, the model last. Whatever happens before, nothing is left. With `force`, what
    stands at `target` is replaced then, by one renaming; a folder by two, for which it must be one that was written
    here. Raises CheckpointError when `target` is there already, or its folder cannot be written.
    """
    _check(target, force)
    stage = target.with_name(f"{target.name}.part")
    try:
        stage.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{stage}: is there from a conversion that runs or was killed; if none runs, remove it"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{stage}: cannot be made ({error.strerror}); choose a folder of yours") from None
    try:
        yield stage
        _place(stage, target, force)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check(target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: is no folder; make it first")
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise CheckpointError(f"{target}: is there already; choose another name, or replace it with --force")
    if target.is_symlink() or not target.is_dir():
        return
    if not (target / RECEIPT).is_file():
        raise CheckpointError(f"{target}: is a folder that was not written by a conversion; remove it yourself")


def _place(stage: Path, target: Path, force: bool) -> None:
    placed: list[Path] = []
    try:
        for file in sorted(stage.iterdir(), key=lambda file: file.name == target.name):
            place = target.with_name(file.name)
            if file.name != target.name and place.exists():
                if place.read_bytes() == file.read_bytes():
                    continue
                if not force:
                    raise CheckpointError(f"{place}: is there already; move it, or replace it with --force")
            if place.is_dir() and not place.is_symlink():
                replaced = stage / "replaced"
                place.rename(replaced)
                try:
                    file.rename(place)
                except BaseException:
                    replaced.rename(place)
                    raise
            else:
                fresh = not place.exists()
                file.replace(place)
                if fresh:
                    placed.append(place)
    except BaseException as error:
        for place in placed:
            place.unlink() if place.is_file() else shutil.rmtree(place)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: cannot be put in place ({error.strerror})") from error
        raise
