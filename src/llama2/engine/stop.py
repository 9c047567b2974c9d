"""The text of an answer as it grows, and the stop strings that end it."""

from __future__ import annotations

from collections.abc import Sequence

from llama2.engine.request import Request
from llama2.text.tokenizer import Tokenizer


class StopStrings:
    """Passes text on until a stop string completes, and holds back an end that may become one.

    Of several, the one that completes first ends the text; of those that end together, the longest. So it does not
    matter how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None  # the stop string that completed

    def push(self, text: str) -> str:
        """The text that is certain to stay, without the stop string if it completed; then that is `found`."""
        if not self._stops:
            return text
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, cut = min(matches)
            self.found, self._held = text[cut:end], ""
        else:
            cut = len(text) - max(_overlap(text, stop) for stop in self._stops)
            self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """What the tokens of one answer say, until one of the request's stop strings completes."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.stream()
        self._stops = StopStrings(request.stop)
        if request.raw_completion:
            for token in request.prompt:
                self._stream.push(token)

    @property
    def found(self) -> str | None:
        """The stop string that has ended the text."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that became certain with `token`."""
        return self._stops.push(self._stream.push(token))

    def flush(self) -> str:
        """What was held back, once no more tokens come; nothing after a stop string."""
        return "" if self.found else self._stops.push(self._stream.flush()) + self._stops.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
