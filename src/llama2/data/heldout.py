"""What is held out for validation: of many documents a share, of few as much as can be measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document

from llama2.data.dedup import duplicates
from llama2.data.settings import BuildRecipe
from llama2.data.shards import Split
from llama2.data.stage import Stage, counts, fraction
from llama2.errors import DataError

#: A source is small when its share would be fewer documents, or fewer bytes. Of a small one at least so many bytes are
#: held out, but no more than a tenth.
_DOCUMENTS, _BYTES, _MOST = 5, 1 << 14, 0.1
#: Documents of a source that a task lists. A source with more of them in a task is not small.
_LISTED = 10_000


class List(Stage):
    """Writes the names and sizes of a task's documents, of sources that may be small."""

    name = "list"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        listed: dict[str, list[tuple[int, str, int]] | None] = {}
        for number, document in enumerate(data):
            source = document.metadata["source"]
            some = listed.setdefault(source, [])
            if some is not None:
                size = len(document.text.encode("utf-8", "replace"))
                some.append((number, str(document.id), size))
                if len(some) > _LISTED:
                    listed[source] = None
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{rank:05d}.json").write_text(json.dumps(listed))


class HoldOut(Stage):
    """Chooses what small sources hold out: documents by their place as others do, and the end of one at the last.

    Raises DataError for a source of which nothing is left.
    """

    name = "hold out"

    def __init__(self, recipe: BuildRecipe, listed: Path, removed: Path, logs: Path, file: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.listed = listed
        self.removed = removed  # duplicates, where the recipe wants it
        self.logs = logs  # of what listed them
        self.file = file

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        sources: dict[str, list[tuple[str, int]] | None] = {}
        for path in sorted(self.listed.glob("*.json")):
            gone = duplicates(self.removed, int(path.stem))
            for source, some in json.loads(path.read_bytes()).items():
                known = sources.setdefault(source, [])
                if some is None or known is None:
                    sources[source] = None
                else:
                    known += [(key, size) for number, key, size in some if number not in gone]
        for name in self.recipe.sources:
            if sources.get(name, []) == []:
                counted = ", ".join(f"{count:g} {what}" for what, count in counts(self.logs)[name].items())
                raise DataError(f"sources.{name}: none of its documents was kept ({counted}); fix it, or leave it out")
        held = {name: chosen(some, self.recipe.validation) for name, some in sources.items() if some}
        self.file.write_text(json.dumps({name: each for name, each in held.items() if each is not None}))
        yield from ()


def chosen(documents: list[tuple[str, int]], share: float) -> dict[str, int] | None:
    """Of documents by name and size, those that are held out, with the bytes of each that are not; None: not a few."""
    size = sum(size for _, size in documents)
    if not share or (len(documents) * share >= _DOCUMENTS and size * share >= _BYTES):
        return None
    wanted = left = max(share * size, min(_MOST * size, _BYTES))
    held = {}
    for key, each in sorted(documents, key=lambda document: fraction(document[0], "validation")):
        if each > left:
            if left > wanted / 2:
                held[key] = each - round(left)
            break
        held[key] = 0
        left -= each
    return held


class HeldOut:
    """Divides documents in train and validation."""

    def __init__(self, recipe: BuildRecipe, file: Path) -> None:
        """Read what `HoldOut` chose."""
        self._share = recipe.validation
        self._small: dict[str, dict[str, int]] = json.loads(file.read_bytes())

    def parts(self, document: Document) -> list[tuple[Split, str]]:
        """The document's text, in one split, or cut in two."""
        text, small = document.text, self._small.get(document.metadata["source"])
        if small is None:
            held = fraction(document.id, "validation") < self._share
            return [("validation" if held else "train", text)]
        place = cut(text, small[document.id]) if document.id in small else len(text)
        parts: list[tuple[Split, str]] = [("train", text[:place]), ("validation", text[place:])]
        return [(split, part) for split, part in parts if part.strip()]


def cut(text: str, size: int) -> int:
    """Where to cut a text after about `size` bytes: before a paragraph, else a line, else a word."""
    place = len(text.encode("utf-8", "replace")[:size].decode(errors="ignore"))
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, max(0, 2 * place - len(text)), place)
        if found > 0:
            return found + len(separator)
    return place
