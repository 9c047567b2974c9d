"""Cached artifacts of a vocabulary: used from the second time on, never believed when it may be another file's."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama2.text.tokenizer
from llama2 import checkpoint
from llama2.checkpoint import gguf
from llama2.errors import TokenizerError
from models import TokenizerKind, tiny_config, write_tiny_gguf

TEXT = "the taste of a rib — ☃ is "


@pytest.fixture(params=["sentencepiece", "bpe"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "packed" / "vocabulary.bin"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by an entry whenever a vocabulary is taken in piece by piece."""
    calls: list[Any] = []
    texts = llama2.text.tokenizer._texts
    monkeypatch.setattr(llama2.text.tokenizer, "_texts", lambda pieces: calls.append(pieces) or texts(pieces))
    return calls


def write(path: Path, tokenizer: TokenizerKind, **changes: object) -> Path:
    write_tiny_gguf(path, tokenizer=tokenizer, config=tiny_config(**changes))
    return path


def ids(model: Path, place: Path | None) -> list[int]:
    """Of a text that has words of the vocabulary, others, and characters of several bytes."""
    tokenizer = checkpoint.open(model, vocabulary=place).tokenizer
    encoded = tokenizer.encode(TEXT)
    assert tokenizer.decode(encoded) == TEXT
    return [*encoded, *tokenizer.control.values(), *sorted(tokenizer.stop_ids), tokenizer.vocab_size]


def test_the_second_start_takes_what_the_first_one_cached(model: Path, place: Path, prepared: list[Any]) -> None:
    plain = ids(model, None)
    assert [ids(model, place) for _ in range(3)] == [plain] * 3
    assert len(prepared) == 2
    assert [*place.parent.iterdir()] == [place]
    first, again = (checkpoint.open(model, vocabulary=path) for path in (None, place))
    assert [*first.metadata["tokenizer.ggml.tokens"]] == [*again.metadata["tokenizer.ggml.tokens"]]
    assert first.config == again.config
    assert first.tensors.keys() == again.tensors.keys()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b"another file\n" + b[13:],
        lambda b: b[:24] + (1 << 60).to_bytes(8, "little") + b[32:],
        lambda b: b.replace(b'"sizes"', b'"sixes"', 1),
        lambda b: b[:-64],
        lambda b: b + bytes(64),
        lambda b: b[:999] + bytes([b[999] ^ 1]) + b[1000:],
        lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 128]) + b[len(b) // 2 + 1 :],
    ],
    ids=["empty", "magic", "length", "header", "cut", "longer", "a bit near the start", "a bit in the middle"],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[bytes], bytes], model: Path, place: Path, prepared: list[Any]
) -> None:
    plain = ids(model, place)
    whole = place.read_bytes()
    assert damage(whole) != whole
    place.write_bytes(damage(whole))
    assert ids(model, place) == plain
    assert place.read_bytes() == whole
    assert len(prepared) == 2


def test_another_model_at_the_same_path_is_taken_in_anew(model: Path, place: Path, prepared: list[Any]) -> None:
    before, stat = ids(model, place), model.stat()
    a, b = (b"\x01\0\0\0\0\0\0\0" + letter for letter in (b"a", b"b"))
    model.write_bytes(b.join(part.replace(b, a) for part in model.read_bytes().split(a)))  # exchanges two tokens
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ids(model, place) == ids(model, None) != before
    assert len(prepared) == 3


def test_another_layout_is_taken_in_anew(
    model: Path, place: Path, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ids(model, place)
    monkeypatch.setattr(gguf, "_LAYOUT", gguf._LAYOUT + 1)
    assert ids(model, place) == plain
    assert len(prepared) == 2


@pytest.mark.parametrize("obstacle", ["a file where the folder should be", "a folder where the file should be"])
def test_without_a_place_nothing_is_cached(obstacle: str, model: Path, place: Path, prepared: list[Any]) -> None:
    if obstacle.startswith("a file"):
        place.parent.write_text("not a folder")
    else:
        (place / "x").mkdir(parents=True)
    assert ids(model, place) == ids(model, place) == ids(model, None)
    assert len(prepared) == 3
    assert not [*place.parent.glob("*.tmp")]


def test_a_vocabulary_that_is_refused_is_not_cached(model: Path, place: Path) -> None:
    model.write_bytes(model.read_bytes().replace(b"\x01\0\0\0\0\0\0\0b", b"\x01\0\0\0\0\0\0\0a"))  # token b: a again
    for _ in range(2):
        with pytest.raises(TokenizerError, match="has token 'a' twice"):
            ids(model, place)
    assert not place.exists()
