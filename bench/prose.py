"""Count long sentences: the rule of this project is one idea a sentence, in at most 25 words.

    python bench/prose.py                          # a table: README, docs, every --help, src
    python bench/prose.py src/llama2/serve --list  # the long sentences of some files, with their places
    python bench/prose.py --root ../before --json  # another checkout

Prose is what people read as text: paragraphs, list items and table cells of Markdown; help texts; docstrings and
comments; what errors and settings say. Code is not, and a piece of code within a sentence counts as one word.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 25
_CODE = re.compile(r"`+[^`]+`+|<[^<>\s][^<>]*>|\[[A-Z]+=[^\]]*\]")
_END = re.compile(r"""[.!?][)"'”’*]*(?=\s+[^a-z\s])""")
_WORD = re.compile(r"[^\W_]")
_ROW = re.compile(r"\S {2,}\S")  # of a table, whose columns spaces align: it is a text of its own


class Text(NamedTuple):
    """A paragraph, and the line of the file that it begins at (0: it has none)."""

    line: int
    text: str


class Sentence(NamedTuple):
    """One sentence, where it is, and how many words it has."""

    file: str
    line: int
    words: int
    text: str


def sentences(text: str) -> Iterator[str]:
    """The sentences of a paragraph: they end at a full stop, question or exclamation mark before a capital."""
    start = 0
    flat = " ".join(_CODE.sub(" CODE ", text).split())
    flat = re.sub(r" (?=[.,;:!?)])", "", flat)
    for end in _END.finditer(flat):
        yield flat[start : end.end()]
        start = end.end()
    yield flat[start:]


def words(sentence: str) -> int:
    """Words of a sentence: what stands between spaces and has a letter or digit."""
    return sum(bool(_WORD.search(word)) for word in sentence.split())


def markdown(source: str) -> Iterator[Text]:
    """Paragraphs, headings, list items and cells of a Markdown file, without code blocks."""
    from markdown_it import MarkdownIt

    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type == "inline":
            pieces = (
                "CODE" if child.type == "code_inline" else " " if child.type.endswith("break") else child.content
                for child in token.children or ()
                if child.type != "image"
            )
            yield Text((token.map or [0])[0] + 1, "".join(pieces))


def paragraphs(text: str, line: int) -> Iterator[Text]:
    """Paragraphs and list items of a docstring; what is indented deeper is code."""
    lines = text.expandtabs().splitlines()
    margin = min((len(each) - len(each.lstrip()) for each in lines[1:] if each.strip()), default=0)
    begun, gathered = line, list[str]()
    for number, each in enumerate([*lines, ""]):
        bare = each.strip() if number == 0 else each[margin:].rstrip()
        item = bool(re.match(r"[-*] |\d+\. ", bare) or _ROW.search(bare.strip()))
        if gathered and (not bare or item):
            yield Text(begun, " ".join(gathered))
            gathered = []
        if bare and not (bare.startswith("  ") and not gathered):
            begun = begun if gathered else line + number
            gathered.append(re.sub(r"^([-*]|\d+\.) ", "", bare.strip()))


def python(source: str) -> Iterator[Text]:
    """Docstrings, comments, and what errors and settings of a Python file say."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield from paragraphs(str(first.value.value), first.lineno)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                yield Text(argument.lineno, _message(argument))
        elif isinstance(node, ast.keyword) and node.arg == "description":
            yield Text(node.value.lineno, _message(node.value))
    yield from _comments(
        (token.start[0], token.start[1], token.string.lstrip("#: "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not re.match(r"#!|# (noqa|type: |mypy:)", token.string)
    )


def _message(node: ast.expr) -> str:
    """The text of a string, what it has in braces as one word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "X"
    return ""


def slashes(source: str) -> Iterator[Text]:
    """Comments of a file in C++ or JavaScript."""
    found = (
        (number, match.start(), match[1].strip(), not line[: match.start()].strip())
        for number, line in enumerate(source.splitlines(), 1)
        if (match := re.search(r"(?:^|\s)(?://+|/\*\*?)\s(.*?)(?:\*/)?$|^\s+\*\s(.*)$", line)) and match[1]
    )
    yield from _comments(found)


def _comments(found: Iterator[tuple[int, int, str, bool]]) -> Iterator[Text]:
    """Comments, by line, column, text and whether they are alone in a line; neighbours are one paragraph."""
    begun = last = column = 0
    gathered: list[str] = []
    for line, at, text, alone in found:
        if gathered and not (alone and line == last + 1 and at == column and text and not _ROW.search(text)):
            yield Text(begun, " ".join(gathered))
            gathered = []
        begun, last, column = (begun if gathered else line), line, at
        if text:
            gathered.append(text)
    if gathered:
        yield Text(begun, " ".join(gathered))


def helps(root: Path) -> Iterator[tuple[str, Text]]:
    """Every command's name with its help texts, those of its options, and its example."""
    sys.path.insert(0, str(root / "src"))
    from typer.main import get_command

    from llama2.cli import main

    def walk(name: str, command: Any) -> Iterator[tuple[str, Text]]:
        for text in paragraphs(command.help or "", 0):
            yield name, Text(0, text.text)
        for parameter in command.params:
            yield name, Text(0, getattr(parameter, "help", None) or "")
        for child, each in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {child}", each)

    for name, text in walk("llama2", get_command(main.program(None))):
        yield f"{name} --help", text


_READERS = {".md": markdown, ".py": python, ".h": slashes, ".cpp": slashes, ".js": slashes, ".mjs": slashes}


def read(root: Path, paths: list[Path]) -> Iterator[tuple[str, Text]]:
    """Prose of files and folders, vendored and generated ones left out."""
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            reader = _READERS.get(file.suffix)
            name = file.resolve().relative_to(root.resolve()).as_posix()
            if reader and not re.search(r"/vendor/|^docs/results/", name):
                for text in reader(file.read_text("utf-8")):
                    yield name, text


def count(found: Iterator[tuple[str, Text]]) -> list[Sentence]:
    """All sentences, with their words."""
    return [
        Sentence(name, text.line, number, sentence)
        for name, text in found
        for sentence in sentences(text.text)
        if (number := words(sentence))
    ]


def main() -> None:
    """Print a table, the long sentences, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("paths", nargs="*", type=Path, help="README, docs, src and --help by default")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout")
    parser.add_argument("--list", action="store_true", help="print the long sentences")
    parser.add_argument("--help-texts", action="store_true", help="every --help, beside the paths")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    root: Path = options.root
    paths = options.paths or ([] if options.help_texts else [root / "README.md", root / "docs", root / "src"])
    found = count(read(root, paths))
    if options.help_texts or not options.paths:
        found += count(helps(root))
    rows: dict[str, tuple[int, int, int]] = {}
    for sentence in found:
        total, long, most = rows.get(sentence.file, (0, 0, 0))
        rows[sentence.file] = (total + 1, long + (sentence.words > LIMIT), max(most, sentence.words))
    groups = [
        ("README.md", [rows[name] for name in rows if name == "README.md"]),
        ("docs", [row for name, row in rows.items() if name.startswith("docs/")]),
        ("--help", [row for name, row in rows.items() if name.endswith("--help")]),
        ("src", [row for name, row in rows.items() if name.startswith("src/")]),
        ("all", list(rows.values())),
    ]
    sums = {name: (sum(r[0] for r in group), sum(r[1] for r in group)) for name, group in groups if group}
    if options.json:
        print(json.dumps({"limit": LIMIT, "sums": sums, "files": rows}))
    elif options.list:
        for sentence in found:
            if sentence.words > LIMIT:
                place = f"{sentence.file}:{sentence.line}" if sentence.line else sentence.file
                print(f"{place}: {sentence.words} words: {sentence.text.strip()}")
    else:
        print(f"{'':48} sentences  over {LIMIT}  longest")
        for name, (total, long, most) in sorted(rows.items(), key=lambda row: -row[1][1]):
            if long:
                print(f"{name:48} {total:9} {long:8} {most:8}")
        for name, (total, long) in sums.items():
            print(f"{name:48} {total:9} {long:8}")


if __name__ == "__main__":
    main()
