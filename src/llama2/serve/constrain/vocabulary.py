"""A model's vocabulary as the grammar engine reads it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from llguidance import LLTokenizer
from numpy.typing import NDArray

from llama2.errors import RequestError
from llama2.text.tokenizer import Tokenizer


class Vocabulary:
    """llguidance's view of a tokenizer: V tokens, then those that lose their space at the start of an answer.

    SentencePiece adds a space before a text and removes it again, so `▁{` as an answer's first token is `{`. Such a
    token has a second entry after the vocabulary's end, with its bytes at the start.
    """

    is_tokenizer_wrapper = True  # llguidance needs this and the attributes that follow
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.stop_ids:
            raise RequestError("this model has no token that ends an answer, so none can follow a grammar")
        self.size = tokenizer.vocab_size
        self.stops = np.array(sorted(tokenizer.stop_ids))
        texts = {token: text.encode() for text, token in tokenizer.control.items()}
        self.special_token_ids = sorted({*texts, *tokenizer.stop_ids})
        self.tokens = [texts.get(token) or tokenizer.token_bytes(token) for token in range(self.size)]
        self.eos_token_id = int(self.stops[0])
        self.spaced = np.array([t for t in range(self.size) if tokenizer.drops_space(t)], np.int64)
        self.first = {int(token): self.size + i for i, token in enumerate(self.spaced)}
        self.bare = [token for token in self.first if len(self.tokens[token]) == 1]  # nothing but the space
        ids = {text: token for token, text in enumerate(self.tokens)}  # the last one wins: single bytes come first
        bare = [self.tokens[token][1:] for token in self.first]
        # A forced text is one token as a rule, so other tokens with the same bytes must be allowed here.
        self.alike = np.array([ids.get(text, self.size + i) for i, text in enumerate(bare)], np.int64)
        self.tokens += bare
        self._tokenizer = tokenizer
        self.library = LLTokenizer(cast(Any, self))

    def __call__(self, text: str) -> list[int]:
        """Tokens of a forced text within an answer: the tokenizer's own, or else the longest ones."""
        encode, before = self._tokenizer.encode, "\n" if self.first else ""
        tokens = encode(before + text)[len(encode(before)) :]
        exact = b"".join(map(self._tokenizer.token_bytes, tokens)) == text.encode()
        return tokens if exact else self.library.greedy_tokenize(text)

    def is_empty_text(self, tokens: NDArray[np.int32]) -> bool:
        """Whether the prompt `tokens` has no text, so that the answer starts one."""
        return not any(map(self._tokenizer.token_bytes, tokens))  # stops at the first token with text
