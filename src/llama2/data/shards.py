"""A built corpus on disk: files of token ids under a manifest of hashes, read memory-mapped.

    manifest.json          what the rest is (Manifest)
    tokenizer.model|json   the tokenizer, so that a model that is trained on the corpus can be saved whole
    train-00000.tokens     little-endian token ids; each document ends with EOS, and begins with BOS where texts do
    train-00000.documents  where in it each document begins, as little-endian uint64

A split is one or more such pairs, and is read as one stream of tokens. A file may have any size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import pydantic
from numpy.typing import NDArray

from llama2 import files as safely
from llama2.errors import DataError
from llama2.text import tokenizer_folder
from llama2.text.tokenizer import Tokenizer

MANIFEST = "manifest.json"

Split = Literal["train", "validation"]


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One pair of files: their common name, how many tokens and documents are in them, and their SHA-256.

    `sources` has how many of the documents are of each source, in their order.
    """

    name: str = pydantic.Field(pattern=r"^[a-z]+-\d+$")  # a name without a path: a manifest names no file elsewhere
    tokens: int = pydantic.Field(ge=0)
    documents: int = pydantic.Field(ge=0)
    tokens_sha256: str
    documents_sha256: str
    sources: dict[str, int] = {}


class TokenizerFile(_Record):
    """The tokenizer's file in the folder, its SHA-256, and its number of tokens."""

    file: Literal["tokenizer.model", "tokenizer.json"]
    sha256: str
    vocabulary: int = pydantic.Field(ge=1)
    bos_id: int | None = pydantic.Field(ge=0)
    eos_id: int = pydantic.Field(ge=0)


class Manifest(_Record):
    """What a folder of shards says of itself; `sources` has each source's documents and tokens, by split."""

    version: Literal[1] = 1
    tokenizer: TokenizerFile
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, list[Shard]]
    sources: dict[str, dict[Split, dict[str, int]]] = {}

    @classmethod
    def of(
        cls,
        file: Path,
        tokenizer: Tokenizer,
        shards: Mapping[Split, Sequence[Shard]],
        sources: Mapping[str, Mapping[Split, Mapping[str, int]]],
    ) -> Manifest:
        """The manifest of shards whose tokens the tokenizer in `file` made."""
        return cls(
            tokenizer=TokenizerFile(
                file="tokenizer.json" if file.suffix == ".json" else "tokenizer.model",
                sha256=sha256(file),
                vocabulary=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id or 0,
            ),
            dtype=dtype_of(tokenizer.vocab_size),
            splits={split: list(each) for split, each in shards.items()},
            sources={name: {s: dict(c) for s, c in splits.items()} for name, splits in sources.items()},
        )


def dtype_of(vocabulary: int) -> Literal["uint16", "uint32"]:
    """The type that holds every id of a vocabulary."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


class Writer:
    """Writes one pair of files, a document at a time. `shard` says what was written, once it is closed.

    The files take their names when they are whole; after an exception nothing is left of them. Memory is bounded by
    the longest document.
    """

    def __init__(self, folder: Path, split: Split, task: int, vocabulary: int) -> None:
        self.shard: Shard | None = None
        self._vocabulary = vocabulary
        self._dtype = np.dtype(dtype_of(vocabulary)).newbyteorder("<")
        self._name = f"{split}-{task:05d}"
        self._writing = ExitStack()
        self._open = {
            kind: _Hashed(self._writing.enter_context(safely.create(folder / f"{self._name}.{kind}", error=DataError)))
            for kind in ("tokens", "documents")
        }
        self._tokens = self._documents = 0

    def add(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """A document's token ids, BOS and EOS among them. Raises DataError for one outside the vocabulary."""
        tokens = np.asarray(ids, np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocabulary)][0]
            raise DataError(f"{self._name}: token id {wrong} is outside the vocabulary of {self._vocabulary} tokens")
        self._open["documents"].write(np.array(self._tokens, "<u8").tobytes())
        self._open["tokens"].write(tokens.astype(self._dtype).tobytes())
        self._tokens += len(tokens)
        self._documents += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writing.__exit__(kind, error, trace)
        if kind is None:
            self.shard = Shard(
                name=self._name,
                tokens=self._tokens,
                documents=self._documents,
                tokens_sha256=self._open["tokens"].sha256(),
                documents_sha256=self._open["documents"].sha256(),
            )


class _Hashed:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def sha256(self) -> str:
        return self._hash.hexdigest()


def finish(folder: Path, tokenizer: Path, manifest: Manifest) -> None:
    """Copy the tokenizer beside what was written, and write the manifest last: a folder without one is not a corpus."""
    for name, data in (
        (manifest.tokenizer.file, tokenizer.read_bytes()),
        (MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n"),
    ):
        with safely.create(folder / name, error=DataError) as file:
            file.write(data)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a corpus. Raises DataError when there is none, or it is not whole."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: is not a corpus, {MANIFEST} is missing; make it with `llama2 data build`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where}: {first['msg']}; build the corpus again with `llama2 data build`") from None


@dataclass(frozen=True)
class Shards:
    """One split of a corpus, a stream of `tokens` tokens."""

    folder: Path
    split: Split
    manifest: Manifest
    _files: tuple[NDArray[Any], ...]  # token ids of each file
    _documents: tuple[NDArray[Any], ...]  # document starts in each file

    @classmethod
    def open(cls, folder: Path, split: Split, verify: bool = True) -> Shards:
        """Map a split's files. Sizes are always checked, with `verify` also hashes, which reads every byte.

        Raises DataError for a file that is missing, has another size or hash, or a split that is not there.
        """
        manifest = read_manifest(folder)
        shards = manifest.splits.get(split, [])
        if not sum(shard.tokens for shard in shards):
            there = ", ".join(name for name, each in manifest.splits.items() if any(s.tokens for s in each)) or "none"
            raise DataError(f"{folder}: has no tokens for {split} (it has: {there}); build it with more documents")
        _check(folder / manifest.tokenizer.file, None, manifest.tokenizer.sha256)
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        files: list[NDArray[Any]] = []
        documents: list[NDArray[Any]] = []
        for shard in shards:
            for kind, item, count, digest, into in (
                ("tokens", dtype, shard.tokens, shard.tokens_sha256, files),
                ("documents", np.dtype("<u8"), shard.documents, shard.documents_sha256, documents),
            ):
                path = folder / f"{shard.name}.{kind}"
                _check(path, count * item.itemsize, digest if verify else None)
                into.append(np.memmap(path, item, "r") if count else np.zeros(0, item))  # nothing cannot be mapped
        return cls(folder, split, manifest, tuple(files), tuple(documents))

    @cached_property
    def tokens(self) -> int:
        """How many tokens the split has."""
        return int(self._ends[-1])

    @property
    def documents(self) -> int:
        """How many documents the split has."""
        return sum(map(len, self._documents))

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.folder / self.manifest.tokenizer.file

    @cached_property
    def sha256(self) -> str:
        """The manifest's hash, and so that of everything it names: what a resumed run must find again."""
        return sha256(self.folder / MANIFEST)

    @property
    def sources(self) -> list[tuple[int, str]]:
        """Where in the stream documents of a source begin, and its name; nothing for a corpus that does not say it."""
        found = []
        base = 0
        for shard, documents in zip(self.manifest.splits[self.split], self._documents, strict=True):
            first = 0
            for name, count in shard.sources.items():
                if 0 < count <= len(documents) - first:
                    found.append((base + int(documents[first]), name))
                    first += count
            base += shard.tokens
        return found

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(file) for file in self._files], dtype=np.int64)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids [start, stop) of the stream, a copy. Raises IndexError beyond its ends."""
        parts = [file[a:b] for file, _, a, b, _ in self._parts(start, stop)]
        return np.concatenate(parts, dtype=np.int64) if parts else np.zeros(0, np.int64)

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where in the stream documents begin, of those that begin in [start, stop). Raises IndexError as `read`."""
        found = [np.zeros(0, np.int64)]
        for _, documents, a, b, base in self._parts(start, stop):
            low, high = np.searchsorted(documents, np.array([a, b], np.uint64))
            found.append(documents[low:high].astype(np.int64) + base)
        return np.concatenate(found)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises TokenizerError."""
        own = self.manifest.tokenizer
        return tokenizer_folder.read(self.folder, size=own.vocabulary, bos_id=own.bos_id, eos_id=own.eos_id)

    def check_tokenizer(self, path: Path) -> None:
        """Raise DataError unless the file at `path` is the tokenizer that made these tokens."""
        if sha256(path) != self.manifest.tokenizer.sha256:
            raise DataError(
                f"{path}: is not the tokenizer of {self.folder}; use {self.tokenizer}, or build the corpus anew"
            )

    def _parts(self, start: int, stop: int) -> list[tuple[NDArray[Any], NDArray[Any], int, int, int]]:
        """(token ids, document starts, first, end, offset in the stream) of each file that has some of the range."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.tokens}")
        first, last = np.searchsorted(self._ends, [start, stop], side="right")
        parts = []
        for i in range(int(first), min(int(last) + 1, len(self._files))):
            base = int(self._ends[i]) - len(self._files[i])
            a, b = max(start - base, 0), min(stop - base, len(self._files[i]))
            if a < b:
                parts.append((self._files[i], self._documents[i], a, b, base))
        return parts


def sha256(path: Path) -> str:
    """A file's SHA-256. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _check(path: Path, size: int | None, digest: str | None) -> None:
    again = "build the corpus again with `llama2 data build`"
    if not path.is_file():
        raise DataError(f"{path}: is missing; {again}")
    if size is not None and path.stat().st_size != size:
        raise DataError(f"{path}: has {path.stat().st_size} bytes, and the manifest says {size}; {again}")
    if digest is not None and sha256(path) != digest:
        raise DataError(f"{path}: has another SHA-256 than the manifest says, so it was changed or damaged; {again}")
