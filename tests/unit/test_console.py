"""What is printed for people cannot steer their terminal, nor deceive them about what stands there."""

from __future__ import annotations

import io
import unicodedata

import pytest

from llama2 import console
from llama2.hub import licence, progress


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;x\x07\x9b1m\x7f", "␛]0;x␇\ufffd1m\ufffd"),
        ("a\tb\nc\r\n", "a\tb\nc␍\n"),
        ("model\u202efugg.exe", "model<U+202E>fugg.exe"),
        ("a\u2028b\u2066c\u200ed\u061ce", "a<U+2028>b<U+2066>c<U+200E>d<U+061C>e"),
        ("lla\u200bma\ufeff\u00ad\U000e0041", "lla<U+200B>ma<U+FEFF><U+00AD><U+E0041>"),
        ("نمی\u200cخواهم 👩\u200d💻 é 中", "نمی\u200cخواهم 👩\u200d💻 é 中"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str, shown: str) -> None:
    assert console.visible(text) == shown


def test_no_control_and_no_direction_is_left() -> None:
    kinds = {c: unicodedata.category(chr(c)) for c in range(0x110000)}
    left = {c for c, kind in kinds.items() if kind in ("Cc", "Zl", "Zp") and console.visible(chr(c)) == chr(c)}
    assert left == {ord("\n"), ord("\t")}
    turns = {c for c in kinds if unicodedata.bidirectional(chr(c)) in ("LRE", "RLE", "LRO", "RLO", "PDF")}
    turns |= {c for c in kinds if unicodedata.bidirectional(chr(c)) in ("LRI", "RLI", "FSI", "PDI")}
    assert len(turns) == 9
    assert all(console.harmless(chr(c)) != chr(c) for c in turns)


def test_an_answer_keeps_what_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", stream)
    console.stream("a\u200bb\u202e\x1b")
    assert stream.getvalue() == "a\u200bb<U+202E>␛"


def test_a_licence_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    licence.show_once("a/b", "mine\x1b]8;;http://x\x07\u202e")
    assert capsys.readouterr().err == "a/b: mine␛]8;;http://x␇<U+202E>\n"


def test_a_bar_shows_names_as_they_are() -> None:
    bars = progress._bars()
    bars.stop()
    bars.add_task("[red]x[/y]")  # which would be an error in markup
    assert bars.columns[0](bars.tasks[0]).plain == "[red]x[/y]"  # type: ignore[union-attr]
