"""One Tokenizer over SentencePiece models and byte-level BPE; libraries do the work (paper 2.2, spec 2.1–2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text ⇄ token ids. Text never yields a control token unless `special=True`, which only templates use."""

    kind: str  # "sentencepiece" or "bpe"
    pre: str | None  # name of the byte-level pre-tokenizer
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool  # whether a raw prompt starts with BOS
    stop_ids: frozenset[int]  # EOS and every end-of-turn token
    control: dict[str, int]  # control tokens by their text

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Token ids of `text`. Raises TokenizerError for a lone surrogate. `special`: control tokens are recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens give nothing, broken UTF-8 gives U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; empty for a control token."""
        ...

    def stream(self) -> TokenStream:
        """A fresh incremental detokeniser."""
        ...


class TokenStream(Protocol):
    """Token by token to text; never emits half a character. The pieces joined equal `decode` of all tokens."""

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""
        ...

    def flush(self) -> str:
        """What is left at the end of the answer, broken bytes as U+FFFD."""
        ...
