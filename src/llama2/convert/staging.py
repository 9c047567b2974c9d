"""Where a model is written and verified before it takes its place: a folder `NAME.part` beside it, on the same disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llama2 import files
from llama2.checkpoint import Checkpoint
from llama2.errors import CheckpointError
from llama2.formats import nbytes

#: What the name of a file that belongs to a model, or is in its folder, ends with.
RECEIPT = "receipt.json"

#: Files that a model's licence asks to pass on, and between folders the model's card.
_TERMS = re.compile(r"(licen[cs]e|notice|copying|use[-_]?policy|acceptable[-_]use)[\w.-]*", re.IGNORECASE | re.ASCII)
_CARD = "README.md"


@contextmanager
def staged(source: Path, target: Path, *, force: bool) -> Iterator[Path]:
    """A folder in which to write what becomes `target`, under its name, and files that belong beside it.

    At the end they take their places, the model last. Whatever happens before, nothing is left. With `force`, what is
    at `target` is replaced then, by one renaming. A folder takes two, and must be one that was written here. Raises
    CheckpointError as `check` does, and when the folder of `target` cannot be written.
    """
    check(source, target, force)
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
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{target}: cannot be written ({reason}); free some room, or choose another") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check(source: Path, target: Path, force: bool) -> None:
    """Raise CheckpointError when `target` may not be made of `source`: it is there already, or the source itself."""
    here, there = source.resolve(), target.resolve()
    if there == here or there.is_relative_to(here) or here.is_relative_to(there):
        raise CheckpointError(f"{target}: is the source, in it or around it; choose another place")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: is not a folder; make it first")
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise CheckpointError(f"{target}: is there already; choose another name, or replace it with --force")
    if target.is_dir() and not target.is_symlink():
        try:
            receipt = json.loads((target / RECEIPT).read_bytes())
            written = {RECEIPT, *(file["name"] for file in receipt["output"]["files"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{target}: is a folder that no conversion wrote; remove it, or choose another"
            ) from None
        if others := sorted(path.name for path in target.iterdir() if path.name not in written):
            raise CheckpointError(f"{target / others[0]}: would be lost with the folder; move it to another place")


def _place(stage: Path, target: Path, force: bool) -> None:
    """Move everything to its place. What goes wrong leaves what was there, and nothing new."""
    placed: list[Path] = []
    try:
        for file in sorted(stage.iterdir(), key=lambda file: file.name == target.name):
            place = target.with_name(file.name)
            if file.name != target.name and place.exists():
                if place.read_bytes() == file.read_bytes():
                    continue
                if not (force and file.name.startswith(f"{target.name}.")):
                    raise CheckpointError(f"{place}: is there already; move it, or replace it with --force")
            if not place.exists():
                placed.append(place)
            if place.exists() and (place.is_dir() or file.is_dir()):  # the system replaces files alone
                _exchange(file, place, stage / "replaced")
            else:
                file.replace(place)
    except BaseException:
        for place in placed:
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        raise


def _exchange(new: Path, place: Path, old: Path) -> None:
    place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        old.rename(place)
        raise


def check_room(folder: Path, model: Checkpoint, formats: Mapping[str, str]) -> None:
    """Raise CheckpointError when the disk of a staging folder has no room for the model's tensors in `formats`."""
    need = sum(nbytes(formats[name], tensor.shape) for name, tensor in model.tensors.items())
    need += sum(tensor.nbytes for tensor in model.extras.values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"{folder.parent}: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; free some, or choose "
            "another place"
        )


def beside(model: Path, name: str) -> Path:
    """Where a file that belongs to a model is: in its folder, or beside its file, whose name is put in front."""
    return model / name if model.is_dir() else model.with_name(f"{model.name}.{name}")


def carry_terms(source: Path, model: Checkpoint, place: Path) -> None:
    """Copy licence, use policy and their like to the model that was written at `place`."""
    for name, terms in _terms(source, model, card=place.is_dir()):
        shutil.copyfile(terms, beside(place, name))


def _terms(source: Path, model: Checkpoint, *, card: bool) -> Iterator[tuple[str, Path]]:
    """Names and places of the files to pass on: those of the folder, or beside a file, where its own have its name in
    front. Meta's lie beside the tokenizer, which may be one folder up.
    """
    folder, prefix = (source, "") if source.is_dir() else (source.parent, f"{source.name}.")
    if model.format == "meta" and not (folder / "tokenizer.model").exists():
        folder = folder.parent
    found = {}
    for path in sorted(folder.iterdir()):
        for name in {path.name, path.name.removeprefix(prefix)}:
            wanted = _TERMS.fullmatch(name) or (card and source.is_dir() and name == _CARD)
            if wanted and path.is_file() and (name not in found or name != path.name):
                found[name] = files.refuse_links_out(path)
    yield from found.items()
