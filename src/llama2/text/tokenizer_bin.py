"""llama2.c's `tokenizer.bin` ⇄ a SentencePiece vocabulary (spec 1.4d; its tokenizer.py and run.c).

A file is the length of the longest token, then score, length and bytes of each, with spaces for U+2581. It does not
say the types of tokens. They follow from their places: unknown, beginning and end of text, then bytes and others.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from llama2 import files
from llama2.errors import TokenizerError
from llama2.text.tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Tokenizer, Vocabulary, from_pieces

_LONGEST = struct.Struct("<I")
_TOKEN = struct.Struct("<fI")  # score, length
_FIRST = ("<unk>", "\n<s>\n", "\n</s>\n")  # tokens 0, 1 and 2 as a file spells them


def matches(path: Path) -> bool:
    """Whether a file is a `tokenizer.bin`: its longest token has less than 2^16 bytes.

    No SentencePiece model has zeros in these places.
    """
    return files.first_bytes(path, _LONGEST.size)[2:] == b"\0\0"


def read(path: Path, size: int) -> Tokenizer:
    """The tokenizer of a file with `size` tokens.

    Raises TokenizerError when the file has fewer or more, or its tokens are not a Llama's.
    """
    data = files.read(path, error=TokenizerError)
    pieces: list[bytes] = []
    scores: list[float] = []
    at = _LONGEST.size

    def take(nbytes: int) -> bytes:
        nonlocal at
        start, at = at, at + nbytes
        if at > len(data):
            raise TokenizerError(
                f"{path}: token {len(pieces)} needs bytes {start} to {at}, and the file ends at {len(data)}; it is "
                "damaged or cut short, fetch it again"
            )
        return data[start:at]

    while len(pieces) < size:
        score, length = _TOKEN.unpack(take(_TOKEN.size))
        pieces.append(take(length))
        scores.append(score)
    if at != len(data):
        raise TokenizerError(f"{path}: has more than the model's {size} tokens; give the model's own tokenizer")
    for token, text in enumerate(_FIRST):
        if pieces[token : token + 1] != [text.encode()]:
            raise TokenizerError(f"{path}: its token {token} is not {text.strip()}; give the model's own tokenizer")
    pieces[: len(_FIRST)] = [text.strip().encode() for text in _FIRST]
    types = [BYTE if re.fullmatch(rb"<0x[0-9A-F]{2}>", piece) else NORMAL for piece in pieces]
    types[: len(_FIRST)] = UNKNOWN, CONTROL, CONTROL
    return from_pieces([piece.replace(b" ", SPACE.encode()) for piece in pieces], scores, types)


def pack(parts: Vocabulary) -> bytes:
    """The file of a SentencePiece vocabulary whose first three tokens are <unk>, <s> and </s>."""
    pieces = [piece.replace(SPACE, " ").encode() for piece in parts.pieces]
    pieces[: len(_FIRST)] = [text.encode() for text in _FIRST]
    tokens = (_TOKEN.pack(score, len(piece)) + piece for score, piece in zip(parts.scores or (), pieces, strict=True))
    return _LONGEST.pack(max(map(len, pieces))) + b"".join(tokens)
