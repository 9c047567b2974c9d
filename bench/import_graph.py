"""Who imports whom: files by room, arrows between rooms, circles of modules, and imports upward.

A circle is a set of modules of which each imports all others, also within functions and for types alone. An import is
upward where it leads to a room that the layers of pyproject.toml do not put below. The package itself, whose names lead
to rooms, ranks above the highest of those. The picture goes to standard output, in Mermaid, or with --json the numbers.

    python bench/import_graph.py > graph.mmd
    python bench/import_graph.py --src ../before/src --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import grimp

PACKAGE = "llama2"
SRC = Path(__file__).parents[1] / "src"

Arrows = Mapping[str, set[str]]  # of every module, those that it imports


@dataclass(frozen=True)
class Report:
    """What the command shows."""

    files: dict[str, int]  # modules of a room
    arrows: dict[tuple[str, str], int]  # imports between two rooms
    circles: list[list[str]]  # modules
    upward: list[tuple[str, str]]  # modules: who imports, and what
    of_root: list[str]  # modules that import the package itself


def report(src: Path = SRC) -> Report:
    """The graph of the package in the folder `src`, whose pyproject.toml lies beside it."""
    path, finders = sys.path[:], sys.meta_path[:]
    sys.path.insert(0, str(src))
    sys.meta_path.insert(0, PathFinder)  # before that of an editable install, which knows one place alone
    try:
        graph = grimp.build_graph(PACKAGE, cache_dir=None)
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
    arrows = {module: set(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}
    ranks = _ranks(src.parent / "pyproject.toml")
    ranks[PACKAGE] = max((ranks[room(module)] for module in arrows[PACKAGE]), default=0) + 0.5
    ranks["__main__"] = max(ranks.values()) + 1
    between = [(a, b) for a, imported in arrows.items() for b in sorted(imported) if room(a) != room(b)]
    return Report(
        files=dict(sorted(Counter(room(module) for module in arrows).items(), key=lambda pair: ranks[pair[0]])),
        arrows=dict(Counter((room(a), room(b)) for a, b in between)),
        circles=circles(arrows),
        upward=[(a, b) for a, b in between if a != PACKAGE and ranks[room(b)] >= ranks[room(a)]],
        of_root=[a for a, b in between if b == PACKAGE],
    )


def room(module: str) -> str:
    """The room of a module; of the package itself, its own name."""
    return module.split(".")[1] if "." in module else module


def _ranks(pyproject: Path) -> dict[str, float]:
    """The rank of each room, from 0, by the first contract of layers."""
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each.get("containers") == [PACKAGE])
    return {name.strip(): float(rank) for rank, layer in enumerate(reversed(layers)) for name in layer.split("|")}


def circles(arrows: Arrows) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in arrows[module]:
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            at = stack.index(module)
            if len(stack) > at + 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in arrows:
        if module not in index:
            visit(module)
    return found


def mermaid(shown: Report) -> Iterator[str]:
    """The rooms and their arrows, each with how many imports it stands for."""
    yield "flowchart TD"
    for name, count in shown.files.items():
        yield f'  {name}["{name} ({count})"]'
    for (a, b), count in shown.arrows.items():
        if PACKAGE not in (a, b):
            yield f"  {a} -->|{count}| {b}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the import graph.")
    parser.add_argument("--src", type=Path, default=SRC, help="the folder that has the package")
    parser.add_argument("--json", action="store_true", help="numbers in place of the picture")
    options = parser.parse_args()
    shown = report(options.src.resolve())
    numbers = {
        "files": shown.files,
        "circles": shown.circles,
        "upward": shown.upward,
        "of_root": shown.of_root,
        "imports": sum(shown.arrows.values()),
    }
    print(json.dumps(numbers, indent=1) if options.json else "\n".join(mermaid(shown)))
    counts = f"{len(shown.circles)} circles, {len(shown.upward)} imports upward, {len(shown.of_root)} of the package"
    print(f"{sum(shown.files.values())} modules in {len(shown.files)} rooms, {counts} itself", file=sys.stderr)


if __name__ == "__main__":
    main()
