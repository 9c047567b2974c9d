"""Single tokens and their log-probabilities, as responses show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama2.engine.request import Logprob
from llama2.text.tokenizer import Tokenizer


class TokenTexts:
    """The text of a single token, and its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = {token: text for text, token in tokenizer.control.items()}

    def __call__(self, token: int) -> str:
        """A control token's name, a token's text, or `bytes:\\xe2\\x98` for a part of a character."""
        if token in self._control:
            return self._control[token]
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token: int) -> list[int] | None:
        """A token's bytes; None for a control token, which has none."""
        return None if token in self._control else list(self._tokenizer.token_bytes(token))


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; −9999 instead of −∞."""
    return max(logprob, -9999.0)


def chat_logprobs(logprobs: Sequence[Logprob], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities in the form of chat completions."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": texts(token), "logprob": finite(value), "bytes": texts.bytes(token)}

    rows = [
        {**entry(position.token, position.logprob), "top_logprobs": [entry(*other) for other in position.top]}
        for position in logprobs
    ]
    return {"content": rows, "refusal": None}
