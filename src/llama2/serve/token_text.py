"""How single tokens and their log-probabilities are shown."""

from __future__ import annotations

from llama2.text.tokenizer import Tokenizer


class Texts:
    """What tokens are called where one by one they are shown."""

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
        """A token's bytes; None for a control token, which stands for none."""
        return None if token in self._control else list(self._tokenizer.token_bytes(token))


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; −9999 stands for what cannot be."""
    return max(logprob, -9999.0)
