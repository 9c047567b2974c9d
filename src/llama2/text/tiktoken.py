"""Llama 3's `tokenizer.model`: a line for each token with its bytes in base64 and its rank, as tiktoken reads it.

Two neighbours become one token where their bytes together are a token, the lowest rank first. Meta's code knows how
text is split into words and which control tokens follow the ranks; the file does not say it.
"""

from __future__ import annotations

import base64
import binascii
import re
from itertools import count
from pathlib import Path

from llama2 import files
from llama2.errors import TokenizerError
from llama2.text import bpe, library
from llama2.text.library import LibraryTokenizer
from llama2.text.tokenizer import CONTROL, MAX_PIECE, NORMAL, Ends, Tokenizer, Vocabulary

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_MAX_RANKS = 1 << 19
#: Control tokens behind the ranks that Llama 3 and 3.1 name; the others are reserved, and numbered in their order.
_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_NAMED_SINCE_31 = {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
_CONTROL = 256


def _control(path: Path) -> list[str]:
    """The control tokens: of Llama 3.1, or of Llama 3 where the params.json beside the file scales no rotation."""
    params = path.with_name("params.json")
    old = files.exists(params) and not files.load_json(params, error=TokenizerError).get("use_scaled_rope")
    named = _NAMED if old else _NAMED | _NAMED_SINCE_31
    reserved = (f"reserved_special_token_{number}" for number in count())
    return [f"<|{named.get(place) or next(reserved)}|>" for place in range(_CONTROL)]


def matches(data: bytes) -> bool:
    """Whether a file begins as tiktoken's do."""
    return _LINE.match(data[: 4 * MAX_PIECE]) is not None


def tokenizer(path: Path, data: bytes, size: int | None = None) -> Tokenizer:
    """The tokenizer of Llama 3 with the ranks of a file. Raises TokenizerError when the file is damaged.

    A model with `size` rows of embeddings has as many tokens.
    """
    ranks = _ranks(path, data)
    pieces = ["".join(bpe.LETTERS[byte] for byte in token) for token in ranks]
    total = len(pieces) + _CONTROL
    size = total if size is None else size
    if not len(pieces) <= size <= total:
        raise TokenizerError(
            f"{path}: has {len(pieces)} ranks and {_CONTROL} control tokens, and the model {size} rows"
        )
    pieces += _control(path)[: size - len(pieces)]
    types = [NORMAL] * len(ranks) + [CONTROL] * (size - len(ranks))
    parts = Vocabulary("bpe", pieces, None, types, _merges(ranks), "llama-bpe", None, "never")
    begin, end = len(ranks), len(ranks) + 1
    ends = Ends(begin, end, add_bos=True) if size > end else Ends()
    return LibraryTokenizer(library.from_parts(parts), size, ends)


def _ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """The rank of each token, which is its id: 0, 1 and so on."""
    ranks: dict[bytes, int] = {}
    try:
        for number, line in enumerate(data.splitlines()):
            text, _, rank = line.partition(b" ")
            token = base64.b64decode(text, validate=True)
            if int(rank) != number or token in ranks or not 0 < len(token) <= MAX_PIECE or number >= _MAX_RANKS:
                raise ValueError(f"line {number + 1} is not the next token")
            ranks[token] = number
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path}: is damaged ({error}); fetch it again") from None
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[str]:
    """Every way to make a token of two, in the order of the ranks; of one token, the lower parts first."""
    found = []
    for token, rank in ranks.items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        ways = [(ranks[left], ranks[right]) for left, right in cuts if left in ranks and right in ranks]
        found += [(rank, *way) for way in ways]
    letters = ["".join(bpe.LETTERS[byte] for byte in token) for token in ranks]
    return [f"{letters[left]} {letters[right]}" for _, left, right in sorted(found)]
