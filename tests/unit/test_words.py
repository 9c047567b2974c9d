"""The field's words: what the project once called otherwise does not come back, in code, docs or help.

`ALLOWED` says how many of the old words there still are. Its numbers may only be lowered, to zero in the end. Terms of
our own are in docs/glossary.md; results in docs/results are records of their day.

`python tests/unit/test_words.py` prints every place.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: In prose: comments, docstrings, messages, help, docs; with what to write instead.
PHRASES = {
    r"\b(tell|tells|told|telling)\b": "say, report, log, emit, state, distinguish",
    r"(?<!there )\b(is|are|was|were) no (?!longer|more\b|less\b|fewer|other|different|matter)[a-z]\w*": "is not a",
    r"\b(has|have) not (the|a|an|its|that|these|those|any)\b": "does not have",
    r"\blet(s|ting)? go\b": "release",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bfor ever\b": "forever",
    r"\b(stand|stands|stood|standing) (in|at|beside|there|by|behind|under|on|where|together)\b": "is in",
    r"\bwhoever\b": "who",
    r"\b(un)?learnt\b": "learned, trained on",
    r"\bwhat is new\b|\bnews\b": "event, events",
    r"\bat the door\b": "before admission",
    r"\b(de|re)?quantis\w+": "quantize",
}
#: Identifiers, by the room that had them; "" is every room.
NAMES = {
    "": "told Told news timed_news Door Demand mail growing Growing Watched Observed Shown Crew add_up learnt "
    "twins Learn quantise quantised dequantise ask_for",
    "engine": "chain publish shares reused Part agreement observe",
    "model": "features rotations rotate within Past gathered",
    "native": "Room",
    "train": "Line Watch facts figures share cut world micro least checkpointing",
}
#: Old words that are still there: lower these numbers with every one that goes.
ALLOWED = {"prose of src": 0, "names in src": 0, "docs": 0, "help": 0}


@cache
def found(part: str) -> list[str]:
    """Every old word of a part of `ALLOWED`, with its place."""
    return list(PARTS[part]())


def in_prose(place: str, text: str) -> Iterator[str]:
    for phrase, better in PHRASES.items():
        for match in re.finditer(phrase, text, re.IGNORECASE):
            yield f"{place}: {' '.join(match[0].split())!r}, better: {better}"


def sources(*ends: str) -> Iterator[tuple[str, Path, str]]:
    """The files of `src/` that end so, with their room and text."""
    for path in sorted((ROOT / "src/llama2").rglob("*")):
        if path.suffix in ends and "vendor" not in path.parts:
            yield path.relative_to(ROOT / "src/llama2").parts[0], path, path.read_text(encoding="utf-8")


def prose_of_sources() -> Iterator[str]:
    for _, path, text in sources(".py", ".h", ".cpp", ".js", ".css", ".html", ".jinja"):
        name = path.relative_to(ROOT).as_posix()
        for line, prose in python_prose(text) if path.suffix == ".py" else [(0, text)]:
            yield from in_prose(f"{name}:{line}" if line else name, prose)


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def names_in_sources() -> Iterator[str]:
    for room, path, text in sources(".py", ".h", ".cpp"):
        old = {*NAMES[""].split(), *NAMES.get(room, "").split()}
        names = identifiers(text) if path.suffix == ".py" else set(re.findall(r"\w+", text))
        for name in sorted(names):
            if name.strip("_") in old:
                yield f"{path.relative_to(ROOT).as_posix()}: the name {name}"


def identifiers(source: str) -> set[str]:
    """Names of variables, attributes, functions, classes, parameters and modules of a Python file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "name", "arg"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.add(value.rpartition(".")[2])
    return found


def prose_of_docs() -> Iterator[str]:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for page in [*pages, *sorted((ROOT / "docs").rglob("*.md"))]:
        if "results" not in page.parts:
            yield from in_prose(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8"))


def prose_of_help() -> Iterator[str]:
    import typer.main

    from llama2.cli.main import program

    def below(command: Any, path: str, parent: Any = None) -> Iterator[str]:
        context = command.context_class(command, info_name=path.rpartition(" ")[2], parent=parent, terminal_width=1000)
        yield from in_prose(f"{path} --help", command.get_help(context))
        for name, child in getattr(command, "commands", {}).items():
            yield from below(child, f"{path} {name}", context)

    yield from below(typer.main.get_command(program(None)), "llama2")


PARTS = {
    "prose of src": prose_of_sources,
    "names in src": names_in_sources,
    "docs": prose_of_docs,
    "help": prose_of_help,
}


@pytest.mark.parametrize("part", ALLOWED)
def test_no_old_words(part: str) -> None:
    assert len(found(part)) <= ALLOWED[part], "\n".join(found(part))


def test_old_words_are_found() -> None:
    """The lists see what they are for, in each kind of text, and let the field's words pass."""
    for text in ("it tells\nwhy", "is no file", "Let go", "for ever", "stands in", "what is learnt", "quantised"):
        assert list(in_prose("here", text)), text
    for text in ("is no longer there", "no more than ten", "stands for", "quantized", "the foretold", "a mentor"):
        assert not list(in_prose("here", text)), text
    source = 'class Door:  # told\n    """Tells."""\n    def mail(self, news=1): return self.learnt(f"told {news}")\n'
    assert {"Door", "mail", "news", "learnt"} <= identifiers(source)
    assert [line for line, _ in python_prose(source)] == [1, 2, 3]


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        print(f"{part}: {len(found(part))} of {ALLOWED[part]} allowed", *found(part), sep="\n  ")
