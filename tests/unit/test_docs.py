"""What README and docs name exists: links, paths, functions, commands with their options, settings, errors, numbers."""

import ast
import asyncio
import importlib.util
import json
import math
import posixpath
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from fastapi import APIRouter

import llama2
from llama2.cli.main import program

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")]
    + [*(ROOT / "docs").rglob("*.md")]
)
#: Records of a day name what there was on that day; the rest speaks of the present.
PRESENT = [page for page in PAGES if "docs/results" not in page.as_posix() and page.name != "CHANGELOG.md"]
SOURCES = sorted((ROOT / "src/llama2").rglob("*.py"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w./*-]*[\w*]\.(?:py|h|cpp|c|toml|json|md|sh|mjs|js|yml)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and GitHub both make them."""
    text = prose_of(page)
    anchors = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", line).strip().lower()) for line in _headings(text)}
    if name_of(page) == "docs/commands.md":  # which the site fills in
        anchors |= {f"llama2-{'-'.join(path)}" for path in commands()}
    return anchors


def _headings(text: str) -> list[str]:
    return re.findall(r"^#+ +(.*)$", text, re.MULTILINE)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, with the anchor."""
    for target in LINK.findall(prose_of(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in slugs(target), f"{target.name}#{anchor}"


@cache
def file_names() -> set[str]:
    """Every file of the repository by each end of its path: c.py, b/c.py, a/b/c.py."""
    files = [
        path.relative_to(ROOT).parts
        for folder in ("src", "tests", "bench", "docs", "recipes", "deploy", ".ci", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    files += [(path.name,) for path in ROOT.iterdir() if path.is_file()]
    return {"/".join(parts[i:]) for parts in files for i in range(len(parts))}


#: Files that a model, a run or another program has, and a key of GGUF files; not ours.
FOREIGN = {
    "tokenizer_config.json", "tokenizer.json", "config.json", "config-7b.json", "params.json", "reward.json",
    "llama2.tokenizer.prepend_scheme", "recipe.json", "origin.json", "card/README.md", "corpora/texts/card/README.md",
    "peers/llama.cpp", "best/report.json", "record.json", "gatt/probes.json", "distilled/report.json",
    "lineage.json", "ROUND/scores.json",
}  # fmt: skip


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_paths(page: Path) -> None:
    """A file that is named in backticks is in the repository, as is a module."""
    missing = []
    for code in CODE.findall(prose_of(page)):
        path = code.strip()
        if re.fullmatch(FILE, path):
            if (
                path not in file_names()
                and path not in FOREIGN
                and not any(ROOT.glob(path))
                and not any(ROOT.glob(f"src/llama2/**/{path}"))
            ):
                missing.append(path)
        elif re.fullmatch(r"(src|tests|bench|docs|recipes)/[\w/.-]*", path):
            missing += [path] * (not (ROOT / path).exists())
        elif re.fullmatch(r"llama2(\.\w+)+", path) and path not in FOREIGN and not _importable(path):
            missing.append(path)
    assert not missing


def _importable(path: str) -> bool:
    """Whether this is a module, or a name in one; nothing but parents is imported."""
    module, _, name = path.rpartition(".")
    try:
        if importlib.util.find_spec(path):
            return True
    except ModuleNotFoundError:
        return False
    return hasattr(importlib.import_module(module), name)


@cache
def definitions() -> set[str]:
    """Functions, classes, methods, constants and attributes in `src/`, also as Class.method, and those of the C++."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(text_of(source))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    for header in (ROOT / "src/llama2/native").glob("*.h"):
        found |= set(re.findall(r"(\w+)\(", text_of(header)))
    return found


def test_the_paper_map_names_functions_and_tests() -> None:
    rows = re.findall(r"^\| (?!paper|---)(.*) \|$", text_of(ROOT / "docs/paper-map.md"), re.MULTILINE)
    assert len(rows) > 25
    for row in rows:
        *_, functions, tests = row.split(" | ")
        for test in CODE.findall(tests):
            assert (ROOT / "tests" / test).is_file(), test
        for code in CODE.findall(functions):
            name = code.replace("Model::", "")
            if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", name) and not FILE.fullmatch(name):
                owner, _, member = name.rpartition(".")
                assert name in definitions() or (not owner[:1].isupper() and member in definitions()), code
            elif not name.endswith("*"):
                assert code in file_names() or any((ROOT / "recipes").glob(f"{code}*")) or (ROOT / code).exists(), code


@cache
def commands() -> dict[tuple[str, ...], Any]:
    """Every command, by the words after `llama2`."""

    def below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from below(child, (*path, name))

    return {path: command for path, command in below(typer.main.get_command(program(None)), ()) if path}


def lines_of(page: Path) -> Iterator[list[str]]:
    """Command lines of `llama2` in a page's code blocks, as words after the program's name."""
    for _, language, code in FENCE.findall(text_of(page)):
        if language in ("", "sh", "bash", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                match = re.search(r"(?:^|[$|] ?|\.venv/bin/|\$\(which )(llama2)\)? (.*)", line.strip())
                if match and not line.lstrip().startswith("#"):
                    yield _words(match[2])


def _words(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return words[: words.index("|")] if "|" in words else words


LINES = [(page, words) for page in PRESENT for words in lines_of(page)]


@pytest.mark.parametrize(("page", "words"), LINES, ids=lambda value: value if isinstance(value, str) else None)
def test_command_lines_parse(page: Path, words: list[str]) -> None:
    path = next((path for path in (tuple(words[:2]), tuple(words[:1])) if path in commands()), None)
    assert path, f"{page.name}: llama2 {' '.join(words)}"
    command, arguments = commands()[path], words[len(path) :]
    if not set(arguments) & {"--settings", "--help", "…"}:
        command.make_context(path[-1], [*arguments])
    if path in (("pretrain",), ("sft",), ("data", "build")):
        known = set(re.findall(r"^\| `([\w.]+)`", text_of(ROOT / "docs/settings.md"), re.MULTILINE))
        for key in re.findall(r"(?<![\w./-])([a-z][\w.]*)=", " ".join(arguments)):
            parts = key.split(".")
            named = {key, ".".join([parts[0], "NAME", *parts[2:]])}
            assert named & known, f"{page.name}: {key}="


QUICK = [words for _, words in LINES if words[0] == "plan" or "--settings" in words]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_quick_command_lines_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if "here" not in words and (words[0] != "plan" or {"--on", "--train"} & set(words)):  # the rest measures first
        program(words[0])([*words], prog_name="llama2", standalone_mode=False)
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", [page for page in PRESENT if page.parent.name != "bench"], ids=name_of)
def test_options_exist(page: Path) -> None:
    options = {
        option
        for command in commands().values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "--debug", "--version"}
    for code in CODE.findall(prose_of(page)):
        if code.startswith(("--", "llama2 ", "chat ", "serve ", "convert ")):
            for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", code):
                assert option in options, f"{option} in `{code}`"


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_other_blocks_are_of_their_language(page: Path) -> None:
    for _, language, code in FENCE.findall(text_of(page)):
        if language == "python":
            compile(re.sub(r"^    ", "", code, flags=re.MULTILINE) if code.startswith("    ") else code, page, "exec")
        if language == "json":
            json.loads(code)


def test_each_environment_variable_is_on_its_page() -> None:
    read = {variable for source in SOURCES for variable in re.findall(r"\"(LLAMA2_[A-Z_]+)\"", text_of(source))}
    named = set(re.findall(r"LLAMA2_[A-Z_]+", text_of(ROOT / "docs/environment.md")))
    assert named - {"LLAMA2_TEST_MODEL"} == read - {"LLAMA2_TEST_MODEL"}


@cache
def strings() -> str:
    """What `src/`, and the Makefile, may print: parts of a message are joined by `…` where a value comes in."""
    found = [text_of(ROOT / "Makefile").replace('" \\\n\t"', " ")]

    def message(node: ast.expr) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(message(part) or "…" for part in node.values)
        return None

    for source in SOURCES:
        found += [m for node in ast.walk(ast.parse(text_of(source))) if (m := message(node))]
    return "\n".join(found).replace("`", "")


def test_troubleshooting_quotes_real_errors() -> None:
    headings = _headings(text_of(ROOT / "docs/troubleshooting.md"))
    quoted = [code for heading in headings for code in CODE.findall(heading)]
    assert len(quoted) > 20
    for error in quoted:
        for part in re.split("…", error):
            words = part.strip("`.,;: ")
            assert len(words) < 4 or words in strings(), f"{words!r} of {error!r}"


def test_each_public_name_has_an_api_page() -> None:
    index = text_of(ROOT / "docs/api/index.md")
    for name in set(llama2.__all__) - {"__version__", "text"}:
        assert re.search(rf"`(llama2\.)?{name}`", index), name
    for page in (ROOT / "docs/api").glob("*.md"):
        for module in re.findall(r"^::: ([\w.]+)$", text_of(page), re.MULTILINE):
            assert importlib.util.find_spec(module), module
            assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_sizes_are_those_of_plan(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*words: str) -> dict[str, Any]:
        program("plan")(["plan", *words, "--json"], prog_name="llama2", standalone_mode=False)
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    rows = [row.split(" | ") for row in re.findall(r"^\| (\d+B .*) \|$", text_of(ROOT / "docs/sizes.md"), re.MULTILINE)]
    assert len(rows) == 36
    for size, what, *shown in rows:
        if what.isdigit():
            planned = plan(size, "--train", "--gpus", what)
            expected = [f"{planned['total_memory_bytes'] / 1e9:.1f}", "yes" if planned["fits"] else "no"]
        else:
            parts = plan(size, "--format", what, "--on", "RTX-4090")["memory_bytes"]
            total = sum(value for name, value in parts.items() if name != "overhead")
            expected = [f"{value / 1e9:.1f}" for value in (parts["weights"], parts["key/value cache"], total)]
        assert shown == expected, (size, what)


def run_example(part: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run CONTRIBUTING's code block that has this in it, among these names."""
    (code,) = (code for _, _, code in FENCE.findall(text_of(ROOT / "CONTRIBUTING.md")) if part in code)
    exec(textwrap.dedent(code), names)  # noqa: S102
    return names


def test_the_example_of_an_objective_runs() -> None:
    """Its excess over plain cross-entropy is 1e-4 Σ (log Σ exp logits)², where there is a target."""
    import torch
    from torch.nn import functional

    from llama2.data.loader import IGNORED, TokenBatch
    from llama2.train import objective

    logits = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]]])
    network = SimpleNamespace(
        tensor=torch.as_tensor, hidden_states=lambda x: x, transformer=SimpleNamespace(logits=lambda _: logits)
    )
    example = run_example("next_token_with_z", {**vars(objective), "F": functional, "IGNORED": IGNORED})
    ids = torch.tensor([[1, IGNORED]]).numpy()
    z = math.log(1 + math.e + math.e**3)  # of the first token alone, whose target is 1
    found = example["next_token_with_z"](network, TokenBatch(ids, ids))
    assert found.item() == pytest.approx((z - 1) + 1e-4 * z**2, rel=1e-6)


def test_the_example_of_a_route_runs() -> None:
    from llama2.serve.surfaces import openai

    names = run_example("def count", {**vars(openai), "router": APIRouter()})
    models = SimpleNamespace(entries={"one": None, "other": None})
    http = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(models=models)))
    assert json.loads(asyncio.run(names["count"](http)).body) == {"count": 2}


#: What newcomers ask, and where it is answered.
QUESTIONS = {
    "run my GGUF": "docs/guides/run.md#run-your-gguf-file",
    "serve it behind nginx": "docs/clients.md#behind-a-proxy",
    "tune on my dialogs": "docs/guides/train.md#tune-on-your-dialogs",
    "continue pretraining": "docs/guides/train.md#continue-pretraining",
    "add a route": "CONTRIBUTING.md#add-a-route",
    "add a training objective": "CONTRIBUTING.md#add-a-training-objective",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_two_clicks_from_the_index_answer(question: str) -> None:
    answer, _, anchor = QUESTIONS[question].partition("#")
    assert anchor in slugs(ROOT / answer)
    first = {target for target, _ in links(ROOT / "docs/index.md")}
    second = {target for page in first if page.suffix == ".md" for target, _ in links(page)}
    assert ROOT / answer in first | second


def test_the_architecture_has_every_room_with_its_rank() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["llama2"])
    ranks = {(rank, room) for rank, layer in enumerate(reversed(layers)) for room in layer.split(" | ")}
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text_of(ROOT / "docs/architecture.md"), re.MULTILINE)
    assert {(int(rank), Path(name).stem) for rank, names in rows for name in CODE.findall(names)} == ranks


def test_pages_are_in_the_navigation() -> None:
    navigation = text_of(ROOT / "mkdocs.yml")
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").as_posix()
        assert f" {place}\n" in navigation or f" {posixpath.dirname(place).partition('/')[0]}/*\n" in navigation, place
