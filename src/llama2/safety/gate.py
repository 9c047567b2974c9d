"""Holds the pieces of an answer back until they are judged, in windows that overlap.

Windows have W tokens and end every W/2. With `hold_back`, a token passes once every window that it is in was judged, so
no token of a window that is refused ever passes. The text is then at most W tokens behind. Without, tokens pass up to
the end of the next window, so at most W/2 of them are not judged.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Gate(Generic[T]):
    """One answer's pieces, each a token's: pushed as they come, taken as they may pass.

    The caller pushes a piece, judges `window()` while there is one, calls `judged`, and takes what `take` returns.
    """

    def __init__(self, size: int, *, hold_back: bool) -> None:
        self._step = size // 2
        self._hold_back = hold_back
        self.text = ""  # of all pieces so far
        self._starts: list[int] = []  # where each piece begins in the text
        self._pieces: list[T] = []
        self._taken = 0
        self._judged = 0  # pieces up to which windows were judged
        self._ended = False

    @property
    def held(self) -> int:
        """Pieces that did not pass yet."""
        return len(self._pieces) - self._taken

    def push(self, piece: T, text: str, *, last: bool = False) -> None:
        """Add a piece and the text that it adds; after the last one, none comes."""
        self._starts.append(len(self.text))
        self._pieces.append(piece)
        self.text += text
        self._ended = self._ended or last

    def window(self) -> tuple[int, str, bool] | None:
        """The window that is to be judged next; None if there is none.

        Where it begins in the text, the text up to its end, and whether that is the end of the answer.
        """
        end = self._next()
        if end is None:
            return None
        start = self._starts[max(0, self._judged - self._step)]
        if end == len(self._pieces):
            return start, self.text, self._ended
        return start, self.text[: self._starts[end]], False

    def judged(self) -> None:
        """The window passed."""
        self._judged = self._next() or self._judged

    def _next(self) -> int | None:
        """The piece at which the next window ends."""
        end = self._judged + self._step
        if end <= len(self._pieces):
            return end
        return len(self._pieces) if self._ended and self._judged < len(self._pieces) else None

    def take(self) -> list[T]:
        """The pieces that may pass now and did not before."""
        if self._ended and self._judged >= len(self._pieces):
            end = len(self._pieces)
        elif self._hold_back:
            end = max(0, self._judged - self._step)
        else:
            end = min(len(self._pieces), self._judged + self._step)
        pieces, self._taken = self._pieces[self._taken : end], max(self._taken, end)
        return pieces
