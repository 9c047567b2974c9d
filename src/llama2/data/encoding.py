"""Bytes → text: UTF-8, and where it is certain, UTF-16, UTF-32 and Windows-1252, which contains Latin-1."""

from __future__ import annotations

import codecs
import io
import re
from typing import IO, Any

_SAMPLE = 1 << 16  # bytes by which a file's encoding is found
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, with whose byte order mark it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: What begins files that are not text, but may have no NUL.
_NO_TEXT = (b"%PDF-", b"\x1f\x8b", b"PK\x03\x04", b"\x89PNG", b"\xff\xd8\xff", b"GIF8")

_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0e-\x1f\x7f]")
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
#: Letters of Western Europe, but those of cp1252 that code pages of DOS and the Macintosh have other letters for.
_LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿœŒ"
_OTHERS = "\xa0¡£¥§©ª«\xad®°±²³´·º»¼½¾¿×÷€‘’“”„‚…–—•™"
_WESTERN = re.compile(f"[\x00-\x7f{_LETTERS}{_OTHERS}]*")
#: Signs that are between letters of one word in no language; letters of another code page become such.
_INSIDE = re.compile(f"[a-z{_LETTERS}][{_OTHERS.replace('’', '').replace('´', '').replace('·', '')}][a-z{_LETTERS}]")
_MOST = 0.25  # of all letters that may be beyond ASCII
_LANGUAGES = frozenset(re.findall("..", "afcadadeeneseufifrgaglisitlbnbnlnnnoocptsv"))


def is_text(start: bytes) -> bool:
    """Whether a file that begins so is text: has no NUL, and is none of the kinds that are known to be something else.

    UTF-16 and UTF-32 are to be converted before (`opened`).
    """
    return b"\0" not in start and not start.startswith(_NO_TEXT)


def opened(file: IO[bytes]) -> tuple[IO[bytes], bytes, str | None]:
    """A file's bytes as UTF-8 where they are UTF-16 or UTF-32, its beginning, and the encoding that it had, else None.

    Certain is a byte order mark, or a NUL in every second place of text that has no others. Reading raises
    UnicodeDecodeError where the file breaks its encoding.
    """
    start = _read(file, _SAMPLE)
    name = next((name for bom, name in _BOMS if start.startswith(bom)), None) or _without_bom(start)
    joined = io.BufferedReader(_Joined(start, file))
    if name is None:
        return joined, start, None
    recoded = io.BufferedReader(_Recoded(joined, name))
    return recoded, recoded.peek(_SAMPLE), name


def _without_bom(start: bytes) -> str | None:
    half = len(start) // 2
    first, second = start[0::2].count(0), start[1::2].count(0)
    if half >= 8 and not first and second > 0.9 * half:
        return "utf-16-le"
    if half >= 8 and not second and first > 0.9 * half:
        return "utf-16-be"
    return None


def western(data: bytes) -> str | None:
    """Bytes that are not UTF-8, read as Windows-1252; None where they may as well be something else.

    What remains open is whether the text is in one of the languages that are written so (`is_western`).
    """
    if _CONTROLS.search(data) or _UTF8.search(data):
        return None
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    if not _WESTERN.fullmatch(text) or _INSIDE.search(text):
        return None
    letters = sum(map(str.isalpha, text))
    beyond = sum(c > "\x7f" and c.isalpha() for c in text)
    return text if beyond <= _MOST * letters else None


def is_western(language: str) -> bool:
    """Whether texts in a language (ISO 639) have all their letters in Windows-1252."""
    return language in _LANGUAGES


def _read(file: IO[bytes], size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end of the file."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Joined(io.RawIOBase):
    """What was read of a file already, and then the rest of it."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start, self._file = io.BytesIO(start), file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start.read(len(buffer)) or self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Recoded(io.RawIOBase):
    """A file of another encoding as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file, self._decoder, self._rest = file, codecs.getincrementaldecoder(encoding)(), io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest.read(len(buffer))
        while not data:
            read = self._file.read(_SAMPLE)
            text = self._decoder.decode(read, final=not read)
            if not read and not text:
                return 0
            self._rest = io.BytesIO(text.encode())
            data = self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
