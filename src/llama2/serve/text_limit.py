"""Whether a text can fit a context at all, by its bytes alone, before it is tokenized."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama2.errors import ContextError
from llama2.text.library import LibraryTokenizer
from llama2.text.tokenizer import Tokenizer

#: Texts up to so many bytes are not checked: they are tokenized in no time.
_SHORT = 32 << 10

#: Bytes that are counted at once.
_SLICE = 1 << 20

#: How many times shorter a text may become, in bytes, by a tokenizer's Unicode normalisation. (A decomposed syllable
#: of Korean has nine bytes, and three as one letter.)
_NORMALISED = 4


class TextLimit:
    """A lower bound of a text's tokens: the count of some bytes, divided by the most of them in one token.

    It is computed for each byte, for letters together, and for all bytes. A byte that the vocabulary does not have is
    not counted. White space is, though a template may drop it at a message's ends.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self._tokenizer = tokenizer
        self._context = context
        own = tokenizer.kind == "bpe" and not isinstance(tokenizer, LibraryTokenizer)
        self._tokens = context if own else context * _NORMALISED

    def check(self, *texts: str) -> None:
        """Raises ContextError for texts that cannot fit together."""
        size = sum(map(len, texts))
        if size <= _SHORT:
            return
        counts = np.zeros(256, np.int64)
        for text in texts:
            data = np.frombuffer(text.encode(errors="replace"), np.uint8)
            for at in range(0, len(data), _SLICE):
                counts += np.bincount(data[at : at + _SLICE], minlength=256)
        groups, most = self._groups
        needed = float(((groups @ counts) / most).max())
        if needed > self._tokens:
            size = int(counts.sum())
            raise ContextError(
                f"a prompt of {size} bytes is too long for the context of {self._context} tokens, which hold "
                f"at most {int(size * self._tokens / needed)} bytes of it; shorten it"
            )

    def check_count(self, count: int, what: str) -> None:
        """Raises ContextError for more items than the context has tokens; each needs one."""
        if count > self._context:
            raise ContextError(
                f"a prompt of {count} {what} is too long for the context of {self._context} tokens: "
                f"at most {self._context} {what} fit; shorten it"
            )

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Groups of bytes, and the most bytes of each group in one token.

        -> (G, 256), (G,)
        """
        t = self._tokenizer
        pieces = [t.token_bytes(token) for token in range(t.vocab_size)]
        pieces += [text.encode() for text in (*t.control, *t.user)]
        token = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        data = np.frombuffer(b"".join(pieces), np.uint8)
        pairs, counts = np.unique(token * 256 + data, return_counts=True)
        most = np.zeros(256, np.int64)
        np.maximum.at(most, pairs % 256, counts)
        counted = most > 0
        if t.kind == "sentencepiece" and not most.all():  # any number of letters without pieces are one unknown token
            counted[128:] = False
        letters = np.array([byte >= 128 or chr(byte).isalpha() for byte in range(256)]) & counted
        together = np.stack([letters, counted])
        groups = np.concatenate([np.eye(256, dtype=bool)[counted], together]).astype(np.int64)
        largest = [np.bincount(token[group[data]], minlength=1).max() for group in together]
        return groups, np.maximum(1, np.concatenate([most[counted], np.array(largest, np.int64)]))
