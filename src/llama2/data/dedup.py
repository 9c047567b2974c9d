"""Exact and near duplicates: signatures of documents, in the files that datatrove's MinHash stages compare.

A near duplicate shares most of its 5-grams of words. 14 bands of 8 minimal hashes find one of similarity s with
probability 1 - (1 - s⁸)¹⁴ (Broder 1997; bands as in FineWeb). That is 0.92 at s = 0.8 and 0.05 at s = 0.5. An exact
duplicate is found by a hash of the whole text, which is one band more. Documents that are equal in a band are one
cluster, and one document of each cluster stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
from datatrove.utils.hashing import HashConfig
from numpy.typing import NDArray

from llama2.data.settings import Dedup
from llama2.data.stage import Stage
from llama2.data.words import Hashes, Words

_ROWS = 8  # hashes of a band, which is as many 32-bit numbers as SHA-256 has
_BLOCK = 2048  # shingles at a time, so that their hashes stay in the processor's cache
#: A signature and its document's number, as datatrove reads them.
_RECORD = np.dtype([("signature", "<u4", (_ROWS,)), ("document", "<u4")])


def bands(settings: Dedup) -> int:
    """How many bands a signature has: those of MinHash, then that of the whole text."""
    return settings.near * settings.bands + settings.exact


def minhash(shingles: Hashes, count: int) -> NDArray[np.uint32]:
    """The least value of each of `count` random functions over all shingles, (S,) → (count,); S is at least 1."""
    random = np.random.default_rng(1)
    factors = random.integers(0, 1 << 32, count, dtype=np.uint32) | np.uint32(1)
    shifts = random.integers(0, 1 << 32, count, dtype=np.uint32)
    values = (shingles >> np.uint64(32)).astype(np.uint32)
    least = np.full(count, 0xFFFFFFFE, np.uint32)  # datatrove takes the greatest number for an end
    for start in range(0, len(values), _BLOCK):
        hashed = values[start : start + _BLOCK] * factors[:, None] + shifts[:, None]  # (count, _BLOCK)
        np.minimum(least, hashed.min(axis=1), out=least)
    return least


class MinhashSignatures(Stage):
    """Writes the signatures of a task's documents, and passes the documents on."""

    name = "minhash signatures"

    def __init__(self, settings: Dedup, folder: Path) -> None:
        super().__init__()
        self.settings = settings
        self.folder = folder

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        signatures: list[list[bytes]] = [[] for _ in range(bands(self.settings))]
        for number, document in enumerate(data):
            for band, signature in enumerate(self._signatures(document)):
                if signature is not None:
                    signatures[band].append(signature + number.to_bytes(4, "little"))
            yield document
        for band, records in enumerate(signatures):
            place = self.folder / f"bucket_{band:03d}"
            place.mkdir(parents=True, exist_ok=True)
            table = np.frombuffer(b"".join(records), _RECORD)
            order = np.lexsort((table["document"], *table["signature"].T[::-1]))
            (place / f"{rank:05d}.minhash.sig").write_bytes(table[order].tobytes())

    def _signatures(self, document: Document) -> Iterator[bytes | None]:
        if self.settings.near:
            shingles = Words(document.text).grams(self.settings.words)
            hashes = minhash(shingles, self.settings.bands * _ROWS) if len(shingles) else None
            for band in range(self.settings.bands):
                yield None if hashes is None else hashes[band * _ROWS : (band + 1) * _ROWS].tobytes()
        if self.settings.exact:
            digest = np.frombuffer(hashlib.sha256(document.text.encode("utf-8", "replace")).digest(), "<u4")
            yield np.minimum(digest, 0xFFFFFFFE).astype("<u4").tobytes()


def _config(settings: Dedup) -> MinhashConfig:
    return MinhashConfig(
        num_buckets=bands(settings), hashes_per_bucket=_ROWS, hash_config=HashConfig(precision=32, hash_fc="sha1")
    )


def pair(settings: Dedup, signatures: Path, pairs: Path) -> MinhashDedupBuckets:
    """The step that finds documents with the same signature, a task a band."""
    return MinhashDedupBuckets(str(signatures), str(pairs), config=_config(settings), lines_to_buffer=1000)


def cluster(settings: Dedup, pairs: Path, removed: Path) -> MinhashDedupCluster:
    """The step that writes which documents to leave out, in one task."""
    return MinhashDedupCluster(str(pairs), str(removed), config=_config(settings), lines_to_buffer=1000)


def duplicates(removed: Path, rank: int) -> set[int]:
    """Numbers of a task's documents that `cluster` leaves out."""
    file = removed / f"{rank:06d}.remove"
    return set(np.fromfile(file, "<u4").tolist()) if file.exists() else set()


class Unique(Stage):
    """Leaves out a task's duplicates, and counts which of them are exact."""

    name = "unique"

    def __init__(self, settings: Dedup, pairs: Path, removed: Path) -> None:
        super().__init__()
        self.settings = settings
        self.pairs = pairs
        self.removed = removed

    def documents(self, data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        removed = duplicates(self.removed, rank)
        exact: set[int] = set()
        if self.settings.exact:
            table = np.fromfile(self.pairs / f"{bands(self.settings) - 1:05d}_00.dups", "<u4").reshape(-1, 2, 2)
            exact = set(table[table[:, :, 0] == rank][:, 1].tolist())
        for number, document in enumerate(data):
            if number in removed:
                self.count(document.metadata["source"], "exact duplicate" if number in exact else "near duplicate")
            else:
                yield document
