"""Token shards: bytes on disk, the stream across files, and what a damaged corpus is answered with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.data import shards
from llama2.data.shards import Shards
from llama2.errors import DataError


def build(folder: Path, files: list[list[list[int]]], vocabulary: int = 100) -> Path:
    """A corpus with a split `train` of so many files of documents of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / "its.model"
    source.write_bytes(b"a tokenizer")
    written = []
    for task, documents in enumerate(files):
        with shards.Writer(folder, "train", task, vocabulary) as writer:
            for ids in documents:
                writer.add(ids)
        assert writer.shard
        written.append(writer.shard)
    manifest = shards.Manifest(
        tokenizer=shards.TokenizerFile(
            file="tokenizer.model", sha256=shards.sha256(source), vocabulary=vocabulary, bos_id=1, eos_id=2
        ),
        dtype=shards.dtype_of(vocabulary),
        splits={"train": written, "validation": []},
        sources={"s": {"train": {"documents": 1, "tokens": 2}}},
    )
    shards.finish(folder, source, manifest)
    return folder


def test_bytes_on_disk(tmp_path: Path) -> None:
    folder = build(tmp_path / "c", [[[1, 7, 2], [1, 300, 2]]], vocabulary=65536)
    assert (folder / "train-00000.tokens").read_bytes() == bytes([1, 0, 7, 0, 2, 0, 1, 0, 44, 1, 2, 0])
    assert (folder / "train-00000.documents").read_bytes() == bytes(8) + bytes([3, 0, 0, 0, 0, 0, 0, 0])
    assert (folder / "tokenizer.model").read_bytes() == b"a tokenizer"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["dtype"] == "uint16"
    assert manifest["splits"]["train"] == [
        {
            "name": "train-00000",
            "tokens": 6,
            "documents": 2,
            "tokens_sha256": hashlib.sha256((folder / "train-00000.tokens").read_bytes()).hexdigest(),
            "documents_sha256": hashlib.sha256((folder / "train-00000.documents").read_bytes()).hexdigest(),
            "sources": {},
        }
    ]
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(b"a tokenizer").hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "tokenizer.model",
        "train-00000.documents",
        "train-00000.tokens",
    ]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    folder = build(tmp_path / "c", [[[65536]]], vocabulary=65537)
    assert (folder / "train-00000.tokens").read_bytes() == (65536).to_bytes(4, "little")
    assert Shards.open(folder, "train").read(0, 1).tolist() == [65536]


@given(
    files=st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_files_read_as_one_stream(
    files: list[list[list[int]]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flat = [token for documents in files for ids in documents for token in ids]
    lengths = [len(ids) for documents in files for ids in documents]
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    folder = build(tmp_path_factory.mktemp("c") / "c", files)
    if not flat:
        with pytest.raises(DataError, match="no tokens for train"):
            Shards.open(folder, "train")
        return
    opened = Shards.open(folder, "train")
    assert (opened.tokens, opened.documents) == (len(flat), len(lengths))
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert opened.read(start, stop).tolist() == flat[start:stop]
    assert opened.read(start, stop).dtype == np.int64
    assert opened.starts(start, stop).tolist() == [at for at in begins if start <= at < stop]
    for wrong in ((-1, 0), (0, len(flat) + 1), (1, 0)):
        with pytest.raises(IndexError):
            opened.read(*wrong)


def test_an_id_outside_the_vocabulary_leaves_nothing(tmp_path: Path) -> None:
    for ids in ([0, 100], [-1]):
        with (
            pytest.raises(DataError, match="outside the vocabulary of 100"),
            shards.Writer(tmp_path, "train", 0, 100) as writer,
        ):
            writer.add(ids)
    assert not list(tmp_path.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_damage_is_named_with_its_file(tmp_path: Path) -> None:
    for number, (name, damage, words) in enumerate(
        [
            ("train-00000.tokens", flip, "another SHA-256"),
            ("train-00000.documents", flip, "another SHA-256"),
            ("tokenizer.model", flip, "another SHA-256"),
            ("train-00000.tokens", lambda path: path.write_bytes(b"123"), "has 3 bytes, and the manifest says 8"),
            ("train-00000.documents", Path.unlink, "is missing"),
            ("manifest.json", lambda path: path.write_text("{"), "Invalid JSON"),
            (
                "manifest.json",
                lambda path: path.write_text(path.read_text().replace("train-00000", "../train-00000")),
                "splits.train.0.name",
            ),
            ("manifest.json", lambda path: path.write_text(path.read_text().replace("uint16", "int8")), "dtype"),
        ]
    ):
        folder = build(tmp_path / str(number) / "c", [[[1, 5, 6, 2]]])
        damage(folder / name)
        with pytest.raises(DataError) as caught:
            Shards.open(folder, "train")
        assert str(caught.value).startswith(f"{folder / name}: ")
        assert words in str(caught.value)
        assert "llama2 data build" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_hashes_can_be_left_unread(tmp_path: Path) -> None:
    folder = build(tmp_path / "c", [[[1, 5, 6, 2]]])
    flip(folder / "train-00000.tokens")
    assert Shards.open(folder, "train", verify=False).read(0, 4).tolist() == [0, 5, 6, 2]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a corpus"):
        Shards.open(tmp_path, "train")
    folder = build(tmp_path / "c", [[[1, 2]]])
    with pytest.raises(DataError, match=r"no tokens for validation \(it has: train\)"):
        Shards.open(folder, "validation")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    opened = Shards.open(build(tmp_path / "c", [[[1, 2]]]), "train")
    opened.check_tokenizer(opened.tokenizer)
    (tmp_path / "other.model").write_bytes(b"another")
    with pytest.raises(DataError, match="is not the tokenizer of"):
        opened.check_tokenizer(tmp_path / "other.model")


def test_where_sources_begin(tmp_path: Path) -> None:
    """Two files, of 2 + 3 + 4 and 5 tokens: the first of one document of a and two of b, the second of b alone."""
    folder = build(tmp_path / "c", [[[1, 2], [1, 3, 2], [1, 3, 4, 2]], [[1, 3, 4, 5, 2]]])
    assert Shards.open(folder, "train").sources == []
    manifest = json.loads((folder / "manifest.json").read_bytes())
    first, second = manifest["splits"]["train"]
    first["sources"], second["sources"] = {"a": 1, "b": 2}, {"a": 0, "b": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Shards.open(folder, "train").sources == [(0, "a"), (2, "b"), (9, "b")]
    first["sources"] = {"a": 7, "b": -1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Shards.open(folder, "train").sources == [(9, "b")]
