"""SentencePiece's model file as bytes: protobuf's wire format, as much of it as a vocabulary needs.

The library takes a whole `ModelProto` and nothing else, so a vocabulary that comes without one, as in GGUF, is
written as one. Field numbers are those of `sentencepiece_model.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of SentencePiece
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _TYPES = 1, range(1, 7)  # SentencePiece.Type
_SHORT = 256  # bytes of a piece's field


class ParsedModel(NamedTuple):
    """A model that was read. `plain`: BPE that changes nothing in a text but spaces to U+2581, as `build` makes it."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    unk_id: int
    add_dummy_prefix: bool
    plain: bool


def read(model: bytes) -> ParsedModel:
    """What a whole model says, with protobuf's defaults where it is silent."""
    vocabulary = []
    trainer: dict[int, int] = {}  # by field: a number, or the length of anything else
    normalizer: dict[int, int] = {}
    for number, _, body, end in _fields(model):
        if number == _PIECES:
            text, score, kind = _parse(model, body, end)
            vocabulary.append((text.decode(), score, kind))
        elif number in (_TRAINER, _NORMALIZER):
            facts = trainer if number == _TRAINER else normalizer
            for field, tag, start, stop in _fields(model, body, end):
                facts[field] = stop - start if model[tag] & 7 else _read_varint(model, start)[0]
    bpe = trainer.get(3, 1) == _BPE and not trainer.get(24, False)  # and spaces before words, not behind
    unchanged = not normalizer.get(2, 0) and not normalizer.get(4, True) and bool(normalizer.get(5, True))
    return ParsedModel(vocabulary, trainer.get(40, 0), bool(normalizer.get(3, True)), bpe and unchanged)


def pieces(added: Iterable[tuple[str, float, int]]) -> bytes:
    """What, behind a model's bytes, gives it more pieces: text, score and type of each."""
    return b"".join(_piece(text.encode(), score, kind) for text, score, kind in added)


def dummy_prefix(adds: bool) -> bytes:
    """What, behind a model's bytes, decides whether it puts a space before a text: fields that come later count."""
    return _bytes(_NORMALIZER, _number(3, adds))


def build(
    texts: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unk_id: int,
    bos_id: int | None,
    eos_id: int | None,
    byte_fallback: bool,
    add_dummy_prefix: bool,
) -> bytes:
    """A BPE model with these pieces that changes nothing in a text but spaces to U+2581 (spec 2.1)."""
    vocabulary = pieces(zip(texts, scores, types, strict=True))
    trainer = _number(3, _BPE) + _number(4, len(texts)) + _number(35, byte_fallback) + _bytes(44, " ⁇ ".encode())
    trainer += _number(40, unk_id) + _bytes(45, texts[unk_id].encode())
    for id_field, text_field, token in ((41, 46, bos_id), (42, 47, eos_id)):
        if token is not None:
            trainer += _number(id_field, token) + _bytes(text_field, texts[token].encode())
    normalizer = _bytes(1, b"identity") + _number(3, add_dummy_prefix) + _number(4, False) + _number(5, True)
    return vocabulary + _bytes(_TRAINER, trainer) + _bytes(_NORMALIZER, normalizer)


def retype(model: bytes, change: Callable[[int, str, int], int]) -> tuple[bytes, list[int]]:
    """`model` with the type of each piece replaced by `change(token, text, type)`, and all types.

    Normal pieces that are short are not passed to it. Raises ValueError, KeyError or IndexError when the model is not
    whole: the library itself takes one that was cut between two pieces.
    """
    found: set[int] = set()
    changed: list[bytes] = []
    types: list[int] = []
    for number, start, body, end in _fields(model):
        found.add(number)
        field = model[start:end]
        if number == _PIECES:
            new = _NORMAL
            if _TYPE << 3 in field or len(field) > _SHORT:
                text, score, kind = _parse(model, body, end)
                new = change(len(types), text.decode(), kind)
                if new != kind:
                    field = _piece(text, score, new)
            types.append(new)
        changed.append(field)
    if not {_PIECES, _TRAINER, _NORMALIZER} <= found:
        raise ValueError("pieces, trainer or normalizer are missing")
    return b"".join(changed), types


def _parse(model: bytes, at: int, end: int) -> tuple[bytes, float, int]:
    """Text, score and type of a piece. Like protobuf, it passes over a field of another kind, and an unknown type."""
    values = {(field, model[tag] & 7): model[start:stop] for field, tag, start, stop in _fields(model, at, end)}
    (score,) = struct.unpack("<f", values.get((_SCORE, 5), bytes(4)))
    kind, _ = _read_varint(values.get((_TYPE, 0), b"\1"), 0)
    return values[_TEXT, 2], score, kind if kind in _TYPES else _NORMAL


def _piece(text: bytes, score: float, kind: int) -> bytes:
    piece = b"\x0a" + _varint(len(text)) + text + struct.pack("<BfBB", 0x15, score, _TYPE << 3, kind)
    return b"\x0a" + _varint(len(piece)) + piece


@lru_cache(maxsize=256)
def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number longer than ten bytes")


def _fields(data: bytes, at: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """(field number, offset of the field, offset of its value, offset after it) of each field of a message."""
    end = len(data) if end is None else end
    while at < end:
        start = at
        tag, at = _read_varint(data, at)
        wire = tag & 7
        if wire == 0:
            body = at
            _, at = _read_varint(data, at)
        elif wire in (1, 5):
            body = at
            at += 8 if wire == 1 else 4
        elif wire == 2:
            length, body = _read_varint(data, at)
            at = body + length
        else:
            raise ValueError(f"unknown wire type {wire}")
        if at > end:
            raise ValueError("a field reaches past the end")
        yield tag >> 3, start, body, at
