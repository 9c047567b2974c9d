"""Compiles llguidance grammars within limits; as a program, tries untrusted grammars for a parent that can kill it.

The library limits the work of a token, but not that of compiling: `(a{1000}){10000}` takes 20 seconds. So a grammar is
first compiled in a process of its own, over a vocabulary of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import llguidance

#: Address space of the process, if the system can limit it.
MEMORY = 512 << 20


def matcher(vocabulary: Any, grammar: str) -> Any:
    """llguidance's matcher of `grammar`, at its start. Raises ValueError with the library's reason.

    With these limits a matcher takes at most about 20 MB, which copies mostly share, and a token some 20 ms.
    """
    limits = llguidance.LLParserLimits(
        max_items_in_row=20_000,
        max_grammar_size=20_000,
        max_lexer_states=10_000,
        step_max_items=25000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    start = llguidance.LLMatcher(vocabulary, grammar, limits=limits, log_level=0)
    trial = start.deep_copy()
    trial.compute_bitmask()  # finds grammars with which a parser cannot even start
    if trial.is_error():
        raise ValueError(trial.get_error())
    return start


class _Bytes:
    """A vocabulary of `size` tokens: 256 bytes, and empty ones."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, size: int) -> None:
        self.tokens = [bytes([value]) for value in range(256)] + [b""] * (size - 255)
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


_vocabulary = lru_cache(8)(lambda size: llguidance.LLTokenizer(cast(Any, _Bytes(size))))


def first_error(size: int, grammars: Sequence[str]) -> tuple[int, str] | None:
    """The index of the first grammar that cannot be compiled over about `size` tokens, and the reason."""
    vocabulary = _vocabulary(size)
    for i, grammar in enumerate(grammars):
        try:
            matcher(vocabulary, grammar)
        except (ValueError, MemoryError) as error:
            return i, str(error)
    return None


if __name__ == "__main__":
    from llama2.text.sandbox import serve

    serve(lambda request: first_error(*request), MEMORY)
