"""What is printed for people: everywhere in the package, and nothing in it prints otherwise.

What a stranger wrote, such as file names, licences and templates, may hold characters that a terminal obeys. Others
make a text look like another one. Here they become visible.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

#: Controls that a terminal obeys (C0, DEL, C1), but newline and tab, and those that reorder or break lines.
_CONTROLS = (
    {c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\t\n"}
    | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
    | {
        c: f"<U+{c:04X}>"
        for c in (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x2070))  # 206A to 206F: deprecated
    }
)
#: Those that nobody sees, so that two names may look alike. Joiners (200C, 200D) belong to words and emoji, and stay.
_INVISIBLE = {
    c: f"<U+{c:04X}>"
    for c in (0x00AD, 0x034F, 0x115F, 0x1160, 0x180E, 0x200B, *range(0x2060, 0x2065), 0x3164, 0xFEFF, 0xFFA0)
} | {c: f"<U+{c:04X}>" for c in (*range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))}


_VISIBLE = _CONTROLS | _INVISIBLE


def harmless(text: str) -> str:
    """`text` without what steers a terminal; an answer's other characters stay."""
    return text.translate(_CONTROLS)


def visible(text: object) -> str:
    """`text` in which every control and every invisible character can be seen; newlines and tabs stay."""
    return str(text).translate(_VISIBLE)


def say(*words: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Print for people, as `print` does: what is in `words` can be seen and cannot steer the terminal."""
    print(*map(visible, words), end=end, file=file, flush=flush)


def aside(text: object) -> None:
    """A dim line on standard error beside what is printed, only in a terminal."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        print(visible(text) if plain else f"\x1b[2m{visible(text)}\x1b[0m", file=sys.stderr)


def rewrite(text: object, *, ended: bool) -> None:
    """Replace the line of standard error that this wrote before, up to one that has `ended`."""
    print(f"\r{visible(text):<100}", end="\n" if ended else "", file=sys.stderr, flush=True)


def stream(text: str) -> None:
    """Print a piece of an answer at once: unchanged for programs, and in a terminal so that it cannot steer it."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def data(text: str) -> None:
    """Print a line that programs read, as `stream` does: JSON, or a path."""
    stream(f"{text}\n")
