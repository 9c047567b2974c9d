"""bench/prose.py: what is a sentence, and how many words it has, counted by hand."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"
LONG = "Word " + " ".join(["word"] * 25)


@pytest.fixture
def prose(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("prose")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("One, two. Three four five!", [2, 3]),
        ("Version 1.5 of it, e.g. this one. A second.", [7, 2]),
        ("Run `llama2 chat 'Hello. You.'` now (or not). Then stop.", [5, 2]),
        ("A multiply - add is 2 operations; that counts as one sentence.", [11]),
        ("Does it end? It does.", [3, 2]),
    ],
)
def test_sentences(prose: ModuleType, text: str, counts: list[int]) -> None:
    assert [prose.words(sentence) for sentence in prose.sentences(text)] == counts


def test_python(prose: ModuleType) -> None:
    source = '''"""Title.

A paragraph of
two lines.

    code is left out

- one item
- another
"""

import x  # noqa: F401

# a comment
# of two lines
y = 1  # beside code


def f(a):
    """What it does."""
    raise ValueError(f"{a}: is wrong; " "give another")


z = Field(description="A setting.")
'''
    assert sorted(text for _, text in prose.python(source)) == sorted(
        [
            "Title.",
            "A paragraph of two lines.",
            "one item",
            "another",
            "a comment of two lines",
            "beside code",
            "What it does.",
            "X: is wrong; give another",
            "A setting.",
        ]
    )


def test_markdown(prose: ModuleType) -> None:
    source = "# Title\n\nText with `code of. Two` and\n[a link](x.md).\n\n```sh\nnot this\n```\n\n- item\n\n"
    source += "| a | b |\n| - | - |\n| c | d |\n"
    assert [text for _, text in prose.markdown(source)] == [
        "Title", "Text with CODE and a link.", "item", "a", "b", "c", "d"
    ]  # fmt: skip


def test_slashes(prose: ModuleType) -> None:
    source = "// one\n// two\nint x;  // beside it\n/** A thing. */\nconst u = 'https://x';\n"
    assert [text for _, text in prose.slashes(source)] == ["one two", "beside it", "A thing."]


def test_table(
    prose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(f"Short. {LONG}.\n")
    arguments = ["prose.py", "--root", str(tmp_path), str(tmp_path / "README.md")]
    monkeypatch.setattr("sys.argv", [*arguments, "--json"])
    prose.main()
    assert json.loads(capsys.readouterr().out)["files"] == {"README.md": [2, 1, 26]}
    monkeypatch.setattr("sys.argv", [*arguments, "--list"])
    prose.main()
    assert capsys.readouterr().out == f"README.md:1: 26 words: {LONG}.\n"
